"""From raw values to a model's inputs: the only code that turns values into ids, for training and serving alike."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.schema import FIRST, OOV, PAD, Field, Schema, input_name
from models.values import Column, Columns, Row, buckets, canonical

Arrays = dict[str, NDArray[Any]]
"""A model's inputs by name (`user.age`, `hist_mask`, ...): see `Schema.inputs` for shapes."""

# Beyond this many scales from the centre a number says no more, and its square must still fit a float32.
NUMERIC_LIMIT = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One past click: which item, when (Unix seconds), and the item's raw features."""

    item: str
    ts: float
    features: Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request, raw: a user in a context at a time, the user's past, and the candidates.

    The user's and the candidates' own ids stand in `user` and `items` under the schema's `user_key` and `item_key`.
    """

    user: Row
    context: Row
    ts: float
    behaviours: Sequence[Event]
    items: Columns
    num_items: int


class EncodingError(ValueError):
    """A raw value of the wrong type: which field, which row of it, what was expected and what came."""

    def __init__(self, *, field: Field, row: int, expected: str, got: Any) -> None:
        super().__init__(f"field {field.name}, row {row}: expected {expected}, got {got!r:.80}")
        self.field, self.row, self.expected, self.got = field, row, expected, got


class Encoder:
    """Raw rows to arrays by one fitted schema. Holds no state but lookup tables; safe to share between threads."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._lookups = {f.name: _lookup(f.vocabulary) for f in schema.fields if f.vocabulary is not None}

    def encode(self, request: Request) -> Arrays:
        """One request (U = 1) with its C candidates.

        A value not seen in training becomes OOV, an absent one PAD (0.0 where numeric). Rows never influence
        each other: encoding N candidates together equals encoding each alone and `concat`.
        """
        columns = {name: (value,) for name, value in chain(request.user.items(), request.context.items())}
        arrays = self.encode_requests(columns, np.array([request.ts], dtype=np.float64))
        if self.schema.group("behaviour"):
            arrays |= self._encode_history(request.behaviours, request.ts)
        arrays |= self.encode_items(request.items, request.num_items)
        arrays["user_index"] = np.zeros(request.num_items, dtype=np.int64)
        return arrays

    def encode_requests(self, columns: Columns, ts: NDArray[np.float64]) -> Arrays:
        """The `user.*` and `ctx.*` inputs of many requests; `ts` is each request's own time."""
        fields = (*self.schema.group("user"), *self.schema.group("context"))
        return {input_name(f): self._encode(f, columns.get(f.name), ts, len(ts)) for f in fields}

    def encode_items(self, columns: Columns, num_rows: int) -> Arrays:
        """The `item.*` inputs of many candidates."""
        never = np.empty(0)
        return {input_name(f): self._encode(f, columns.get(f.name), never, num_rows) for f in self.schema.group("item")}

    def encode_events(self, columns: Columns, ts: NDArray[np.float64]) -> Arrays:
        """The `hist.*` values of many events, one row each, from raw item columns, and their own times as `ts`."""
        arrays: Arrays = {"ts": ts}
        for sequence in self.schema.group("behaviour"):
            assert sequence.of is not None
            source = self.schema.field(sequence.of)
            arrays[input_name(sequence)] = self._encode(source, columns.get(source.name), ts, len(ts))
        return arrays

    def window(
        self, events: Arrays, starts: NDArray[np.int64], ends: NDArray[np.int64], ts: NDArray[np.float64]
    ) -> Arrays:
        """Each request's history: the last T of `events[starts[u]:ends[u]]`, left-padded, newest last.

        `events` is what `encode_events` made, in history order; `ts` is each request's own time. Returns `hist.*`
        [U, T] (multi-valued: [U, T, M]), `hist_mask` [U, T] and `hist_age` [U, T]: the whole seconds since each event.
        """
        positions_UT = ends[:, None] + np.arange(-self.schema.history_length, 0)
        mask_UT = positions_UT >= starts[:, None]
        positions_UT = np.where(mask_UT, positions_UT, 0)
        arrays: Arrays = {}
        for name, values in events.items():
            if len(values) == 0:
                arrays[name] = np.full(positions_UT.shape + values.shape[1:], PAD, dtype=values.dtype)
                continue
            gathered = values[positions_UT]
            gathered[~mask_UT] = PAD
            arrays[name] = gathered
        # In doubles, which hold Unix times to the microsecond: single precision is off by minutes (models.md X14).
        age_UT = np.where(mask_UT, np.minimum(ts[:, None] - arrays.pop("ts"), _LATEST_S), 0)
        return arrays | {"hist_mask": mask_UT, "hist_age": np.floor(age_UT).astype(np.int64)}

    def _encode_history(self, behaviours: Sequence[Event], ts: float) -> Arrays:
        past = history(behaviours, before=ts, limit=self.schema.history_length)
        names = {s.of for s in self.schema.group("behaviour") if s.of is not None}
        columns: dict[str, Column] = {n: [e.features.get(n) for e in past] for n in names if n != self.schema.item_key}
        if self.schema.item_key is not None:
            columns[self.schema.item_key] = [e.item for e in past]
        events = self.encode_events(columns, np.array([e.ts for e in past], dtype=np.float64))
        return self.window(events, np.zeros(1, np.int64), np.array([len(past)], np.int64), np.array([ts], np.float64))

    def _encode(self, field: Field, column: Column | None, ts: NDArray[np.float64], num_rows: int) -> NDArray[Any]:
        if field.kind == "time":
            return _clock(field, ts)
        if field.discretise is not None:
            return _bucket_ids(field, self._lookups[field.name], column, num_rows)
        if column is None:
            shape = (num_rows,) if field.kind != "multi" else (num_rows, field.max_values or 1)
            return np.zeros(shape, dtype=np.float32 if field.kind == "numeric" else np.int64)
        if field.kind == "numeric":
            return _numbers(field, column)
        values = column.tolist() if isinstance(column, np.ndarray) else column
        if field.kind == "multi":
            return self._encode_multi(field, values)
        return _ids(field, self._lookups[field.name], values)

    def _encode_multi(self, field: Field, values: Sequence[Any]) -> NDArray[np.int64]:
        if not set(map(type, values)) <= _LISTS:
            row = next(i for i, v in enumerate(values) if type(v) not in _LISTS)
            raise EncodingError(field=field, row=row, expected="a list of strings or numbers", got=values[row])
        rows = [v if v is not None else () for v in values]
        row_of = np.repeat(np.arange(len(rows)), np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)))
        flat = list(chain.from_iterable(rows))
        try:
            ids = _ids(field, self._lookups[field.name], flat)
        except EncodingError as err:
            row = int(row_of[err.row])
            raise EncodingError(field=field, row=row, expected="a list of strings or numbers", got=rows[row]) from None
        row_of, ids = row_of[ids != PAD], ids[ids != PAD]  # an absent value takes no place
        lengths = np.bincount(row_of, minlength=len(rows))
        position = np.arange(len(ids)) - (np.cumsum(lengths) - lengths)[row_of]
        kept = position < (field.max_values or 1)
        encoded = np.full((len(rows), field.max_values or 1), PAD, dtype=np.int64)
        encoded[row_of[kept], position[kept]] = ids[kept]
        return encoded


