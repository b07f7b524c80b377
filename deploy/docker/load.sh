#!/bin/sh
# The compose loader: users, items and the clicks before the held-out day into the store. Loading twice changes nothing.
set -eu
python -m service load-features users /data/prepared/raw/users.parquet
python -m service load-features items /data/prepared/raw/items.parquet
python -m service load-behaviours /data/prepared/raw/behaviours.parquet
