"""Candidates as the model takes them: encoded once, then kept by item and by what the client said of it."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.features.arrays import Arrays
from models.features.column_encoding import EncodingError
from models.features.encoder import Encoder
from models.features.field import input_name
from models.features.values import Column, Row
from service.scoring import feature_merge
from service.scoring.feature_merge import Candidates
from service.scoring.row_table import NOTHING, Note, Table
from service.store.codec import unpack_row

log = logging.getLogger(__name__)

Key = str | tuple[str, bytes]
"""An item alone, or with the features that the client gave it, to the byte."""

MAX_KEY_BYTES = 2048  # a row under a longer id, or more features, is made anew each time: no client fills the memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """A request's candidates against the table: the rows that it holds, and what is not there or too old.

    Copied while they are found: before the store has answered, other requests may have put their rows in these places.
    """

    keys: Sequence[Key]
    rows: Arrays
    notes: Mapping[int, Note]  # of those rows, by position
    held: NDArray[np.bool_]  # which positions have a row at all
    lacking: NDArray[np.int64]  # positions whose row is not held, or was for too long
    made_of: Mapping[int, bytes | None]  # what the store had of the held ones among those when they were made
    given: Mapping[Key, Row]  # what the client said of those
    asked: list[str]  # the items that the store has to be asked for


@dataclass(kw_only=True, slots=True)
class Rows:
    """The candidates' arrays, and what is to be told of them."""

    arrays: Arrays
    unnamed: set[str] = field(default_factory=set)  # features that the client named and the model does not have
    invalid: bool = False  # stored values that could not be encoded were taken for absent
    stale: bool = False  # rows that were to be read again stood in for those of a store that is down
    gaps: bool = False  # features are missing that such a store may have


@dataclass(frozen=True, kw_only=True, slots=True)
class _Encoded:
    """Rows made for this request, in the order of their keys."""

    arrays: Arrays
    notes: Mapping[int, Note]
    whole: Sequence[bool]  # nothing of the row is the store's to say