def history(behaviours: Sequence[Event], *, before: float, limit: int) -> list[Event]:
    """A request's history: the events strictly earlier than it, by time and then item id, the last `limit` of them.

    The one law of history, offline and online: two clicks of the same second stand in the order of their item ids
    (by code point), so that every store and every file gives the same sequence.
    """
    past = sorted((e for e in behaviours if e.ts < before), key=lambda e: (e.ts, e.item))
    return past[max(len(past) - limit, 0) :]


def concat(parts: Sequence[Arrays]) -> Arrays:
    """Several requests' arrays as one: users and candidates in order, `user_index` pointing at each one's own user."""
    joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0] if name != "user_index"}
    users = [_num_users(p) for p in parts]
    offsets = np.cumsum([0, *users[:-1]])
    joined["user_index"] = np.concatenate([p["user_index"] + o for p, o in zip(parts, offsets, strict=True)])
    return joined


def _num_users(arrays: Arrays) -> int:
    for name, array in arrays.items():
        if not name.startswith("item.") and name != "user_index":
            return len(array)
    return int(arrays["user_index"].max(initial=-1)) + 1


_LISTS = {list, tuple, type(None), np.ndarray}
# A list made from an array or a data frame may hold numpy's numbers.
_NUMBERS = (int, float, np.integer, np.floating)
_SCALARS = (*_NUMBERS, str, np.bool_, type(None))
_LATEST_S = 1e12  # the year 33658


