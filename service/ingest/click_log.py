"""Click log: the clicks of Parquet rows, each checked, in the store's units."""

import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import polars as pl

from service.errors import LoadError
from service.ids import MAX_AHEAD_S, YEAR_10000
from service.ingest.parquet_rows import ROW, ParquetRows

_YEAR_1990 = 631_152_000  # before it a number is a date such as 20240101, or a row's number
_LABELS = ("click", "clicked", "clk", "is_click", "target")  # what others call a label


class ClickLog:
    """Clicks with the columns `user`, `item` (text), `ts` (tenths of a millisecond), perhaps `event_id`, and features.

    If there is a `type` (click or impression) or a `label` (1 or 0), only the rows of clicks are. What is later than
    `latest` (Unix seconds) is left out and counted.
    """

    def __init__(self, rows: ParquetRows, *, latest: float) -> None:
        """Raises LoadError for columns that are no clicks'."""
        self._rows = rows
        self.path = rows.path
        self._latest = latest
        for name in ("user", "item", "ts"):
            if name not in rows.schema:
                raise LoadError(f"{rows.path}: no column {name}; there are {', '.join(rows.schema)}")
        self._check_time()
        is_click = self._is_click()
        self._is_click_or_all = pl.lit(value=True) if is_click is None else is_click
        self.num_clicks = rows.num_rows if is_click is None else int(self._ask(is_click.sum()))
        self.ids = [name for name in ("user", "item", "event_id") if name in rows.schema]
        self.features = [name for name in rows.schema if name not in (*self.ids, "ts", *self._kinds)]
        self._num_ahead = 0
        self._first_ahead: tuple[int, float] | None = None

    def blocks(self, num_rows: int) -> Iterator[pl.DataFrame]:
        """All clicks, of so many rows at a time. Raises LoadError for a row that is wrong, and where all are ahead."""
        self._num_ahead, self._first_ahead = 0, None
        for rows in self._rows.blocks(num_rows):
            block = self._of_the_past(self._timed(rows.filter(self._is_click_or_all)))
            ids = [self._rows.ids(block, name) for name in self.ids]
            self._check_times(block)
            self._rows.check_features(block, self.features)
            ts = (pl.col("ts") * 1e4).round(mode="half_to_even").cast(pl.Int64)
            yield block.select(*ids, ts, *self.features)
        self._report()

    def _check_time(self) -> None:
        dtype = self._rows.schema["ts"]
        if dtype == pl.Float32:
            raise LoadError(
                f"{self.path}: column ts: expected Unix seconds, got Float32, which holds them to two minutes only"
            )
        if not (dtype.is_numeric() or isinstance(dtype, pl.Datetime | pl.Date)):
            raise LoadError(f"{self.path}: column ts: expected Unix seconds or a Parquet time, got {dtype}")

    def _timed(self, block: pl.DataFrame) -> pl.DataFrame:
        """With `ts` in Unix seconds."""
        if block["ts"].dtype.is_numeric():
            return block
        return block.with_columns(pl.col("ts").cast(pl.Datetime("us")).dt.epoch("us").cast(pl.Float64) / 1e6)

    @property
    def _kinds(self) -> list[str]:
        return [name for name in ("type", "label") if name in self._rows.schema]

    def _is_click(self) -> pl.Expr | None:
        """None where all rows are clicks."""
        schema, path = self._rows.schema, self.path
        is_click = None
        if "type" in schema:
            kind = pl.col("type").cast(pl.String)
            is_other = kind.is_in(["click", "impression"]).not_().fill_null(value=True)
            others = self._ask(kind.filter(is_other).unique().implode())
            if len(others):
                odd = min(str(other) for other in others)
                raise LoadError(
                    f"{path}: column type: expected click or impression, got {odd}; call a feature otherwise"
                )
            is_click = kind == "click"
        clicks = pl.lit(value=True) if is_click is None else is_click
        labels = [name for name in (*_LABELS, "label") if name in schema and _may_be_label(schema[name])]
        questions = [_is_label(name).filter(clicks).all().alias(name) for name in labels]
        found = self._ask(pl.struct(questions)) if questions else {}
        for name in _LABELS:
            if found.get(name):
                raise LoadError(
                    f"{path}: column {name} holds 0 and 1 alone: "
                    "call it label, so that only clicks count, or leave it out"
                )
        if "label" not in schema:
            return is_click
        if not found.get("label"):
            is_label = _is_label("label") if "label" in found else pl.lit(value=False)
            strange = self._ask(pl.col("label").filter(clicks & ~is_label).head(1).implode())
            raise LoadError(
                f"{path}: column label: expected 0 or 1 in every row, got {strange[0]!r}; call a feature otherwise"
            )
        return clicks & (pl.col("label").cast(pl.Float64) == 1)

    def _ask(self, question: pl.Expr) -> Any:
        """What is to be known of all rows."""
        with self._rows.reading():
            return self._rows.scan.select(question).collect(engine="streaming").item()

    def _of_the_past(self, block: pl.DataFrame) -> pl.DataFrame:
        # What is later still is refused with its row.
        is_ahead = ((pl.col("ts") > self._latest) & (pl.col("ts") < YEAR_10000)).fill_null(value=False)
        ahead = block.filter(is_ahead)
        if ahead.height == 0:
            return block
        self._num_ahead += ahead.height
        if self._first_ahead is None:
            self._first_ahead = ahead.select(ROW, "ts").row(0)
        return block.filter(~is_ahead)

    def _check_times(self, block: pl.DataFrame) -> None:
        is_time = (pl.col("ts") >= _YEAR_1990) & (pl.col("ts") < YEAR_10000)  # to polars NaN is the largest number
        wrong = block.filter(~is_time.fill_null(value=False)).head(1)
        for row, ts in wrong.select(ROW, "ts").iter_rows():
            raise LoadError(f"{self.path}: row {row}: ts: expected Unix seconds from 1990 on, got {ts}")

    def _report(self) -> None:
        """What was ahead of now."""
        if self._first_ahead is None:
            return
        row, ts = self._first_ahead
        text = datetime.fromtimestamp(ts, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        what = (
            f"{self._num_ahead} of {self.num_clicks} clicks are more than {MAX_AHEAD_S:g} s ahead of now, "
            f"the first in row {row}"
        )
        if self._num_ahead == self.num_clicks:
            raise LoadError(
                f"{self.path}: {what} ({text}); are these local times? write them as UTC or with their zone"
            )
        print(f"{self.path}: {what} ({text}): not loaded; are these local times?", file=sys.stderr)


def _may_be_label(dtype: pl.DataType) -> bool:
    return dtype.is_numeric() or dtype == pl.Boolean


def _is_label(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.Float64).is_in([0.0, 1.0]).fill_null(value=False)
