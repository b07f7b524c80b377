"""A user's stored clicks as the model takes them: each click's values encoded once, as many users share them."""

import logging
from collections.abc import Sequence

import numpy as np

from models.features.arrays import Arrays
from models.features.column_encoding import EncodingError
from models.features.encoder import Encoder
from models.features.values import Column, Row
from service.scoring import feature_merge
from service.scoring.candidate_cache import MAX_KEY_BYTES
from service.scoring.row_table import NOTHING, Note, Table
from service.store.codec import Past, unpack_row

log = logging.getLogger(__name__)


class Pasts:
    """One model's clicks, kept by item and packed features: both were fixed when the click came, so none grows old."""

    def __init__(self, encoder: Encoder, *, capacity: int) -> None:
        schema = encoder.schema
        self._encoder = encoder
        self._repeated = feature_merge.repeated(schema)
        timed = {s.name for s in schema.group("behaviour") if s.of and schema.field(s.of).kind == "time"}
        inputs = [i for i in schema.inputs if i.name.startswith("hist.") and i.name.removeprefix("hist.") not in timed]
        self._table = Table(inputs, capacity=capacity)

    def encode(self, past: Past, ts: float) -> tuple[Arrays, bool]:
        """The `hist*` inputs (U = 1), and whether stored values were invalid and taken for absent.

        `past` is in the order of history, earlier than `ts`, and at most as long as the model's.
        """
        length, num_clicks = self._encoder.schema.history_length, len(past)
        keys = list(zip(past.items, past.features, strict=True))
        slots = np.full(length, NOTHING, dtype=np.int64)
        slots[length - num_clicks :] = found = self._table.find(keys, num_clicks)
        arrays = {name: values[None] for name, values in self._table.take(slots).items()}
        invalid = bool(self._table.noted(found))
        if not found.all():
            positions = np.flatnonzero(found == NOTHING)
            lacking = positions.tolist()
            made, bad = self._made([past.items[p] for p in lacking], [past.features[p] for p in lacking])
            for name, values in made.items():
                arrays[name][0, length - num_clicks + positions] = values
            invalid |= bool(bad)
            self._table.put(
                [keys[p] for p in lacking],
                made,
                until=[np.inf] * len(lacking),
                notes={row: Note(bad=frozenset(names)) for row, names in bad.items()},
                rows=[row for row, p in enumerate(lacking) if len(past.features[p]) <= MAX_KEY_BYTES],
            )
        return arrays | self._encoder.encode_times(np.array(past.ts, dtype=np.float64), ts), invalid

    def _made(self, items: Sequence[str], features: Sequence[bytes]) -> tuple[Arrays, dict[int, set[str]]]:
        """These clicks' values, and by click the fields whose values could not be encoded."""
        rows: list[Row] = [unpack_row(packed) or {} for packed in features]
        try:
            return self._encode(items, rows), {}
        except EncodingError as err:
            log.warning("bad stored value", extra={"field": err.field.name, "expected": err.expected})
        cleaned = [feature_merge.cleaned(self._encoder, row, self._repeated) for row in rows]
        return self._encode(items, [row for row, _ in cleaned]), {p: bad for p, (_, bad) in enumerate(cleaned) if bad}

    def _encode(self, items: Sequence[str], rows: Sequence[Row]) -> Arrays:
        columns: dict[str, Column] = {f.name: [row.get(f.name) for row in rows] for f in self._repeated}
        if self._encoder.schema.item_key is not None:
            columns[self._encoder.schema.item_key] = items
        arrays = self._encoder.encode_events(columns, np.zeros(len(items)))
        return {name: values for name, values in arrays.items() if name != "ts"}