class Items:
    """One model's item rows. They are kept for `fresh_s` seconds, as the store may change; 0 keeps none.

    A row that the client gave whole does not depend on the store, and is kept until its place is needed.
    """

    def __init__(
        self, encoder: Encoder, *, capacity: int, fresh_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        schema = encoder.schema
        self._encoder = encoder
        self._fields = [f for f in schema.group("item") if f.name != schema.item_key]
        self._names = frozenset(f.name for f in schema.group("item"))
        self._table = Table([i for i in schema.inputs if i.name.startswith("item.")], capacity=capacity)
        self._fresh_s = fresh_s
        self._now = now

    def find(self, candidates: Candidates) -> Wanted:
        """Raises Unreadable for features that are no JSON object."""
        if candidates.columns is not None and all(_is_whole(candidates.columns.get(f.name)) for f in self._fields):
            return _NOTHING_WANTED
        keys = candidates.keys()
        slots = self._table.find(keys, len(keys))
        lacking = np.flatnonzero(self._table.stale(slots, self._now()))
        given: dict[Key, Row] = {}
        asked: dict[str, None] = {}
        made_of: dict[int, bytes | None] = {}
        for position in lacking.tolist():
            key, slot = keys[position], slots[position]
            if slot != NOTHING:
                made_of[position] = self._table.source(slot)
            if key not in given:
                given[key] = row = candidates.row(position)
                if not self._is_given_whole(row):
                    asked[candidates.ids[position]] = None
        rows, notes, held = self._table.take(slots), self._table.noted(slots), slots != NOTHING
        return Wanted(
            keys=keys,
            rows=rows,
            notes=notes,
            held=held,
            lacking=lacking,
            made_of=made_of,
            given=given,
            asked=list(asked),
        )

    def encode(self, candidates: Candidates, wanted: Wanted, stored: Mapping[str, bytes | None] | None) -> Rows:
        """The candidates' rows; `stored` is what the store said of the items asked for, None where it is down.

        Raises EncodingError for a client's value that its field cannot take.
        """
        if not len(wanted.keys):
            return self._of_columns(candidates)
        rows = Rows(arrays=wanted.rows)
        notes = dict(wanted.notes)
        lacking = wanted.lacking
        if lacking.size and stored is None:  # what is too old is better than nothing
            held = wanted.held[lacking]
            rows.stale, lacking = bool(held.any()), lacking[~held]
        elif wanted.made_of and stored is not None:
            lacking = self._changed(candidates, wanted, stored)
        if lacking.size:
            positions = lacking.tolist()
            keys = list(dict.fromkeys(wanted.keys[p] for p in positions))
            made = self._made(keys, wanted.given, stored or {})
            place = {key: row for row, key in enumerate(keys)}
            which = [place[wanted.keys[p]] for p in positions]
            for name, values in made.arrays.items():
                rows.arrays[name][lacking] = values[which]
            for position, row in zip(positions, which, strict=True):
                notes.pop(position, None)
                if row in made.notes:
                    notes[position] = made.notes[row]
            rows.gaps = stored is None and self._has_gaps(candidates, positions, which, made)
            self._keep(keys, made, stored)
        for position, note in notes.items():
            rows.unnamed |= note.unnamed
            rows.invalid |= any(not candidates.gives(name, position) for name in note.bad)
        if candidates.columns is not None:
            self._override(rows, candidates.columns)
        return rows

    def _changed(self, candidates: Candidates, wanted: Wanted, stored: Mapping[str, bytes | None]) -> NDArray[np.int64]:
        """Those of the lacking positions whose row has to be made. The time of the others begins anew."""
        changed, same = [], {}
        for position in wanted.lacking.tolist():
            packed = stored.get(candidates.ids[position])
            if position in wanted.made_of and wanted.made_of[position] == packed:
                same[wanted.keys[position]] = packed
            else:
                changed.append(position)
        self._table.renew(same, until=self._now() + self._fresh_s)
        return np.array(changed, dtype=np.int64)

    def _made(self, keys: Sequence[Key], given: Mapping[Key, Row], stored: Mapping[str, bytes | None]) -> _Encoded:
        ids = [_item_of(key) for key in keys]
        own = [given[key] for key in keys]
        known = [unpack_row(stored.get(item)) for item in ids]
        notes = {
            row: Note(unnamed=unnamed) for row, sent in enumerate(own) if (unnamed := frozenset(sent) - self._names)
        }
        try:
            arrays = self._encode(ids, own, known)
        except EncodingError as err:
            cleaned, bad = zip(*(feature_merge.cleaned(self._encoder, row, self._fields) for row in known), strict=True)
            arrays = self._encode(ids, own, cleaned)
            log.warning("bad stored value", extra={"field": err.field.name, "expected": err.expected})
            for row, (sent, names) in enumerate(zip(own, bad, strict=True)):
                unused = {name for name in names if sent.get(name) is None}
                if unused:
                    unnamed = notes[row].unnamed if row in notes else frozenset()
                    notes[row] = Note(bad=frozenset(unused), unnamed=unnamed)
        return _Encoded(arrays=arrays, notes=notes, whole=[self._is_given_whole(row) for row in own])

    def _encode(self, ids: Sequence[str], own: Sequence[Row], known: Sequence[Row | None]) -> Arrays:
        columns: dict[str, Column] = {}
        for f in self._fields:
            column: list[Any] = []
            for sent, row in zip(own, known, strict=True):
                value = sent.get(f.name)
                column.append(value if value is not None or not row else row.get(f.name))
            columns[f.name] = column
        if self._encoder.schema.item_key is not None:
            columns[self._encoder.schema.item_key] = ids
        return self._encoder.encode_items(columns, len(ids))

    def _keep(self, keys: Sequence[Key], made: _Encoded, stored: Mapping[str, bytes | None] | None) -> None:
        """Where the store is down only those rows are kept that it would have nothing to say of."""
        if not self._fresh_s:
            return
        rows = [
            row
            for row, key in enumerate(keys)
            if (stored is not None or made.whole[row]) and len(key if isinstance(key, str) else key[1]) <= MAX_KEY_BYTES
        ]
        until = self._now() + self._fresh_s
        times = [np.inf if whole else until for whole in made.whole]
        sources = [
            None if whole else (stored or {}).get(_item_of(key)) for whole, key in zip(made.whole, keys, strict=True)
        ]
        self._table.put(keys, made.arrays, until=times, notes=made.notes, rows=rows, sources=sources)

    def _of_columns(self, candidates: Candidates) -> Rows:
        """The client gave every value: neither the table nor the store is needed."""
        assert candidates.columns is not None
        columns: dict[str, Column] = {f.name: candidates.columns[f.name] for f in self._fields}
        if self._encoder.schema.item_key is not None:
            columns[self._encoder.schema.item_key] = candidates.ids
        rows = Rows(arrays=self._encoder.encode_items(columns, len(candidates.ids)))
        rows.unnamed |= candidates.columns.keys() - self._names - {"id"}
        return rows

    def _override(self, rows: Rows, columns: Mapping[str, Sequence[Any]]) -> None:
        rows.unnamed |= columns.keys() - self._names - {"id"}
        for f in self._fields:
            column = columns.get(f.name)
            if column is None:
                continue
            name, values = input_name(f), self._encoder.encode_column(f, column)
            if None not in column:
                rows.arrays[name] = values
                continue
            given = np.fromiter((value is not None for value in column), np.bool_, len(column))
            rows.arrays[name][given] = values[given]

    def _has_gaps(self, candidates: Candidates, positions: Sequence[int], which: Sequence[int], made: _Encoded) -> bool:
        if candidates.columns is None:
            return not all(made.whole[row] for row in which)
        return not all(candidates.gives(f.name, p) for f in self._fields for p in positions)

    def _is_given_whole(self, row: Row) -> bool:
        return all(row.get(f.name) is not None for f in self._fields)


_NONE = np.zeros(0, dtype=np.int64)
_NOTHING_WANTED = Wanted(
    keys=(), rows={}, notes={}, held=_NONE.astype(np.bool_), lacking=_NONE, made_of={}, given={}, asked=[]
)


def _item_of(key: Key) -> str:
    return key if isinstance(key, str) else key[0]


def _is_whole(column: Sequence[Any] | None) -> bool:
    return column is not None and None not in column
