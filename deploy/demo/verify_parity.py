"""Prove on a real data set that training and serving agree: two trained runs against their own answers over HTTP.

    python deploy/demo/verify_parity.py --data data/ml-1m --runs runs/mian runs/stec

Exports both runs, fills a store with the clicks before the test part, serves them 50/50, replays the whole test part in
time order (clicks going back as they happen) and compares each arm's AUC over HTTP with its offline AUC on the same
rows. Exit code 1 where they differ by more than 1e-6, or an answer was degraded.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
from local_stack import check_port_is_free, online, scores
from replay import compare, replay, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder written by `python -m training prepare`")
    parser.add_argument("--runs", type=Path, nargs=2, required=True, metavar="RUN", help="one of MIAN, one of STEC")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--out", type=Path, help="write every row's answer here (Parquet)")
    options = parser.parse_args()

    check_port_is_free(options.port)
    runs = {json.loads((run / "config.json").read_text())["run"]["model"]: run for run in options.runs}
    data = options.data.resolve()
    with TemporaryDirectory(prefix="clickserve-prove-") as temporary:
        folder = Path(temporary)
        with online(data, {arm: run.resolve() for arm, run in runs.items()}, folder, port=options.port):
            answered = replay(data, f"http://127.0.0.1:{options.port}")
        agreements = compare(answered, {arm: scores(folder, arm) for arm in runs})
    if options.out is not None:
        answered.write_parquet(options.out)
    degraded = answered.filter(pl.col("degraded") != "").height
    print(table(answered, agreements))
    print(f"{answered.height:,} rows in {answered['request'].n_unique():,} requests, {degraded:,} rows degraded")
    return 0 if degraded == 0 and all(agreement.holds for agreement in agreements) else 1


if __name__ == "__main__":
    sys.exit(main())
