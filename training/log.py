"""One ad log as raw rows: what every data set becomes before it is encoded."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.schema import SchemaSpec
from training.errors import UserError

PARTS = ("train", "valid", "test")
RESERVED = ("user", "item", "ts", "label", "part", "group", "request", "id")
"""Column names with a meaning of their own; a field may not be called so, unless it is the key of that name."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """Impressions with their raw features, and the split.

    `rows` has the columns `user` and `item` (strings, null where there is none), `ts` (Unix seconds), `label` (0 or 1),
    `part` (one of PARTS), one column per declared field that is neither a key, a clock nor a sequence, and the `truth`
    columns, which no model sees. `files` are the raw files, for the data hash; `notes` go into dataset.json.
    """

    name: str
    source: Path
    spec: SchemaSpec
    rows: pl.DataFrame
    files: tuple[Path, ...]
    truth: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def complete(log: Log) -> pl.DataFrame:
    """The log's rows in time order (rows of one time as they came), with every declared field under its own name.

    Adds `group`, the user's number in the order of user ids (-1 without a user), and `request`: rows of one user and
    time, alike in every user and context field, are one request, so that whatever a model makes of the user holds for
    all of them. Refuses a log that nothing can be learned from or judged by.
    """
    for part in PARTS:
        labels = log.rows.filter(pl.col("part") == part)["label"]
        if labels.n_unique() != 2:
            what = "no rows" if labels.is_empty() else f"{labels.len()} rows, all with label {labels[0]}"
            raise UserError(f"{log.source}: the {part} part needs rows with label 0 and with label 1, it has {what}")
    keys = {"user": log.spec.user_key, "item": log.spec.item_key}
    constant = [f.name for f in log.spec.fields if f.group in ("user", "context") and f.kind != "time"]
    return (
        log.rows.sort("ts", maintain_order=True)
        .with_columns([pl.col(column).alias(field) for column, field in keys.items() if field is not None])
        .with_columns((pl.col("user").rank("dense").cast(pl.Int64) - 1).fill_null(-1).alias("group"))
        .with_row_index("row")
        .with_columns(pl.col("row").min().over("group", "ts", *constant).alias("first"))
        .with_columns((pl.when(pl.col("group") < 0).then("row").otherwise("first").rank("dense") - 1).alias("request"))
        .drop("row", "first")
    )


def write_parquet(table: pl.DataFrame, file: Path) -> None:
    """Raises UserError where the file cannot be written: a full disk is to polars a fault of the format."""
    try:
        table.write_parquet(file)
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
    for share in (valid + test, test):
        cut = min(round(len(ts) * (1 - share)), len(ts) - 1)
        parts[np.searchsorted(ts, ts[cut], side="left") :] += 1
    return pl.Series("part", np.array(PARTS)[parts])
