"""Histories that come with a log: each row's past events, in the order of the one law of history."""

from collections.abc import Iterator

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.features.field import event_fields
from models.features.schema import SchemaSpec
from training.data.time_order import blocks
from training.log import PAST_ITEM, PAST_TS, past_name

Ints = NDArray[np.int64]


class Past:
    """The past events of a completed log's rows, each with its item's fields and its own.

    What the log does not say of an event's item is what the first row of the log with that item says. What an event
    had itself the log must say.
    """

    def __init__(self, rows: pl.LazyFrame, spec: SchemaSpec) -> None:
        self._rows = rows
        names = rows.collect_schema().names()
        fields = [f.name for f in spec.fields if f.group == "item" and f.name != spec.item_key]
        other = [name for name in fields if past_name(name) not in names]
        recorded = [name for name in fields if name not in other]
        self._recorded = [*recorded, *(f.name for f in event_fields(spec.fields))]
        known = rows.filter(pl.col("item").is_not_null()).group_by("item").agg(pl.col(other).first())
        self._items = known.collect(engine="streaming")
        self._key = spec.item_key

    @property
    def num_events(self) -> int:
        num = self._rows.select(pl.col(PAST_ITEM).list.len().cast(pl.Int64).sum()).collect(engine="streaming").item()
        return int(num)

    def windows(self) -> "Windows":
        return Windows()

    def events(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The events of these rows, row after row."""
        lists = [PAST_ITEM, PAST_TS, *map(past_name, self._recorded)]
        events = rows.filter(pl.col(PAST_ITEM).list.len() > 0).select("group", "user", *lists).explode(lists)
        named = {PAST_ITEM: "item", PAST_TS: "ts", **{past_name(name): name for name in self._recorded}}
        events = events.rename(named).join(self._items, on="item", how="left", maintain_order="left")
        return events if self._key is None else events.with_columns(pl.col("item").alias(self._key))

    def blocks(self) -> Iterator[pl.DataFrame]:
        """The events of all rows in their order."""
        for block in blocks(self._rows):
            yield self.events(block)


def values_of(name: str, rows: pl.LazyFrame) -> pl.LazyFrame:
    """A field's column of these rows, with their part; of a field that past events alone have, the column of those."""
    if name in rows.collect_schema().names():
        return rows.select("part", name)
    return rows.select("part", pl.col(past_name(name)).alias(name)).explode(name)


class Windows:
    """Each row's history as `start:end` into the events of all rows, asked for block after block."""

    def __init__(self) -> None:
        self._num = 0

    def __call__(self, rows: pl.DataFrame) -> tuple[Ints, Ints]:
        lengths = rows[PAST_ITEM].list.len().to_numpy().astype(np.int64)
        ends = self._num + np.cumsum(lengths)
        if len(ends):
            self._num = int(ends[-1])
        return ends - lengths, ends
