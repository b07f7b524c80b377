"""Several values in one text: parted by a separator, or written as a list in brackets."""

import ast
import json
import re
from functools import partial

import polars as pl

from models.features.values import canonical
from training.datasets.spelling import BOOLEAN, NUMBER

_ITEM = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s,'"\[\]{}]+)"""
_LIST = rf"^\[\s*(?:{_ITEM}(?:\s*,\s*{_ITEM})*\s*,?\s*)?\]$"
EXPECTED = "a list such as ['a', 'b'] or text parted by {!r}"


def is_bracketed(text: pl.Expr) -> pl.Expr:
    stripped = text.str.strip_chars()
    return stripped.str.contains(r"^\[.*\]$|^\{.*\}$")


def is_list(text: pl.Expr) -> pl.Expr:
    """Whether text in brackets is a list as Python, JSON or an engine such as Spark writes it.

    That of numpy, with nothing but space between the values, is none, nor is a database's in braces.
    """
    return text.str.strip_chars().str.contains(_LIST)


def bracketed(text: pl.Expr, *, keep_absent: bool = False) -> pl.Expr:
    """The values of texts that are lists in brackets, spelled; null for any other text.

    An absent value is left out, or with `keep_absent` null.
    """
    parsed = partial(_parsed, keep_absent=keep_absent)
    return text.map_batches(parsed, return_dtype=pl.List(pl.String), is_elementwise=True)


def _parsed(series: pl.Series, *, keep_absent: bool) -> pl.Series:
    texts = series.str.strip_chars()
    is_one = texts.str.contains(_LIST).fill_null(value=False)
    known = {text: _values(text, keep_absent=keep_absent) for text in texts.filter(is_one).unique()}
    return pl.Series([known.get(text) for text in texts], dtype=pl.List(pl.String))


def _values(text: str, *, keep_absent: bool) -> list[str | None]:
    values = [_value(item) for item in re.findall(_ITEM, text[1:-1])]
    return [value for value in values if keep_absent or value is not None]


def _value(item: str) -> str | None:
    if item[0] in "'\"":
        return canonical(_unquoted(item))
    if item in ("None", "null", "NULL", "nan", "NaN"):
        return None
    if re.match(BOOLEAN, item):
        return canonical(item.lower() == "true")
    if re.match(NUMBER, item):
        return canonical(json.loads(item))
    return item


def _unquoted(item: str) -> str:
    """The text in quotes: by JSON's escapes, else by Python's, which writes double quotes around an apostrophe."""
    for read in (json.loads, ast.literal_eval):
        try:
            text: str = read(item)
        except (ValueError, SyntaxError):
            continue
        return text
    return item[1:-1]
