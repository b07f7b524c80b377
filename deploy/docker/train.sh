#!/bin/sh
# The compose trainer: simulated ad log -> two trained models -> two artifacts. What is there is not made again: an
# interrupted run goes on, and a second `up` trains nothing. To train anew remove the volumes (docker compose down -v).
set -eu
if [ ! -f /data/prepared/dataset.json ]; then
    rm -rf /data/log /data/prepared /data/runs
    python -m training simulate --out /data/log --users 2000 --items 500 --rows 120000 --seed 7
    python -m training prepare simulated --source /data/log --out /data/prepared
fi
for model in mian stec; do
    if [ -f "/artifacts/$model/current.json" ]; then
        echo "$model is trained already"
        continue
    fi
    python -m training train "$model" --data /data/prepared --out "/data/runs/$model" --resume
    python -m training export "/data/runs/$model" --out /artifacts
done
