"""One CSV or Parquet file, column by column; what is wrong in it is told by file, line and column."""

import csv
import math
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from models.features.values import canonical
from training.errors import UserError

LATEST_S = 1e11  # the year 5138: anything above is milliseconds


class Table:
    """A file whose columns are asked for by meaning. Raises UserError for what is not there or not so."""

    def __init__(self, file: Path, delimiter: str = ",") -> None:
        self.file = file
        self._is_csv = file.suffix != ".parquet"
        if not file.is_file():
            raise UserError(f"{file}: {'expected a file, found a folder' if file.is_dir() else 'no such file'}")
        try:
            self._raw = _read_csv(file, delimiter) if self._is_csv else pl.read_parquet(file)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, UnicodeDecodeError, OSError) as err:
            what = "CSV file in UTF-8" if self._is_csv else "Parquet file"
            raise UserError(f"{file}: expected a {what} ({str(err).splitlines()[0]})") from err
        if self._raw.height == 0:
            raise UserError(f"{file}: expected rows, the file holds none")

    def text(self, name: str) -> pl.Series:
        """Ids or categories, each value in its one spelling; an empty one is absent."""
        if self._column(name).dtype == pl.String:
            return self._column(name).replace({"": None})
        return self._convert(name, canonical, pl.String, "strings or numbers")

    def lists(self, name: str, separator: str) -> pl.Series:
        """Several values in each row: a list column, or text parted by `separator`."""

        def values(raw: Any) -> list[str | None]:
            parts = raw.split(separator) if isinstance(raw, str) else raw or ()
            return [spelling for part in parts if (spelling := canonical(part)) is not None]

        return self._convert(name, values, pl.List(pl.String), f"lists, or text parted by {separator!r}")

    def numbers(self, name: str) -> pl.Series:
        """Doubles; an empty one is absent."""
        return self._convert(name, _number, pl.Float64, "finite numbers")

    def labels(self, name: str) -> pl.Series:
        return self._convert(name, _label, pl.Int8, "0 or 1")

    def seconds(self, name: str) -> pl.Series:
        """Unix seconds."""
        return self._convert(name, _seconds, pl.Float64, "Unix seconds or an ISO 8601 time")

    def _column(self, name: str) -> pl.Series:
        if name not in self._raw.columns:
            raise UserError(f"{self.file}: no column {name}; there are {', '.join(self._raw.columns)}")
        return self._raw[name]

    def _convert(self, name: str, convert: Callable[[Any], Any], dtype: Any, expected: str) -> pl.Series:
        # Each different value is converted once: a column has far fewer of them than rows.
        column = self._column(name)
        known: dict[Any, Any] = {}
        values = column.to_list()
        for row, raw in enumerate(values):
            key = tuple(raw) if isinstance(raw, list) else raw
            try:
                if key not in known:
                    known[key] = convert(raw)
            except (ValueError, TypeError, KeyError) as err:
                where = f"line {row + 2}" if self._is_csv else f"row {row + 1}"
                raise UserError(f"{self.file}, {where}, column {name}: expected {expected}, got {raw!r:.80}") from err
            values[row] = known[key]
        return pl.Series(name, values, dtype=dtype)


def _read_csv(file: Path, delimiter: str) -> pl.DataFrame:
    with file.open(encoding="utf-8", newline="") as text:
        lines = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(lines, [])
            repeated = [name for name, times in Counter(header).items() if times > 1]
            if repeated:
                raise UserError(f"{file}: expected different column names, got {repeated[0]!r} more than once")
            for line in lines:
                if len(line) != len(header):  # polars would fill a truncated line with nothing, silently
                    raise UserError(f"{file}, line {lines.line_num}: expected {len(header)} values, got {len(line)}")
        except csv.Error as err:
            raise UserError(f"{file}, line {lines.line_num}: expected CSV, {err}") from err
    return pl.read_csv(file, separator=delimiter, infer_schema=False) if header else pl.DataFrame()


def _number(raw: Any) -> float | None:
    if raw is None or raw == "":
        return None
    number = float(raw)
    if math.isinf(number):
        raise ValueError(raw)
    return None if math.isnan(number) else number


def _label(raw: Any) -> int:
    return {0.0: 0, 1.0: 1}[float(raw)]


def _seconds(raw: Any) -> float:
    time = raw if isinstance(raw, datetime) else _iso(raw)
    seconds = float(raw) if time is None else (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    if not abs(seconds) <= LATEST_S:  # this way round, NaN fails too
        raise ValueError(raw)
    return seconds


def _iso(raw: Any) -> datetime | None:
    try:
        float(raw)
    except ValueError:
        return datetime.fromisoformat(raw)
    return None
