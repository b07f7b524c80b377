"""One field's raw values as ids or numbers: the rules by which a value becomes what a model is fed."""

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.features.field import FIRST, OOV, PAD, Field, input_name
from models.features.values import (
    Column,
    buckets,
    canonical,
    is_null_text,
    null_numbers,
    null_texts,
    transformed,
    without_nulls,
)

Lookup = Mapping[Any, int]

# Beyond this many scales from the centre a number says no more, and its square must still fit a float32.
NUMERIC_LIMIT = 100.0
LATEST_S = 1e12  # the year 33658


class EncodingError(ValueError):
    """A raw value of the wrong type: which field, which row of it, what was expected and what came."""

    def __init__(self, *, field: Field, row: int, expected: str, got: Any) -> None:
        super().__init__(f"field {field.name}, row {row}: expected {expected}, got {got!r:.80}")
        self.field, self.row, self.expected, self.got = field, row, expected, got


def encode(field: Field, lookup: Lookup, column: Column | None, ts: NDArray[np.float64], num_rows: int) -> NDArray[Any]:
    """One field of many rows; `ts` is each row's own time, which only a clock field asks for."""
    if field.kind == "time":
        return clock(field, ts)
    if field.discretise is not None:
        return _bucket_ids(field, lookup, column, num_rows)
    if column is None:
        shape = (num_rows,) if field.kind != "multi" else (num_rows, field.max_values or 1)
        return np.zeros(shape, dtype=np.float32 if field.kind == "numeric" else np.int64)
    if field.kind == "numeric":
        return _numbers(field, column)
    values = column.tolist() if isinstance(column, np.ndarray) else column
    if field.kind == "multi":
        return _lists(field, lookup, values)
    return _ids(field, lookup, values)


def _lists(field: Field, lookup: Lookup, values: Sequence[Any]) -> NDArray[np.int64]:
    if not set(map(type, values)) <= _LISTS:
        row = next(i for i, v in enumerate(values) if type(v) not in _LISTS)
        raise EncodingError(field=field, row=row, expected="a list of strings or numbers", got=values[row])
    rows = [v if v is not None else () for v in values]
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    flat = list(chain.from_iterable(rows))
    try:
        ids = _ids(field, lookup, flat)
    except EncodingError as err:
        row = int(np.searchsorted(np.cumsum(lengths), err.row, side="right"))
        raise EncodingError(field=field, row=row, expected="a list of strings or numbers", got=rows[row]) from None
    width = field.max_values or 1
    present = ids != PAD  # an absent value takes no place
    if not present.all():
        row_of = np.repeat(np.arange(len(rows)), lengths)[present]
        ids, lengths = ids[present], np.bincount(row_of, minlength=len(rows))
    if lengths.max(initial=0) > width:
        position = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        ids, lengths = ids[position < width], np.minimum(lengths, width)
    encoded = np.full((len(rows), width), PAD, dtype=np.int64)
    encoded[np.arange(width) < lengths[:, None]] = ids
    return encoded


