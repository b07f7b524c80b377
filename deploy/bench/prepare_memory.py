"""Peak memory of `python -m training prepare` on a log as CSV, and on the same rows as a folder of Parquet files.

    python deploy/bench/prepare_memory.py --out OUT [--rows 10_000_000]

The log has a million users, 50,000 ads, one click in 25 rows and twelve columns, 104 bytes a row as CSV; a row's past
clicks are made of it. It is written to OUT, as is what is prepared, and OUT may be deleted afterwards. The output has
the size of each source, and the highest resident memory and the seconds of its own process.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl

BLOCK = 500_000
NUM_USERS, NUM_ADS = 1_000_000, 50_000
DESCRIPTION = """\
label: click
user: user_id
item: ad_id
timestamp: at
history_length: 20
split: {by: time, valid: 0.1, test: 0.1}
fields:
  - {name: user_id, kind: categorical, group: user, min_count: 2}
  - {name: age, kind: numeric, group: user}
  - {name: city, kind: categorical, group: user}
  - {name: device, kind: categorical, group: context}
  - {name: site, kind: categorical, group: context}
  - {name: hour, kind: time, group: context, part: hour}
  - {name: ad_id, kind: categorical, group: item}
  - {name: category, kind: categorical, group: item}
  - {name: brand, kind: categorical, group: item}
  - {name: price, kind: numeric, group: item}
  - {name: tags, kind: multi, group: item}
  - {name: ad_id, kind: sequence, group: behaviour, of: ad_id}
  - {name: category, kind: sequence, group: behaviour, of: category}
  - {name: tags, kind: sequence, group: behaviour, of: tags}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=10_000_000)
    arguments = parser.parse_args()
    out: Path = arguments.out
    (out / "parts").mkdir(parents=True)
    write_log(out, arguments.rows)
    (out / "log.yaml").write_text(DESCRIPTION)
    for name in ("log.csv", "parts"):
        size = sum(file.stat().st_size for file in (out / name).rglob("*")) or (out / name).stat().st_size
        peak, took = prepared(out / name, out / "log.yaml", out / f"prepared {name}")
        print(f"{name}: {arguments.rows:,} rows, {size / 1e6:,.0f} MB: at most {peak / 1e6:,.0f} MB, {took:.0f} s")


def write_log(out: Path, num_rows: int) -> None:
    with (out / "log.csv").open("wb") as csv:
        for first in range(0, num_rows, BLOCK):
            rows = block_of(first, min(BLOCK, num_rows - first))
            csv.write(rows.write_csv(include_header=first == 0).encode())
            rows.write_parquet(out / "parts" / f"part-{first // BLOCK:05}.parquet")


def block_of(first: int, num: int) -> pl.DataFrame:
    """These rows of the log: half of them of users drawn evenly, half of few who are there often."""
    chance = np.random.default_rng(first)
    often = chance.zipf(1.3, num) * 7919 % NUM_USERS
    user = np.where(chance.random(num) < 0.5, chance.integers(0, NUM_USERS, num), often)
    ad = chance.zipf(1.2, num) % NUM_ADS
    numbers = pl.DataFrame({"user": user, "ad": ad, "site": chance.integers(0, 20_000, num)})
    return numbers.select(
        click=pl.Series(chance.random(num) < 0.04).cast(pl.Int8),
        user_id=pl.format("u{}", "user"),
        ad_id=pl.format("ad-{}", "ad"),
        at=pl.Series(1_700_000_000 + np.arange(first, first + num) // 4),
        category=pl.format("category {}", pl.col("ad") % 300),
        brand=pl.format("brand-{}", pl.col("ad") % 5000),
        price=pl.Series(np.exp(chance.normal(3, 1, num)).round(2)),
        device=pl.Series(np.array(["phone", "tablet", "desktop", "tv"])[chance.integers(0, 4, num)]),
        city=pl.format("city of {}", pl.col("user") % 700),
        site=pl.format("www.site-{}.example", "site"),
        age=18 + pl.col("user") % 60,
        tags=pl.format("t{}|t{}", pl.col("ad") % 97, pl.col("ad") % 89),
    )


def prepared(source: Path, description: Path, out: Path) -> tuple[int, float]:
    """The bytes of the highest resident memory of a `prepare`, and its seconds."""
    arguments = ["--schema", str(description), "--source", str(source), "--out", str(out)]
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "training", "prepare", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"prepare of {source} failed")
    return usage.ru_maxrss * 1024, time.perf_counter() - began


if __name__ == "__main__":
    main()
