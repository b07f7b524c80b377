"""From raw values to a model's inputs: the only code that turns values into ids, for training and serving alike."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.features.arrays import Arrays
from models.features.column_encoding import LATEST_S, ScalarEncoder, clock, encode, lookup_of
from models.features.field import PAD, Field, input_name
from models.features.history import Event, history
from models.features.packing import PackedLayout
from models.features.request import Request
from models.features.schema import Schema
from models.features.values import Column, Columns, Row


class Encoder:
    """Raw rows to arrays by one fitted schema. Holds no state but lookup tables; safe to share between threads."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._lookups = {f.name: lookup_of(f) for f in schema.fields if f.kind != "sequence"}
        self.layout = PackedLayout(schema)
        length = schema.history_length
        self.masks = np.arange(length) >= length - np.arange(length + 1)[:, None]  # by the number of past clicks
        singles = [ScalarEncoder(f, self._lookups[f.name]) for f in (*schema.group("user"), *schema.group("context"))]
        self._single_ids = [s for s in singles if s.field.kind in ("categorical", "time")]
        self._other_singles = [s for s in singles if s.field.kind in ("numeric", "multi")]
        self._single_names = [s.input_name for s in self._single_ids]
        self._request_offsets = np.array([f.offset for f in self.layout.request.fields], dtype=np.int64)
        names = [input_name(f) for f in schema.group("behaviour")]
        self._history = list(zip(names, schema.history_sources, strict=True))
        self._clocks = [(name, source) for name, source in self._history if source.kind == "time"]

    def encode(self, request: Request) -> Arrays:
        """One request (U = 1) with its C candidates.

        A value not seen in training becomes OOV, an absent one PAD (0.0 where numeric). Rows never influence
        each other: encoding N candidates together equals encoding each alone and `concat`.
        """
        arrays = self.encode_request(request.user, request.context, request.ts)
        if self.schema.group("behaviour"):
            arrays |= self.encode_history(request.behaviours, request.ts)
        arrays |= self.encode_items(request.items, request.num_items)
        arrays["user_index"] = np.zeros(request.num_items, dtype=np.int64)
        return arrays

    def encode_request(self, user: Row, context: Row, ts: float) -> Arrays:
        """The `user.*` and `ctx.*` inputs of one request (U = 1), as `encode_requests` makes them of many."""
        ids = [s.id_of((user if s.is_users else context).get(s.name), ts) for s in self._single_ids]
        arrays: Arrays = dict(zip(self._single_names, np.array(ids, dtype=np.int64)[:, None], strict=True))
        for s in self._other_singles:
            arrays[s.input_name] = s.array_of((user if s.is_users else context).get(s.name))
        return arrays

    def pack_request(self, user: Row, context: Row, ts: float) -> Arrays:
        """The packed `request_*` tensors of one request: what `layout.request.pack` makes of `encode_request`."""
        if self.layout.request.is_weighted:
            return self.layout.request.pack(self.encode_request(user, context, ts), (1,))
        ids = [s.id_of((user if s.is_users else context).get(s.name), ts) for s in self._single_ids]
        return {"request_ids": np.array([ids], dtype=np.int64) + self._request_offsets}

    def encode_requests(self, columns: Columns, ts: NDArray[np.float64]) -> Arrays:
        """The `user.*` and `ctx.*` inputs of many requests; `ts` is each request's own time."""
        fields = (*self.schema.group("user"), *self.schema.group("context"))
        return {input_name(f): encode(f, self._lookups[f.name], columns.get(f.name), ts, len(ts)) for f in fields}

    def encode_items(self, columns: Columns, num_rows: int) -> Arrays:
        """The `item.*` inputs of many candidates."""
        never = np.empty(0)
        return {
            input_name(f): encode(f, self._lookups[f.name], columns.get(f.name), never, num_rows)
            for f in self.schema.group("item")
        }

    def encode_column(self, field: Field, column: Column) -> NDArray[Any]:
        """One user, context or item field of many rows."""
        return encode(field, self._lookups[field.name], column, np.empty(0), len(column))

    def encode_events(self, columns: Columns, ts: NDArray[np.float64]) -> Arrays:
        """The `hist.*` values of many events, one row each, from raw columns, and their own times as `ts`.

        `columns` go by the names of `Schema.history_sources`.
        """
        arrays: Arrays = {"ts": ts}
        for name, source in self._history:
            arrays[name] = encode(source, self._lookups[source.name], columns.get(source.name), ts, len(ts))
        return arrays

    def event_columns(self, events: Sequence[Event]) -> Columns:
        """The raw columns of these events, for `encode_events`."""
        columns: dict[str, Column] = {}
        for _, source in self._history:
            if source.name == self.schema.item_key:
                columns[source.name] = [e.item for e in events]
            elif source.group == "item":
                columns[source.name] = [e.item_value(source.name) for e in events]
            elif source.kind != "time":
                columns[source.name] = [e.event_value(source.name) for e in events]
        return columns

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
        age_UT = np.where(mask_UT, np.minimum(ts[:, None] - arrays.pop("ts"), LATEST_S), 0)
        return arrays | {"hist_mask": mask_UT, "hist_age": np.floor(age_UT).astype(np.int64)}

    def encode_history(self, behaviours: Sequence[Event], ts: float) -> Arrays:
        """The `hist*` inputs of one request (U = 1): what `window` makes of its events alone."""
        past = history(behaviours, before=ts, limit=self.schema.history_length)
        events = self.encode_events(self.event_columns(past), np.array([e.ts for e in past], dtype=np.float64))
        return self.window(events, np.zeros(1, np.int64), np.array([len(past)], np.int64), np.array([ts], np.float64))

    def encode_times(self, times: NDArray[np.float64], ts: float) -> Arrays:
        """Those of the `hist*` inputs of one request that its events' times tell: `times` are in history order."""
        length = self.schema.history_length
        first = length - len(times)
        age_UT = np.zeros((1, length), dtype=np.int64)
        age_UT[0, first:] = np.minimum(ts - times, LATEST_S)  # cut to whole seconds; none is negative
        arrays: Arrays = {"hist_mask": self.masks[len(times)][None], "hist_age": age_UT}
        for name, source in self._clocks:
            arrays[name] = clock_UT = np.full((1, length), PAD, dtype=np.int64)
            clock_UT[0, first:] = clock(source, times)
        return arrays
