"""A log on its way through the disk: completed, in time order, and read block by block, however long it is."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import polars as pl

from training.errors import UserError
from training.log import PARTS, ROW, Log, write_parquet

BLOCK = 100_000  # rows in memory at once: about 30 MB of a table of 40 columns
BUCKET = 4 * BLOCK  # rows sorted at once, where a file is not in time order
_PLACE, _BUCKET, _FIRST = " place", " bucket", " first"  # columns for a while, as ROW is


def complete(log: Log, folder: Path) -> pl.LazyFrame:
    """The log's rows in time order (rows of one time as they came), with every declared field under its own name.

    Adds `group`, the user's number in the order of user ids (-1 without a user), and `request`: rows of one user and
    time, alike in every user and context field, are one request, so that whatever a model makes of the user holds for
    all of them. What it returns reads files in `folder`. Raises UserError for a log that nothing can be learned from
    or judged by.
    """
    folder.mkdir()
    write_parquet(log.rows, folder / "as it came.parquet")
    rows = pl.scan_parquet(folder / "as it came.parquet")
    _check_labels(log, rows)
    if not _is_in_time_order(rows):
        rows = _stored(_sorted(rows, folder), folder / "sorted")
    keys = {"user": log.spec.user_key, "item": log.spec.item_key}
    rows = rows.with_columns([pl.col(column).alias(field) for column, field in keys.items() if field is not None])
    users = rows.select(pl.col("user").drop_nulls().unique()).collect(engine="streaming")["user"].sort()
    if users.is_empty():
        return rows.with_row_index("request").with_columns(group=pl.lit(-1, dtype=pl.Int64))
    constant = [f.name for f in log.spec.fields if f.group in ("user", "context") and f.kind != "time"]
    constant += [name for name in rows.collect_schema().names() if name.startswith(" past ")]
    return _stored(_numbered(rows, users, constant), folder / "numbered")


def blocks(rows: pl.LazyFrame) -> Iterator[pl.DataFrame]:
    """The rows in order, BLOCK at a time; the last block is the rest."""
    first = 0
    while (block := rows.slice(first, BLOCK).collect(engine="streaming")).height:
        yield block
        first += BLOCK


def _check_labels(log: Log, rows: pl.LazyFrame) -> None:
    counts = rows.group_by("part", "label").len().collect(engine="streaming")
    for part in PARTS:
        mine = counts.filter(pl.col("part") == part)
        if mine.height != 2:
            num = int(mine["len"].sum())
            what = f"{num} rows, all with label {mine['label'][0]}" if num else "no rows"
            raise UserError(f"{log.source}: the {part} part needs rows with label 0 and with label 1, it has {what}")


def _is_in_time_order(rows: pl.LazyFrame) -> bool:
    latest = -np.inf
    for block in blocks(rows.select("ts")):
        ts = block["ts"].to_numpy()
        if ts[0] < latest or (ts[1:] < ts[:-1]).any():
            return False
        latest = ts[-1]
    return True


def _sorted(rows: pl.LazyFrame, folder: Path) -> Iterator[pl.DataFrame]:
    """Dealt to buckets by their place in time, on disk, then sorted bucket by bucket."""
    ts = rows.select("ts").collect(engine="streaming")["ts"].to_numpy()
    place = np.empty(len(ts), dtype=np.int64)
    place[np.argsort(ts, kind="stable")] = np.arange(len(ts))
    names = [folder / f"bucket {number}" for number in range(-(-len(ts) // BUCKET))]
    for name in names:
        name.mkdir()
    for number, block in enumerate(blocks(rows)):
        places = place[number * BLOCK : number * BLOCK + block.height]
        placed = block.with_columns(pl.Series(_PLACE, places), pl.Series(_BUCKET, places // BUCKET))
        for (bucket,), piece in placed.partition_by(_BUCKET, as_dict=True, include_key=False).items():
            write_parquet(piece, names[int(bucket)] / f"{number:06}.parquet")
    for name in names:
        yield pl.read_parquet(name / "*.parquet").sort(_PLACE).drop(_PLACE)


def _numbered(rows: pl.LazyFrame, users: pl.Series, constant: list[str]) -> Iterator[pl.DataFrame]:
    numbers = pl.int_range(len(users), dtype=pl.Int64, eager=True)
    num_requests = 0
    for run in _whole_times(rows):
        group = run["user"].replace_strict(users, numbers, default=-1).fill_null(-1)
        numbered = (
            run.with_columns(group.alias("group"))
            .with_row_index(ROW)
            .with_columns(pl.col(ROW).min().over("group", "ts", *constant).alias(_FIRST))
            .with_columns(pl.when(pl.col("group") < 0).then(ROW).otherwise(_FIRST).alias(_FIRST))
            .with_columns((pl.col(_FIRST).rank("dense") - 1 + num_requests).cast(pl.UInt32).alias("request"))
            .drop(ROW, _FIRST)
        )
        num_requests = int(numbered["request"].to_numpy().max()) + 1
        yield numbered


def _whole_times(rows: pl.LazyFrame) -> Iterator[pl.DataFrame]:
    """Blocks that tear no time apart, as rows of one request have one time."""
    rest: pl.DataFrame | None = None
    for block in blocks(rows):
        together = block if rest is None else pl.concat([rest, block])
        cut = int(together["ts"].search_sorted(together["ts"][-1], side="left"))
        if cut:
            yield together[:cut]
        rest = together[cut:]
    if rest is not None:
        yield rest


def _stored(tables: Iterable[pl.DataFrame], folder: Path) -> pl.LazyFrame:
    folder.mkdir()
    for number, table in enumerate(tables):
        write_parquet(table, folder / f"{number:06}.parquet")
    return pl.scan_parquet(folder / "*.parquet")
