"""A large text file of columns without quotes: checked line by line, then read as needed, packed with gzip or not."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from training.datasets import text_lines
from training.errors import UserError


@dataclass(frozen=True)
class Form:
    """What a column's values look like: a regular expression, and the words for it."""

    pattern: str
    words: str


LABEL = Form("[01]", "0 or 1")


def header(file: Path) -> str:
    """The first line, without what an editor may have put around it. Raises UserError where there is none."""
    first: str = text_lines.scan(file).head(1).collect()["line"][0]
    return first.removeprefix("\ufeff").removesuffix("\r")


def read(file: Path, forms: Mapping[str, Form], *, separator: str, names: tuple[str, ...] = ()) -> pl.LazyFrame:
    """The named columns as text (null where empty) and `row`, the row's number from 0 on.

    `names` are all columns of a file that does not tell them in its first line. The whole file is read once to find
    the first line that is wrong: a UserError names it. A column may be anything where `forms` does not have it.
    """
    has_header = not names
    names = names or tuple(header(file).split(separator))
    missing = [name for name in forms if name not in names]
    if missing or len(set(names)) < len(names):
        expected = separator.join(forms) if missing else "different names"
        raise UserError(f"{file}, line 1: expected a header with {expected!r}, got {separator.join(names)!r:.200}")
    anything = f"[^{separator}]*"
    patterns = [forms[name].pattern if name in forms else anything for name in names]
    line = "^" + separator.join(f"(?:{pattern})" for pattern in patterns) + r"\r?$"
    wrong = _first_wrong(file, line, 1 if has_header else 0)
    if wrong is not None:
        number, cells = wrong[0], wrong[1].removesuffix("\r").split(separator)
        if len(cells) != len(names):
            raise UserError(f"{file}, line {number}: expected {len(names)} values, got {len(cells)}")
        column = next(
            n for n, (cell, pattern) in enumerate(zip(cells, patterns, strict=True)) if not re.fullmatch(pattern, cell)
        )
        expected = forms[names[column]].words
        raise UserError(
            f"{file}, line {number}, column {names[column]}: expected {expected}, got {cells[column]!r:.60}"
        )
    rows = pl.scan_csv(
        file,
        separator=separator,
        has_header=has_header,
        new_columns=list(names),
        infer_schema=False,
        quote_char=None,
        row_index_name="row",
        glob=False,
    )
    bare = pl.col(names[-1]).str.strip_suffix("\r")
    last = pl.when(bare != "").then(bare)  # `replace` would make polars hold the whole table
    return rows.with_columns(last).select("row", *forms)


def check_times(file: Path, rows: pl.LazyFrame, column: str, time: pl.Expr) -> None:
    """Raises UserError that tells the first row of a file with a header whose `time` is null, as of 30 February."""
    numbered = rows.select(pl.col("row") + 2, line=pl.col(column), fine=time.is_not_null())
    text_lines.check(file, numbered, pl.col("fine"), f"a time that there is in column {column}")


def _first_wrong(file: Path, form: str, after: int) -> tuple[int, str] | None:
    rows = text_lines.scan(file).filter(pl.col("row") > after)
    try:
        wrong = rows.filter(~pl.col("line").str.contains(form)).head(1).collect(engine="streaming")
        is_empty = wrong.is_empty() and rows.head(1).collect(engine="streaming").is_empty()
    except (pl.exceptions.PolarsError, OSError) as err:
        raise UserError(f"{file}: expected text in UTF-8, whole to the end ({str(err).splitlines()[0]})") from err
    if is_empty:
        raise UserError(f"{file}: expected rows below the header, the file ends there")
    return None if wrong.is_empty() else (int(wrong["row"][0]), str(wrong["line"][0]))
