"""A text file, line by line, packed with gzip or not: the first line that is wrong is told."""

from pathlib import Path

import polars as pl

from training.errors import UserError


def scan(file: Path) -> pl.LazyFrame:
    """The lines as they stand, as `row` (from 1 on) and `line`."""
    if not file.is_file():
        raise UserError(f"{file}: {'expected a file, found a folder' if file.is_dir() else 'no such file'}")
    rows = pl.scan_lines(file, row_index_name="row", row_index_offset=1, glob=False)
    try:
        empty = rows.head(1).collect().is_empty()
    except (pl.exceptions.PolarsError, OSError) as err:
        raise UserError(f"{file}: expected text in UTF-8 ({str(err).splitlines()[0]})") from err
    if empty:
        raise UserError(f"{file}, line 1: expected a row, got an empty file")
    return rows


def check(file: Path, rows: pl.LazyFrame, fine: pl.Expr, expected: str) -> None:
    """Raises UserError that tells the first line (columns `row` and `line`) that is not fine. Reads the whole file."""
    try:
        wrong = rows.filter(~fine).select("row", "line").head(1).collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as err:
        raise UserError(f"{file}: expected text in UTF-8, whole to the end ({str(err).splitlines()[0]})") from err
    if not wrong.is_empty():
        row, line = wrong.row(0)
        raise UserError(f"{file}, line {row}: expected {expected}, got {line!r:.120}")
