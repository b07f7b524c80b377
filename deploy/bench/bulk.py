"""Benchmark of the bulk load: clicks a second, processor time and peak memory, into a server that it starts.

Clicks are drawn (items by a power law, three features that an item decides), written as a folder of Parquet files of a
million rows, and loaded twice: into an empty store, and again.

    python deploy/bench/bulk.py --clicks 10000000 --users 200000 --features 3
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import redis

from service.store import local_server

CLICKS_A_FILE = 1_000_000
ITEMS = 50_000


def write(folder: Path, *, clicks: int, users: int, features: int) -> None:
    draw = np.random.default_rng(1)
    for start in range(0, clicks, CLICKS_A_FILE):
        size = min(CLICKS_A_FILE, clicks - start)
        item = draw.zipf(1.3, size) % ITEMS
        ts = 1_700_000_000 + np.sort(draw.integers(start, start + size, size)) * 0.1
        columns = {"user": draw.integers(0, users, size), "item": item, "ts": ts}
        values = {
            "brand": pl.Series([f"brand {n}" for n in range(500)]).gather(item % 500),
            "category": pl.Series([f"category {n}" for n in range(50)]).gather(item % 50),
            "price": np.round(item % 997 * 1.37, 2),
        }
        rows = pl.DataFrame(columns | dict(list(values.items())[:features]))
        rows.write_parquet(folder / f"{start // CLICKS_A_FILE:04d}.parquet")


def load(folder: Path, url: str, clicks: int) -> str:
    started = time.monotonic()
    command = [sys.executable, "-m", "service", "load-behaviours", str(folder)]
    with subprocess.Popen(command, env=os.environ | {"CLICKSERVE_REDIS_URL": url}, stderr=subprocess.DEVNULL) as loader:
        _, status, usage = os.wait4(loader.pid, 0)
        loader.returncode = os.waitstatus_to_exitcode(status)
    took = time.monotonic() - started
    if loader.returncode:
        sys.exit(f"the load ended with {loader.returncode}")
    return (
        f"{clicks / took:,.0f} clicks/s ({took:.1f} s; the loader's processor time "
        f"{usage.ru_utime + usage.ru_stime:.1f} s), peak memory {usage.ru_maxrss / 1024:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clicks", type=int, default=10_000_000)
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--features", type=int, choices=range(4), default=0)
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary, local_server.start() as server:
        folder = Path(temporary)
        write(folder, clicks=arguments.clicks, users=arguments.users, features=arguments.features)
        for what in ("into an empty store", "again"):
            print(f"{what}: {load(folder, server.url, arguments.clicks)}", flush=True)
        with redis.Redis.from_url(server.url) as client:
            facts = client.info()
            print(
                f"server: {facts['used_memory'] / 2**20:.0f} MB, "
                f"processor time {facts['used_cpu_user'] + facts['used_cpu_sys']:.1f} s"
            )


if __name__ == "__main__":
    main()
