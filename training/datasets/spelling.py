"""One spelling of a value, whatever file it comes from: what is absent, and how numbers and booleans are written.

A file of text has no types. A column of it whose values are all numbers, as JSON writes them, is one of numbers, and
each is spelled as `models.features.values.canonical` spells it: 7003.0 is 7003, 9.50 is 9.5. True and False are 1 and
0, as they are in JSON and Parquet. With one word among the values, or one number with a leading zero, all stay text.
"""

import numpy as np
import polars as pl

from models.features.values import SPACE, canonical, null_numbers, null_texts

# JSON's numbers; of exponents only the form in which tables write them, as "61e5" may be the end of a hash.
NUMBER = r"^-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:e[+-][0-9]{2,3})?$"
BOOLEAN = r"^(?:True|False|true|false|TRUE|FALSE)$"
_INTEGER = r"^-?(?:0|[1-9][0-9]*)$"


def present(text: pl.Expr, null_values: tuple[str, ...]) -> pl.Expr:
    """Text that is not absent, else null; space around a null value does not count."""
    return pl.when(~text.str.strip_chars(SPACE).is_in(sorted(null_texts(null_values)))).then(text)


def present_number(number: pl.Expr, null_values: tuple[str, ...]) -> pl.Expr:
    absent = sorted(map(float, null_numbers(null_values)))
    numbers = number.fill_nan(None)
    return pl.when(~numbers.is_in(absent)).then(numbers) if absent else numbers


def is_number(text: pl.Expr) -> pl.Expr:
    """Whether text may be in a column of numbers: a number or a boolean."""
    stripped = text.str.strip_chars()
    return (stripped.str.contains(NUMBER) | stripped.str.contains(BOOLEAN)) & stripped.cast(
        pl.Float64, strict=False
    ).is_infinite().fill_null(value=False).not_()


def as_numbers(text: pl.Expr) -> pl.Expr:
    """The one spelling of text of which all `is_number`."""
    return text.map_batches(_spelled, return_dtype=pl.String, is_elementwise=True)


def as_text(values: pl.Expr, dtype: pl.DataType) -> pl.Expr | None:
    """The one spelling of a typed column; None for a type that has none."""
    if dtype == pl.String:
        return values
    if dtype in (pl.Categorical, pl.Enum):
        return values.cast(pl.String)
    if dtype == pl.Boolean:
        return values.cast(pl.Int8).cast(pl.String)
    if dtype.is_integer() or dtype == pl.Null:
        return values.cast(pl.String)
    if dtype.is_decimal():
        return as_numbers(values.cast(pl.String))
    if dtype.is_float():  # of a Float32 the shortest text that is the same number: 0.1, not 0.10000000149011612
        return as_numbers(values.fill_nan(None).cast(pl.String))
    return None


def to_number(values: pl.Expr, dtype: pl.DataType) -> pl.Expr | None:
    """A column as doubles, null where text is no number; None for a type that holds none."""
    if dtype == pl.String:
        stripped = values.str.strip_chars()
        lower = stripped.str.to_lowercase()
        truth = pl.when(lower == "true").then(1.0).when(lower == "false").then(0.0)
        return stripped.cast(pl.Float64, strict=False).fill_null(truth)
    if dtype == pl.Boolean:
        return values.cast(pl.Int8).cast(pl.Float64)
    if dtype.is_numeric() or dtype == pl.Null:
        return values.cast(pl.Float64)
    return None


def _spelled(series: pl.Series) -> pl.Series:
    text = series.str.strip_chars().str.replace(r"^(-?[0-9]{1,15})\.0+$", "$1")
    rest = text.filter(~text.str.contains(_INTEGER) | (text == "-0")).unique().drop_nulls()
    if rest.is_empty():
        return text
    return text.replace(rest, pl.Series([_one(value) for value in rest], dtype=pl.String))


def _one(text: str) -> str | None:
    if text.lower() in ("true", "false"):
        return canonical(text.lower() == "true")
    try:
        return canonical(int(text))
    except ValueError:
        return canonical(float(np.float64(text)))
