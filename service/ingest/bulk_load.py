"""From Parquet files of any size into the store: past clicks, and the raw features of users and items.

Clicks are checked and, unless they are few, cut into parts by their users on disk (partitions.py). Then one part after
the other is ordered, packed and merged into the store, so that each user's past is written once.
"""

import asyncio
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import polars as pl

from models.features.values import Row
from service.errors import LoadError
from service.ids import MAX_AHEAD_S
from service.ingest import partitions
from service.ingest.click_log import ClickLog
from service.ingest.parquet_rows import ROW, ParquetRows
from service.store.click_table import ClickTable, Column
from service.store.codec import RECORD_TAG_BYTES, present, record_tag
from service.store.feature_store import FeatureStore

T = TypeVar("T")

_ROWS_A_BLOCK = 250_000
_FEATURES_A_BLOCK = 50_000
_FEATURES_AT_ONCE = 1000
_TAG = " tag"


async def load_behaviours(
    path: Path,
    store: FeatureStore,
    now: Callable[[], float] = time.time,
    *,
    store_name: str = "",
    resume: bool = False,
    max_per_s: float | None = None,
) -> int:
    """Merge a file's clicks into their users' pasts; returns how many are new and among those kept.

    Columns `user`, `item`, `ts` (Unix seconds, or a Parquet time, which is UTC where it names no zone); if there is a
    `type` (click or impression) or a `label` (1 or 0), only its clicks count. As of events, clicks more than 300 s
    ahead of now are not taken, and are counted on stderr. A click is known by its user, item, time, and `event_id`, or
    without that by how many such stand before it, so loading a file again changes nothing. Further columns are features
    of the click; those of its item that the file does not bring are taken as stored now.

    All rows are checked before the first is sent. `resume` goes on with an interrupted load of the same file into the
    store of that name. At most `max_per_s` clicks a second are sent.
    """
    rows = ParquetRows(path)
    log = ClickLog(rows, latest=now() + MAX_AHEAD_S)
    loading = _Loading(log, store, max_per_s)
    if log.num_clicks <= partitions.ROWS_A_PART:
        clicks = list(log.blocks(_ROWS_A_BLOCK))
        progress = _Progress("clicks", sum(block.height for block in clicks))
        if progress.total:
            await loading.merge(pl.concat(clicks))
            progress.add(progress.total)
        return loading.end()
    with partitions.opened(_folder(rows, store_name), log.num_clicks, resume=resume) as parts:
        if parts.is_complete:
            print(f"{parts.num_done} of {parts.num_clicks} clicks are in the store: going on", file=sys.stderr)
        else:
            if resume:
                print("no interrupted load of this file into this store: beginning anew", file=sys.stderr)
            progress = _Progress("rows read", rows.num_rows)
            for block in log.blocks(_ROWS_A_BLOCK):
                parts.add(block)
                progress.add(min(_ROWS_A_BLOCK, rows.num_rows - progress.done))
                await asyncio.sleep(0)  # a cancellation comes in here
            parts.complete()
        progress = _Progress("clicks", parts.num_clicks, done=parts.num_done)
        try:
            for clicks_of_part, size in parts.parts(shrink=loading.newest):
                await loading.merge(clicks_of_part)
                progress.add(size)
        except BaseException:
            print(
                f"{progress.done} of {progress.total} clicks are in the store; the same command with --resume goes on",
                file=sys.stderr,
            )
            raise
    return loading.end()


