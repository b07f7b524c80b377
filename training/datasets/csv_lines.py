"""The lines of a CSV file, checked before its columns are read: the first that is wrong is named.

What is read later would fill a line that is cut short with nothing, and take a quote inside a value for the beginning
of a record of several lines.
"""

import csv
import gzip
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from training.errors import UserError


def check(file: Path, delimiter: str, quote: str | None) -> tuple[tuple[str, ...], bool]:
    """The column names in its first line, and whether a record takes more than one line. Reads the whole file once."""
    try:
        return _check(file, delimiter, quote)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as err:
        where = _first_not_utf8(file)
        line = "" if where is None else f", line {where}"
        raise UserError(f"{file}{line}: expected a CSV file in UTF-8 ({str(err).splitlines()[0]})") from err


def _check(file: Path, delimiter: str, quote: str | None) -> tuple[tuple[str, ...], bool]:
    lines = pl.scan_lines(file, row_index_name="row", row_index_offset=1, glob=False)
    first = lines.head(1).collect()
    if first.is_empty():
        return (), False
    names = _names(file, first["line"][0].removeprefix("\ufeff").removesuffix("\r"), delimiter, quote)
    num, line = len(names), pl.col("line").str.strip_suffix("\r")
    has_num = (line.str.count_matches(delimiter, literal=True) == num - 1) & ((line != "") | (num == 1))
    if quote is None:
        fine = has_num
    else:
        quoted = line.str.contains(_record(delimiter, quote, num))
        fine = pl.when(line.str.contains(quote, literal=True)).then(quoted).otherwise(has_num)
    wrong = lines.filter((pl.col("row") > 1) & ~fine).head(1).collect(engine="streaming")
    if wrong.is_empty():
        return names, False
    row, text = wrong["row"][0], wrong["line"][0].removesuffix("\r")
    if quote is None or quote not in text:
        got = len(text.split(delimiter)) if text else 0
        raise UserError(f"{file}, line {row}: expected {num} values, got {got}")
    _check_records(file, lines.filter(pl.col("row") > 1).select(line), delimiter, quote, num)
    return names, True


def _names(file: Path, line: str, delimiter: str, quote: str | None) -> tuple[str, ...]:
    try:
        names = line.split(delimiter)
        if quote is not None:
            names = next(csv.reader([line], delimiter=delimiter, quotechar=quote, strict=True), [])
    except csv.Error as err:
        raise UserError(f"{file}, line 1: expected column names, {err}, got {line!r:.120}") from err
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise UserError(f"{file}: expected different column names, got {repeated[0]!r} more than once")
    return tuple(names)


def _check_records(file: Path, lines: pl.LazyFrame, delimiter: str, quote: str, num: int) -> None:
    """One record after the other, as some take several lines."""
    record = re.compile(_record(delimiter, quote, num))
    last_text = ""

    def texts() -> Iterator[str]:
        nonlocal last_text
        for batch in lines.collect_batches(maintain_order=True):
            for text in batch["line"]:
                last_text = text
                yield text + "\n"

    reader = csv.reader(texts(), delimiter=delimiter, quotechar=quote, strict=True)
    before = 0
    try:
        for values in reader:
            is_short = reader.line_num == before + 1
            if is_short and len(values) == num and quote in last_text and not record.search(last_text):
                raise UserError(
                    f"{file}, line {reader.line_num + 1}: expected quotes around the value and doubled inside it,"
                    f" got a quote in the middle of one ({_value_with(values, quote)!r:.60});"
                    " `quote: none` takes quotes as they are"
                )
            if len(values) != num:
                raise UserError(f"{file}, line {before + 2}: expected {num} values, got {len(values)}")
            before = reader.line_num
    except csv.Error as err:
        raise UserError(
            f"{file}, line {before + 2}: expected CSV, {err}; is a quote open? `quote: none` takes quotes as they are"
        ) from err


def _record(delimiter: str, quote: str, num: int) -> str:
    q, d = re.escape(quote), re.escape(delimiter)
    value = f"(?:{q}(?:[^{q}]|{q}{q})*{q}|[^{q}{d}]*)"
    return f"^{value}(?:{d}{value}){{{num - 1}}}$"


def _value_with(values: list[str], quote: str) -> str:
    return next((value for value in values if quote in value), values[0])


def _first_not_utf8(file: Path) -> int | None:
    """The number of the first line that is no UTF-8; None where that cannot be told."""
    try:
        with file.open("rb") as raw:
            is_packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(file) if is_packed else file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError:
                    return number
    except (OSError, EOFError):
        pass
    return None