def _lookup(vocabulary: Sequence[str]) -> Mapping[Any, int]:
    # 42, 42.0 and True-like numbers hash alike in Python, so one extra key per numeric spelling makes
    # `lookup.get(value)` agree with `canonical(value)` without touching the values one by one.
    lookup: dict[Any, int] = {None: PAD, "": PAD}
    for spelling, value_id in zip(vocabulary, range(FIRST, FIRST + len(vocabulary)), strict=True):
        lookup[spelling] = value_id
        number = _number(spelling)
        if number is not None and canonical(number) == spelling:
            lookup[number] = value_id
    return lookup


def _number(spelling: str) -> int | float | None:
    try:
        return int(spelling)
    except ValueError:
        try:
            return float(spelling)
        except ValueError:
            return None


def _ids(field: Field, lookup: Mapping[Any, int], values: Sequence[Any]) -> NDArray[np.int64]:
    try:
        ids = np.fromiter(map(lookup.get, values, repeat(OOV)), dtype=np.int64, count=len(values))
    except TypeError:  # unhashable: a list or an object where one value goes
        row = next(i for i, v in enumerate(values) if not isinstance(v, _SCALARS))
        raise EncodingError(field=field, row=row, expected="a string or a number", got=values[row]) from None
    for row in np.flatnonzero(ids == OOV).tolist():
        value = values[row]
        if not isinstance(value, _SCALARS):
            raise EncodingError(field=field, row=row, expected="a string or a number", got=value)
        if isinstance(value, float | np.floating) and math.isnan(value):  # NaN is how tables spell an absent value
            ids[row] = PAD
    return ids


def _bucket_ids(field: Field, lookup: Mapping[Any, int], column: Column | None, num_rows: int) -> NDArray[np.int64]:
    assert field.discretise is not None
    numbers = np.full(num_rows, math.nan) if column is None else _doubles(field, column)
    different, row_of = np.unique(buckets(field.discretise, numbers), return_inverse=True)
    return _ids(field, lookup, different.tolist())[row_of]


def _numbers(field: Field, column: Column) -> NDArray[np.float32]:
    assert field.shift is not None
    assert field.scale is not None
    numbers = _doubles(field, column)
    with np.errstate(over="ignore"):  # an absurd number is infinitely far, then clipped
        normalised = np.clip((numbers - field.shift) / field.scale, -NUMERIC_LIMIT, NUMERIC_LIMIT)
    return np.nan_to_num(normalised, nan=0.0).astype(np.float32)


def _doubles(field: Field, column: Column) -> NDArray[np.float64]:
    if isinstance(column, np.ndarray) and column.dtype.kind in "iuf":
        numbers = column.astype(np.float64)
    else:
        numbers = _parse_numbers(field, column)
    infinite = np.flatnonzero(np.isinf(numbers))
    if infinite.size:
        row = int(infinite[0])
        raise EncodingError(field=field, row=row, expected="a finite number", got=numbers[row])
    return numbers


def _parse_numbers(field: Field, column: Column) -> NDArray[np.float64]:
    values = column.tolist() if isinstance(column, np.ndarray) else column
    for row, value in enumerate(values):
        if value is not None and (not isinstance(value, _NUMBERS) or isinstance(value, bool)):
            raise EncodingError(field=field, row=row, expected="a number", got=value)
    try:
        return np.array([math.nan if v is None else v for v in values], dtype=np.float64)
    except OverflowError:
        row = next(i for i, v in enumerate(values) if isinstance(v, int) and abs(v) > 10**300)
        raise EncodingError(field=field, row=row, expected="a number that fits a double", got=values[row]) from None


def _clock(field: Field, ts: NDArray[np.float64]) -> NDArray[np.int64]:
    strange = np.flatnonzero(~(np.abs(ts) <= _LATEST_S))  # NaN too
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