def _folder(rows: ParquetRows, store_name: str) -> Path:
    """Where the parts of a load stand: another one for other content and for another store."""
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in rows.files]
    name = hashlib.blake2b(repr((str(rows.path.resolve()), facts, store_name)).encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"clickserve-load-{name}"


class _Loading:
    """Clicks on their way into a store, and what became of them."""

    def __init__(self, log: ClickLog, store: FeatureStore, max_per_s: float | None) -> None:
        self._store = store
        self._features = log.features
        self._has_event_ids = "event_id" in log.ids
        self._max_per_s = max_per_s
        self._path = log.path
        self._num_new = 0
        self._num_unreadable = 0

    async def merge(self, clicks: pl.DataFrame) -> None:
        for new in await self._store.merge(self._table(self._ordered(clicks)), max_per_s=self._max_per_s):
            if new is None:
                self._num_unreadable += 1
            else:
                self._num_new += new

    def newest(self, clicks: pl.DataFrame) -> pl.DataFrame:
        """The clicks of each user that can be kept."""
        ordered = self._ordered(clicks)
        counts = ordered["user"].rle().struct.field("len").to_numpy()
        from_end = np.repeat(np.cumsum(counts), counts) - np.arange(ordered.height)
        return ordered.filter(from_end <= self._store.max_clicks).select(clicks.columns)

    def end(self) -> int:
        """How many clicks are new. Raises LoadError where users were left out."""
        if self._num_unreadable:
            raise LoadError(
                f"{self._path}: {self._num_unreadable} users have pasts in the store of a newer layout, or of somebody "
                f"else: they were left as they are; the others are loaded, {self._num_new} clicks are new"
            )
        return self._num_new

    def _ordered(self, clicks: pl.DataFrame) -> pl.DataFrame:
        """In the order of pasts, without repetitions."""
        if not self._has_event_ids:
            return clicks.sort("user", "ts", "item", maintain_order=True)
        tags = pl.Series(_TAG, [record_tag(event_id) for event_id in clicks["event_id"].to_list()], dtype=pl.Binary)
        ordered = clicks.with_columns(tags).sort("user", "ts", "item", _TAG, maintain_order=True)
        return ordered.unique(["user", "ts", "item", _TAG], keep="first", maintain_order=True)

    def _table(self, clicks: pl.DataFrame) -> ClickTable:
        users = clicks["user"].rle()
        if self._has_event_ids:
            tags = np.frombuffer(b"".join(clicks[_TAG].to_list()), np.uint8).reshape(-1, RECORD_TAG_BYTES)
        else:
            tags = _occurrences(clicks)
        return ClickTable(
            users=users.struct.field("value").to_list(),
            ends=np.cumsum(users.struct.field("len").to_numpy(), dtype=np.int64),
            items=_column(clicks, ["item"], _items),
            ts=clicks["ts"].to_numpy(),
            tags=tags,
            features=_column(clicks, self._features, _rows),
        )


def _occurrences(clicks: pl.DataFrame) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """How many clicks of the same user, item and time stand before each, as a tag."""
    columns = [pl.col(name) for name in ("user", "ts", "item")]
    is_first = clicks.select(pl.any_horizontal(c.ne_missing(c.shift()) for c in columns)).to_series().to_numpy().copy()
    is_first[:1] = True
    starts = np.flatnonzero(is_first)
    occurrences = np.arange(clicks.height) - np.repeat(starts, np.diff(starts, append=clicks.height))
    return occurrences.astype(">u4").view(np.uint8).reshape(-1, 4)[:, -RECORD_TAG_BYTES:]


def _column(clicks: pl.DataFrame, names: list[str], values: Callable[[pl.DataFrame], Sequence[T]]) -> Column[T]:
    """What each click has in these columns, as one of the distinct ones."""
    if not names:
        return Column(values=values(clicks.select()), positions=np.zeros(clicks.height, np.int64))
    distinct = clicks.with_row_index(ROW).group_by(names, maintain_order=True).agg(ROW)
    positions = np.empty(clicks.height, np.int64)
    counts = distinct[ROW].list.len().to_numpy()
    positions[distinct[ROW].explode().to_numpy()] = np.repeat(np.arange(distinct.height), counts)
    return Column(values=values(distinct.drop(ROW)), positions=positions)


def _items(distinct: pl.DataFrame) -> list[str]:
    items: list[str] = distinct["item"].to_list()
    return items


def _rows(distinct: pl.DataFrame) -> list[Row]:
    return [present(row) for row in distinct.iter_rows(named=True)] if distinct.width else [{}]


async def load_features(kind: Literal["users", "items"], path: Path, store: FeatureStore) -> int:
    """Put a file's rows as users' or items' features; returns how many.

    The id is the column `user` or `item`, or else the first; every other column is a feature.
    """
    rows = ParquetRows(path)
    name = kind.removesuffix("s")
    key = name if name in rows.schema else next(iter(rows.schema))
    features = [column for column in rows.schema if column != key]
    put = store.put_users if kind == "users" else store.put_items
    progress = _Progress(kind, rows.num_rows)
    for block in rows.blocks(_FEATURES_A_BLOCK):
        ids = rows.ids(block, key)
        rows.check_features(block, features)
        values = _rows(block.select(features)) if features else [{}] * block.height
        for start in range(0, block.height, _FEATURES_AT_ONCE):
            some = slice(start, start + _FEATURES_AT_ONCE)
            await put(dict(zip(ids[some], values[some], strict=True)))
        progress.add(block.height)
    return rows.num_rows


class _Progress:
    """How far a load is, told on stderr."""

    def __init__(self, what: str, total: int, *, done: int = 0) -> None:
        self.total = total
        self.done = done
        self._what = what
        self._done_before = done
        self._told = done
        self._started = time.monotonic()

    def add(self, number: int) -> None:
        """On a terminal the line of before is written over; elsewhere there is one each tenth."""
        self.done += number
        is_tenth = self.done * 10 // self.total > self._told * 10 // self.total
        if not (is_tenth or self.done == self.total or sys.stderr.isatty()):
            return
        self._told = self.done
        rate = (self.done - self._done_before) / max(time.monotonic() - self._started, 1e-9)
        end = "\r" if sys.stderr.isatty() and self.done < self.total else "\n"
        print(f"{self.done} of {self.total} {self._what}, {rate:.0f} a second", end=end, file=sys.stderr, flush=True)
