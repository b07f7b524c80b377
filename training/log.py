"""One ad log as raw rows: what every data set becomes before it is encoded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.features.schema import SchemaSpec
from training.errors import UserError

PARTS = ("train", "valid", "test")
RESERVED = ("user", "item", "ts", "label", "weight", "part", "group", "request", "id")
"""Column names with a meaning of their own; a field may not be called so, unless it is the key of that name."""
PAST_ITEM, PAST_TS = " past item", " past ts"  # columns of a log that brings its histories: lists, newest last
ROW = " row"  # the number of a row, for a while: no field is called so, as a field's name begins with no space


@dataclass(frozen=True, kw_only=True)
class Log:
    """Impressions with their raw features, and the split.

    `rows` may be larger than memory; it is run through once. It has the columns `user` and `item` (strings, null where
    there is none), `ts` (Unix seconds), `label` (0 or 1), `part` (one of PARTS), one column per declared field that is
    neither a key, a clock nor a sequence, `weight` where rows have one, and the `truth` columns, which no model sees.
    `files` are the raw files, for the data hash; `notes` go into dataset.json. `unread` are columns that are there and
    that no field reads. `history` says which rows are a user's past: its clicks, or all that it was shown; the service
    keeps clicks only. Where `rows` have PAST_ITEM and PAST_TS, each row's history is those instead.
    """

    name: str
    source: Path
    spec: SchemaSpec
    rows: pl.LazyFrame
    files: tuple[Path, ...]
    truth: tuple[str, ...] = ()
    history: Literal["clicks", "impressions"] = "clicks"
    notes: tuple[str, ...] = ()
    negative_rate: float = 1.0
    """The share of the rows without a click that the log still has: what it predicts is corrected by it."""
    unread: tuple[str, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)
    """How many of what were left out, by what and why."""


def past_name(field: str) -> str:
    """The column that holds what a log says of its past events' items, beside PAST_ITEM and PAST_TS."""
    return f" past {field} of item"


def write_parquet(table: pl.DataFrame | pl.LazyFrame, file: Path) -> None:
    """Holds no more than a few blocks of a lazy table. Raises UserError where the file cannot be written.

    A full disk is to polars a fault of the format.
    """
    try:
        table.lazy().sink_parquet(file, engine="streaming")
    except pl.exceptions.PolarsError as err:
        raise UserError(f"cannot write {file}: {err}") from err


def check_ids(kind: str, used: pl.Series, file: Path, known: pl.Series, table: Path) -> None:
    """Raises UserError unless every id used in a log's `file` stands in its `table`, once."""
    if known.is_duplicated().any():
        raise UserError(f"{table}: holds {kind} {known.filter(known.is_duplicated())[0]} more than once")
    unknown = used.filter(~used.is_in(known.implode()))
    if unknown.len():
        raise UserError(f"{file}: holds {kind} {unknown[0]}, which is not in {table.name}")


def split_by_time(ts: NDArray[np.float64], *, valid: float, test: float) -> pl.Series:
    """The part of each row of a log in time order: the last `test` share of rows, the `valid` share before it.

    Rows of one time are never torn apart: a cut that falls among them moves back to the first of them.
    """
    parts = np.zeros(len(ts), dtype=np.int64)
    for first in cuts_in_time(ts, valid=valid, test=test):
        parts[np.searchsorted(ts, first, side="left") :] += 1
    return pl.Series("part", np.array(PARTS)[parts])


def cuts_in_time(ts: NDArray[np.float64], *, valid: float, test: float) -> tuple[float, float]:
    """The first time of the validation part and of the test part, of times in order."""
    first_valid, first_test = (
        float(ts[min(round(len(ts) * (1 - share)), len(ts) - 1)]) for share in (valid + test, test)
    )
    return first_valid, first_test


def split_by_number(row: pl.Expr, *, seed: int, valid: float, test: float) -> pl.Expr:
    """The part of each row by its number alone: the same in every run, version and size of block."""

    def parts(numbers: pl.Series) -> pl.Series:
        point = _mixed(numbers.to_numpy().astype(np.uint64), seed) / 2.0**64
        return pl.Series(np.array(PARTS)[(point < valid + test).astype(np.int64) + (point < test)])

    return row.map_batches(parts, return_dtype=pl.String, is_elementwise=True).alias("part")


def _mixed(numbers: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """splitmix64 (Steele et al. 2014): whole numbers to whole numbers that look drawn at random."""
    mixed: NDArray[np.uint64] = (numbers + np.uint64(seed % 2**32 << 32)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