class ScalarEncoder:
    """One user or context field of one request: a look-up where numpy would take longer to begin."""

    def __init__(self, field: Field, lookup: Lookup) -> None:
        self.field, self.name, self.input_name = field, field.name, input_name(field)
        self.is_users = field.group == "user"
        self._lookup = lookup
        self._is_plain = field.kind == "categorical" and field.discretise is None
        self._null_numbers = null_numbers(field.null_values)

    def id_of(self, value: Any, ts: float) -> int:
        """For a field of one id."""
        if self._is_plain:
            try:
                value_id = self._lookup.get(value, OOV)
            except TypeError:
                value_id = OOV
            if value_id != OOV or self._is_unknown_text(value):
                return value_id
        elif self.field.part == "hour" and abs(ts) <= LATEST_S:
            return int(ts // 3600 % 24) + FIRST
        elif self.field.part == "weekday" and abs(ts) <= LATEST_S:
            return int((ts // 86400 + 3) % 7) + FIRST
        return int(encode(self.field, self._lookup, (value,), np.array([ts], np.float64), 1)[0])

    def array_of(self, value: Any) -> NDArray[Any]:
        """For a field that is a number or a list."""
        is_float = type(value) is float and math.isfinite(value) and value not in self._null_numbers
        if is_float and self.field.kind == "numeric":
            return np.array([_normalised(self.field, value)], dtype=np.float32)
        if type(value) is list and self.field.kind == "multi":
            encoded = self._few(value)
            if encoded is not None:
                return encoded
        return encode(self.field, self._lookup, (value,), np.empty(0), 1)

    def _few(self, values: list[Any]) -> NDArray[np.int64] | None:
        """None where a value is not simply known, unknown or absent."""
        try:
            ids = [self._lookup.get(value, OOV) for value in values]
        except TypeError:
            return None
        if OOV in ids and not all(self._is_unknown_text(v) for i, v in zip(ids, values, strict=True) if i == OOV):
            return None
        encoded = np.full((1, self.field.max_values or 1), PAD, dtype=np.int64)
        kept = [i for i in ids if i != PAD][: encoded.shape[1]]
        encoded[0, : len(kept)] = kept
        return encoded

    def _is_unknown_text(self, value: Any) -> bool:
        """Whether a value that the look-up does not have is text, and not one that stands for no value."""
        return type(value) is str and not is_null_text(value, self.field.null_values)


_LISTS = {list, tuple, type(None), np.ndarray}
# A list made from an array or a data frame may hold numpy's numbers.
_NUMBERS = (int, float, np.integer, np.floating)
_SCALARS = (*_NUMBERS, str, np.bool_, type(None))


def lookup_of(field: Field) -> Lookup:
    """The ids of a vocabulary's values, by every spelling of theirs, and of what is absent."""
    # 42, 42.0 and True-like numbers hash alike in Python, so one extra key per numeric spelling makes
    # `lookup.get(value)` agree with `canonical(value)` without touching the values one by one.
    lookup: dict[Any, int] = {None: PAD, "": PAD}
    vocabulary = field.vocabulary or ()
    for spelling, value_id in zip(vocabulary, range(FIRST, FIRST + len(vocabulary)), strict=True):
        lookup[spelling] = value_id
        # Words are no numbers, and of a million it takes long to find that out by an exception.
        number = _number(spelling) if spelling[0] in _STARTS or spelling == "inf" else None
        if number is not None and canonical(number) == spelling:
            lookup[number] = value_id
    if field.discretise is None:  # else these are levels, and null values are numbers before that
        nulls = (*null_texts(field.null_values), *null_numbers(field.null_values))
        lookup.update(dict.fromkeys(nulls, PAD))
    return lookup


_STARTS = frozenset("-0123456789")  # of what `canonical` makes of a number


def _number(spelling: str) -> int | float | None:
    try:
        return int(spelling)
    except ValueError:
        try:
            return float(spelling)
        except ValueError:
            return None


def _ids(field: Field, lookup: Lookup, values: Sequence[Any]) -> NDArray[np.int64]:
    try:
        ids = np.fromiter(map(lookup.get, values, repeat(OOV)), dtype=np.int64, count=len(values))
    except TypeError:  # unhashable: a list or an object where one value goes
        row = next(i for i, v in enumerate(values) if not isinstance(v, _SCALARS))
        raise EncodingError(field=field, row=row, expected="a string or a number", got=values[row]) from None
    unknown = ids == OOV
    if not unknown.any():
        return ids
    for row in np.flatnonzero(unknown).tolist():
        value = values[row]
        if not isinstance(value, _SCALARS):
            raise EncodingError(field=field, row=row, expected="a string or a number", got=value)
        if isinstance(value, str):
            is_absent = is_null_text(value, field.null_values)
        else:  # NaN is how tables spell an absent value
            is_absent = isinstance(value, float | np.floating) and math.isnan(value)
        if is_absent:
            ids[row] = PAD
    return ids


def _bucket_ids(field: Field, lookup: Lookup, column: Column | None, num_rows: int) -> NDArray[np.int64]:
    assert field.discretise is not None
    numbers = np.full(num_rows, math.nan) if column is None else _doubles(field, column)
    different, row_of = np.unique(buckets(field.discretise, numbers), return_inverse=True)
    return _ids(field, lookup, different.tolist())[row_of]


def _normalised(field: Field, number: float) -> float:
    assert field.shift is not None
    assert field.scale is not None
    if field.transform != "none":  # by numpy, as a column is: `math` may differ in the last bit
        number = float(transformed(field.transform, np.array([number]), field.quantiles)[0])
    if field.low is not None and field.high is not None:
        number = min(max(number, field.low), field.high)
    return min(max((number - field.shift) / field.scale, -NUMERIC_LIMIT), NUMERIC_LIMIT)


def _numbers(field: Field, column: Column) -> NDArray[np.float32]:
    assert field.shift is not None
    assert field.scale is not None
    numbers = transformed(field.transform, _doubles(field, column), field.quantiles)
    if field.low is not None and field.high is not None:
        numbers = np.minimum(np.maximum(numbers, field.low), field.high)  # NaN stays NaN
    with np.errstate(over="ignore"):  # an absurd number is infinitely far, then clipped
        normalised = (numbers - field.shift) / field.scale
    np.maximum(normalised, -NUMERIC_LIMIT, out=normalised)
    np.minimum(normalised, NUMERIC_LIMIT, out=normalised)
    normalised[np.isnan(normalised)] = 0.0
    return normalised.astype(np.float32)


def _doubles(field: Field, column: Column) -> NDArray[np.float64]:
    if isinstance(column, np.ndarray) and column.dtype.kind in "iuf":
        numbers = column.astype(np.float64)
    else:
        numbers = _parse_numbers(field, column)
    infinite = np.isinf(numbers)
    if infinite.any():
        row = int(np.argmax(infinite))
        raise EncodingError(field=field, row=row, expected="a finite number", got=numbers[row])
    return without_nulls(numbers, field.null_values)


def _parse_numbers(field: Field, column: Column) -> NDArray[np.float64]:
    values = column.tolist() if isinstance(column, np.ndarray) else column
    if set(map(type, values)) <= {float}:
        return np.array(values, dtype=np.float64)
    for row, value in enumerate(values):
        if value is not None and (not isinstance(value, _NUMBERS) or isinstance(value, bool)):
            raise EncodingError(field=field, row=row, expected="a number", got=value)
    try:
        return np.array([math.nan if v is None else v for v in values], dtype=np.float64)
    except OverflowError:
        row = next(i for i, v in enumerate(values) if isinstance(v, int) and abs(v) > sys.float_info.max)
        raise EncodingError(field=field, row=row, expected="a number that fits a double", got=values[row]) from None


def clock(field: Field, ts: NDArray[np.float64]) -> NDArray[np.int64]:
    strange = np.flatnonzero(~(np.abs(ts) <= LATEST_S))  # NaN too
    if strange.size:
        row = int(strange[0])
        raise EncodingError(field=field, row=row, expected="a time in Unix seconds", got=float(ts[row]))
    seconds = np.floor(ts).astype(np.int64)
    match field.part:
        case "hour":
            return seconds // 3600 % 24 + FIRST
        case "weekday":
            return (seconds // 86400 + 3) % 7 + FIRST  # Monday is 0, and 1970 began on a Thursday
        case "day":
            days = seconds.astype("datetime64[s]").astype("datetime64[D]")
            since_first: NDArray[np.int64] = (days - days.astype("datetime64[M]")).astype(np.int64)
            return since_first + FIRST
        case _:
            months: NDArray[np.int64] = seconds.astype("datetime64[s]").astype("datetime64[M]").astype(np.int64)
            return months % 12 + FIRST
