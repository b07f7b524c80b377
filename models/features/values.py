"""Raw values: their types, the one spelling of each, the buckets of numbers, and how often each was seen."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

NULL_VALUES = ("", "NULL", "\\N", "nan", "NaN", "None")
"""What tables write for an absent value, unless a data set names other spellings."""
SPACE = "".join(filter(str.isspace, map(chr, range(0x3001))))
"""The characters around a null spelling that do not count."""

Discretise = Literal["log_square", "ln_square_plus_one", "winners"]
Transform = Literal["none", "log", "quantile"]

Value = str | int | float | bool | None | Sequence[str | int | float | bool | None]
Row = Mapping[str, Value]
"""The raw values of one user, context or candidate, by field name; an absent key and None mean the same."""
Column = Sequence[Value] | NDArray[Any]
Columns = Mapping[str, Column]
"""Raw values of many rows: one column per field name, all of one length."""


class SchemaError(ValueError):
    """A schema that contradicts itself, or columns it cannot be fitted on."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """A column told by its different raw values and how often each stands in it: all that a fit asks of it.

    A value may stand in `values` more than once. Of kind multi they are the lists' members, and `most_values` is the
    length of the longest list.
    """

    values: Sequence[Any]
    counts: Sequence[int] | NDArray[np.int64]
    most_values: int = 1


def canonical(value: Value) -> str | None:
    """The one spelling of a raw categorical value; None where it is absent.

    42, 42.0 and "42" are the same value, as JSON clients and CSV files do not agree on types; so are True, 1 and "1".
    Text is taken as it is, space and Unicode form included ("42.0" is not 42). The empty string and NaN are absent.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool | int | np.integer | np.bool_):
        return str(int(value))
    if isinstance(value, float | np.floating):
        if math.isnan(value):
            return None
        return str(int(value)) if float(value).is_integer() else repr(float(value))
    raise TypeError(f"expected a string or a number, got {type(value).__name__}")


@lru_cache
def null_numbers(null_values: tuple[str, ...]) -> frozenset[int | float]:
    """Those of the null spellings that are numbers as JSON writes them, such as -1."""
    numbers = set()
    for text in null_values:
        with suppress(ValueError, OverflowError):
            number = json.loads(text)
            if type(number) in (int, float) and math.isfinite(number):
                numbers.add(number)
    return frozenset(numbers)


@lru_cache
def null_texts(null_values: tuple[str, ...]) -> frozenset[str]:
    """The null spellings, with the one spelling of each number among them: 1.0 makes 1 absent, too."""
    return frozenset(null_values) | {str(canonical(number)) for number in null_numbers(null_values)}


def is_null_text(text: str, null_values: tuple[str, ...]) -> bool:
    """Whether text stands for no value; space around it does not count."""
    return text.strip(SPACE) in null_texts(null_values)


def without_nulls(numbers: NDArray[np.float64], null_values: tuple[str, ...]) -> NDArray[np.float64]:
    """The numbers, with NaN in the place of null values."""
    absent = [float(number) for number in null_numbers(null_values)]
    return np.where(np.isin(numbers, absent), math.nan, numbers) if absent else numbers


def buckets(discretise: Discretise, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """The whole number each number falls to; NaN is absent.

    log_square          floor(ln(v^2)), the DynInt paper's; all |v| < 1, zero among them, fall to -1
    ln_square_plus_one  floor(ln(v^2 + 1)), its authors' code; absent numbers are a level of their own, -1
    winners             floor((ln v)^2) where v > 2, else floor(v), as the Criteo challenge was won (so 3 falls to 1)

    A number beyond +-1e15 falls where 1e15 does.
    """
    v = np.clip(numbers, -1e15, 1e15)
    match discretise:
        case "log_square":
            return np.floor(np.log(np.square(np.where(np.abs(v) < 1, math.exp(-0.5), v))))
        case "ln_square_plus_one":
            return np.where(np.isnan(v), -1.0, np.floor(np.log(np.square(v) + 1)))
        case "winners":
            return np.floor(np.where(v > 2, np.square(np.log(np.maximum(v, 2))), v))


def transformed(
    transform: Transform, numbers: NDArray[np.float64], quantiles: Sequence[float] | None
) -> NDArray[np.float64]:
    """Each number on another scale, in the same order; NaN stays NaN.

    log       sign(v) ln(1 + |v|): zero stays zero, and a negative number is the mirror image of its positive one
    quantile  the share of the training part's numbers below it, from 0 to 1, by straight lines between `quantiles`
    """
    match transform:
        case "log":
            logs: NDArray[np.float64] = np.copysign(np.log1p(np.abs(numbers)), numbers)
            return logs
        case "quantile":
            assert quantiles is not None
            if len(quantiles) == 1:
                return np.where(np.isnan(numbers), numbers, 0.5)
            return np.interp(numbers, quantiles, np.linspace(0.0, 1.0, len(quantiles)))
    return numbers
