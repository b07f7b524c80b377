"""History cache: each stored click encoded once a model version, as a user's requests and many users share them."""

import logging
from collections.abc import Sequence

import numpy as np

from models.features.arrays import Arrays
from models.features.column_encoding import EncodingError
from models.features.encoder import Encoder
from models.features.field import event_fields
from models.features.history import Event
from service.scoring import feature_merge
from service.scoring.candidate_cache import MAX_KEY_BYTES, unknown_fields
from service.scoring.row_table import EMPTY_SLOT, RowTable, RowWarnings
from service.store.codec import ClickHistory

log = logging.getLogger(__name__)


class HistoryCache:
    """One model version's clicks by item and packed features: fixed when the click came, so none grows old."""

    def __init__(self, encoder: Encoder, *, capacity: int, reads_age: bool) -> None:
        schema = encoder.schema
        self._encoder = encoder
        self._group = group = encoder.layout.history
        self._stored_fields = [*feature_merge.history_item_fields(schema), *event_fields(schema.fields)]
        # What depends on when the clicks were is made for each request, and only if the model reads it.
        self._reads_age = reads_age
        self._clock_columns = [(f.name, f.start, f.offset) for f in group.fields if f.field.kind == "time"]
        columns: dict[str, tuple[type, int]] = {"history_ids": (np.int64, group.num_columns)}
        empty: Arrays = {"history_ids": group.pad_rows}
        if group.is_weighted:
            columns["history_weights"] = (np.float32, group.num_columns)
        self._table = RowTable(columns, capacity=capacity, empty=empty)
        self._names = group.input_names

    def arrays(self, history: ClickHistory, ts: float) -> tuple[Arrays, dict[str, int], bool]:
        """The packed `history_*` tensors (U = 1); unknown values by field; whether stored values were invalid.

        `history` is in the order of history, earlier than `ts`, and at most as long as the model's. An invalid stored
        value counts as absent.
        """
        length, num_clicks = self._encoder.schema.history_length, len(history)
        first = length - num_clicks
        keys = list(zip(history.items, history.features, strict=True))
        slots = np.full(length, EMPTY_SLOT, dtype=np.int64)
        slots[first:] = found = self._table.find(keys, num_clicks)
        arrays = {name: self._table.take(name, slots)[None] for name in self._names}
        warnings = list(self._table.warnings(found).values())
        if not found.all():
            positions = np.flatnonzero(found == EMPTY_SLOT)
            missing = positions.tolist()
            made, made_warnings = self._make([history[p] for p in missing])
            for name in self._names:
                arrays[name][0, first + positions] = made[name]
            warnings += made_warnings.values()
            self._table.put(
                [keys[p] for p in missing],
                made,
                rows=[row for row, p in enumerate(missing) if len(history.features[p]) <= MAX_KEY_BYTES],
                until=[np.inf] * len(missing),
                warnings=made_warnings,
            )
        if self._reads_age or self._clock_columns:
            times = self._encoder.encode_times(np.array(history.ts, dtype=np.float64), ts)
            for name, column, offset in self._clock_columns:
                arrays["history_ids"][0, :, column] = times[name][0] + offset
            arrays["history_age"] = times["hist_age"]
        arrays["history_mask"] = self._encoder.masks[num_clicks][None]
        unknown: dict[str, int] = {}
        for name in (name for warning in warnings for name in warning.unknown):
            unknown[name] = unknown.get(name, 0) + 1
        return arrays, unknown, any(warning.invalid for warning in warnings)

    def _make(self, clicks: Sequence[Event]) -> tuple[Arrays, dict[int, RowWarnings]]:
        """These clicks' rows, and the warnings by click."""
        invalid: Sequence[frozenset[str]] = [frozenset()] * len(clicks)
        try:
            arrays = self._pack(clicks)
        except EncodingError as err:
            log.warning("bad stored value", extra={"field": err.field.name, "expected": err.expected})
            valid, invalid = zip(*map(self._without_invalid, clicks), strict=True)
            arrays = self._pack(valid)
        unknown = unknown_fields(self._group, arrays["history_ids"])
        warnings = {
            row: RowWarnings(invalid=names, unknown=unknown.get(row, ()))
            for row, names in enumerate(invalid)
            if names or row in unknown
        }
        return arrays, warnings

    def _without_invalid(self, click: Event) -> tuple[Event, frozenset[str]]:
        values = {f.name: feature_merge.value_of(click, f) for f in self._stored_fields}
        valid, bad = feature_merge.drop_invalid(self._encoder, values, self._stored_fields)
        return Event(item=click.item, ts=click.ts, features=valid), bad

    def _pack(self, clicks: Sequence[Event]) -> Arrays:
        # Clicks of one item at several times share a row: its clock columns are filled in for each request.
        columns, times = self._encoder.event_columns(clicks), np.zeros(len(clicks))
        return self._group.pack(self._encoder.encode_events(columns, times), (len(clicks),))
