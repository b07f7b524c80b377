"""Candidate cache: the item half of each ad, made once a model version, by item and by what the client sent."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.features.arrays import Arrays
from models.features.column_encoding import EncodingError
from models.features.encoder import Encoder
from models.features.packing import PackedGroup
from models.features.values import Column, Row
from service.scoring import feature_merge
from service.scoring.request import Candidates
from service.scoring.row_table import EMPTY_SLOT, RowTable, RowWarnings
from service.store.codec import unpack_row

log = logging.getLogger(__name__)

Key = str | tuple[str, bytes]
"""An item alone, or with the features that the client sent for it, to the byte."""
ItemGraph = Callable[[Arrays], NDArray[np.float32]]
"""The item half [C, W] of packed item tensors."""

MAX_FETCH_S = 60.0  # no answer of the store comes later
MAX_KEY_BYTES = 2048  # a row under a longer id, or more features, is made anew each time: no client fills the memory


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheLookup:
    """A request's candidates against the cache: the rows it has, and those that are missing or too old.

    Copied while they are found: before the store has answered, other requests may have put rows in these slots.
    """

    keys: Sequence[Key]
    arrays: Arrays
    warnings: Mapping[int, RowWarnings]  # of the cached rows, by position
    has_row: NDArray[np.bool_] | None  # which positions have a row at all; None where none is missing
    missing: NDArray[np.int64]  # positions whose row is absent, or was there for too long
    source_bytes: Mapping[int, bytes | None]  # what the store had of those that are too old when they were made
    sent_rows: Mapping[Key, Row]  # what the client said of the missing ones
    missing_ids: list[str]  # the items that the store has to be asked for
    found_at: float


@dataclass(kw_only=True, slots=True)
class CandidateRows:
    """The candidates' rows, and what has to be said of them."""

    arrays: Arrays
    unknown: dict[str, int] = field(default_factory=dict)  # values never seen in training, by field
    unnamed: set[str] = field(default_factory=set)  # features that the client sent and the model does not have
    has_invalid: bool = False  # stored values that could not be encoded were taken for absent
    has_stale: bool = False  # rows that were to be read again stood in for those of a store that is down
    has_gaps: bool = False  # features are missing that such a store may have


class CandidateCache:
    """One model version's item rows: the ids and weights of an ad's fields, and the item half made of them.

    They are kept for `fresh_s` seconds, or until they `expire` as the store has changed; 0 keeps none. A row of which
    the client sent every feature does not depend on the store, and is kept until its slot is needed.
    """

    def __init__(
        self,
        encoder: Encoder,
        item_graph: ItemGraph,
        *,
        item_width: int,
        capacity: int,
        fresh_s: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        schema = encoder.schema
        self._encoder = encoder
        self._item_graph = item_graph
        self._group = encoder.layout.item
        self._fields = [f for f in schema.group("item") if f.name != schema.item_key]
        self._names = frozenset(f.name for f in schema.group("item"))
        columns: dict[str, tuple[type, int]] = {"items": (np.float32, item_width)}
        columns["item_ids"] = (np.int64, self._group.num_columns)
        if self._group.is_weighted:
            columns["item_weights"] = (np.float32, self._group.num_columns)
        self._table = RowTable(columns, capacity=capacity, empty={}, group_of=_item_of)
        self._changed_at: dict[str, float] = {}  # of the last changes
        self._all_changed_at = -np.inf
        self._packed_names = self._group.input_names
        self._fresh_s = fresh_s
        self._now = now

    def find(self, candidates: Candidates, *, with_ids: bool) -> CacheLookup:
        """`with_ids`: the packed ids beside the item half, as an explanation needs them. Raises MalformedFeatures."""
        columns = candidates.columns
        if columns is not None and len(columns) > 1:
            if all(_is_complete(columns.get(f.name)) for f in self._fields):
                return _NO_LOOKUP
            with_ids = True  # what the columns bring is put over them
        keys, now = candidates.keys(), self._now()
        slots = self._table.find(keys, len(keys))
        missing = self._table.stale(slots, now)
        arrays = {name: self._table.take(name, slots) for name in (self._packed_names if with_ids else ())}
        arrays["items"] = self._table.take("items", slots)
        sent_rows: dict[Key, Row] = {}
        missing_ids: dict[str, None] = {}
        source_bytes: dict[int, bytes | None] = {}
        for position in missing.tolist():
            key, slot = keys[position], int(slots[position])
            if slot != EMPTY_SLOT:
                source_bytes[position] = self._table.source(slot)
            if key not in sent_rows:
                sent_rows[key] = row = candidates.row(position)
                if not self._is_complete_row(row):
                    missing_ids[candidates.ids[position]] = None
        return CacheLookup(
            keys=keys,
            arrays=arrays,
            warnings=self._table.warnings(slots),
            has_row=slots != EMPTY_SLOT if missing.size else None,
            missing=missing,
            source_bytes=source_bytes,
            sent_rows=sent_rows,
            missing_ids=list(missing_ids),
            found_at=now,
        )

    def expire(self, items: Iterable[str] | None) -> None:
        """Has these items' rows read again when they are asked for; None: everybody's."""
        now = self._now()
        if items is None:
            self._table.expire_all()
            self._all_changed_at = now
            return
        self._changed_at = {item: at for item, at in self._changed_at.items() if at > now - MAX_FETCH_S}
        self._changed_at.update(dict.fromkeys(items, now))
        self._table.expire(items)

    def _is_outdated(self, item: str, found_at: float) -> bool:
        """Whether the item may have changed since the store was asked."""
        return max(self._all_changed_at, self._changed_at.get(item, -np.inf)) >= found_at

    def rows(
        self, candidates: Candidates, lookup: CacheLookup, stored: Mapping[str, bytes | None] | None
    ) -> CandidateRows:
        """The candidates' rows; `stored` is what the store said of the items asked for, None where it is down.

        Raises EncodingError for a client's value that its field cannot take.
        """
        if lookup is _NO_LOOKUP:
            return self._of_columns(candidates)
        rows = CandidateRows(arrays=lookup.arrays)
        warnings = lookup.warnings
        if lookup.missing.size:
            warnings = self._fill(candidates, lookup, stored, rows)
        for position, warning in warnings.items():
            rows.unnamed |= warning.unnamed
            rows.has_invalid |= any(not candidates.has_value(name, position) for name in warning.invalid)
            for name in warning.unknown:
                rows.unknown[name] = rows.unknown.get(name, 0) + 1
        if candidates.columns is not None and len(candidates.columns) > 1:
            self._override(rows, candidates.columns)
        return rows

    def _fill(
        self,
        candidates: Candidates,
        lookup: CacheLookup,
        stored: Mapping[str, bytes | None] | None,
        rows: CandidateRows,
    ) -> dict[int, RowWarnings]:
        """Makes the rows that are missing, keeps them, and returns the warnings of all."""
        warnings, missing = dict(lookup.warnings), lookup.missing
        if stored is None:  # what is too old is better than nothing
            assert lookup.has_row is not None
            has_row = lookup.has_row[missing]
            rows.has_stale, missing = bool(has_row.any()), missing[~has_row]
        elif lookup.source_bytes:
            missing = self._changed(candidates, lookup, stored)
        if not missing.size:
            return warnings
        positions = missing.tolist()
        keys = list(dict.fromkeys(lookup.keys[p] for p in positions))
        made = self._make(keys, lookup.sent_rows, stored or {})
        row_of_key = {key: row for row, key in enumerate(keys)}
        row_of = [row_of_key[lookup.keys[p]] for p in positions]
        for name, values in rows.arrays.items():
            values[missing] = made.arrays[name][row_of]
        for position, row in zip(positions, row_of, strict=True):
            warnings.pop(position, None)
            if row in made.warnings:
                warnings[position] = made.warnings[row]
        rows.has_gaps = stored is None and self._has_gaps(candidates, positions, row_of, made)
        self._keep(keys, made, stored, lookup.found_at)
        return warnings

    def _changed(
        self, candidates: Candidates, lookup: CacheLookup, stored: Mapping[str, bytes | None]
    ) -> NDArray[np.int64]:
        """Those of the missing positions whose row has to be made. The others' time begins anew."""
        changed, same = [], {}
        for position in lookup.missing.tolist():
            packed = stored.get(candidates.ids[position])
            if position in lookup.source_bytes and lookup.source_bytes[position] == packed:
                if not self._is_outdated(candidates.ids[position], lookup.found_at):
                    same[lookup.keys[position]] = packed
            else:
                changed.append(position)
        self._table.extend_ttl(same, until=self._now() + self._fresh_s)
        return np.array(changed, dtype=np.int64)

    def _make(self, keys: Sequence[Key], sent_rows: Mapping[Key, Row], stored: Mapping[str, bytes | None]) -> "_Made":
        ids = [_item_of(key) for key in keys]
        sent = [sent_rows[key] for key in keys]
        known = [unpack_row(stored.get(item)) for item in ids]
        invalid: Sequence[frozenset[str]] = [frozenset()] * len(keys)
        try:
            packed = self._pack(self._encode(ids, sent, known), len(ids))
        except EncodingError as err:
            valid, invalid = zip(
                *(feature_merge.drop_invalid(self._encoder, row, self._fields) for row in known), strict=True
            )
            packed = self._pack(self._encode(ids, sent, valid), len(ids))
            log.warning("bad stored value", extra={"field": err.field.name, "expected": err.expected})
        unknown = unknown_fields(self._group, packed["item_ids"])
        warnings = {}
        for row, (features, names) in enumerate(zip(sent, invalid, strict=True)):
            warning = RowWarnings(
                invalid=frozenset(name for name in names if features.get(name) is None),
                unnamed=frozenset(features) - self._names,
                unknown=unknown.get(row, ()),
            )
            if warning != _NO_WARNINGS:
                warnings[row] = warning
        complete = [self._is_complete_row(row) for row in sent]
        return _Made(arrays={**packed, "items": self._item_graph(packed)}, warnings=warnings, is_complete=complete)

    def _encode(self, ids: Sequence[str], sent: Sequence[Row], known: Sequence[Row | None]) -> Arrays:
        columns: dict[str, Column] = {}
        for f in self._fields:
            column: list[Any] = []
            for features, row in zip(sent, known, strict=True):
                value = features.get(f.name)
                column.append(value if value is not None or not row else row.get(f.name))
            columns[f.name] = column
        if self._encoder.schema.item_key is not None:
            columns[self._encoder.schema.item_key] = ids
        return self._encoder.encode_items(columns, len(ids))

    def _pack(self, arrays: Arrays, num_rows: int) -> Arrays:
        return self._group.pack(arrays, (num_rows,))

    def _keep(
        self, keys: Sequence[Key], made: "_Made", stored: Mapping[str, bytes | None] | None, found_at: float
    ) -> None:
        """Where the store is down only those rows are kept that it would have nothing to say of."""
        if not self._fresh_s:
            return
        rows = [
            row
            for row, key in enumerate(keys)
            if (made.is_complete[row] or (stored is not None and not self._is_outdated(_item_of(key), found_at)))
            and len(key if isinstance(key, str) else key[1]) <= MAX_KEY_BYTES
        ]
        until = self._now() + self._fresh_s
        sources = [
            None if complete else (stored or {}).get(_item_of(key))
            for complete, key in zip(made.is_complete, keys, strict=True)
        ]
        self._table.put(
            keys,
            made.arrays,
            rows=rows,
            until=[np.inf if complete else until for complete in made.is_complete],
            warnings=made.warnings,
            sources=sources,
        )

    def _of_columns(self, candidates: Candidates) -> CandidateRows:
        """The client sent every value: neither the cache nor the store is needed."""
        assert candidates.columns is not None
        columns: dict[str, Column] = {f.name: candidates.columns[f.name] for f in self._fields}
        if self._encoder.schema.item_key is not None:
            columns[self._encoder.schema.item_key] = candidates.ids
        num_rows = len(candidates.ids)
        rows = CandidateRows(arrays=self._pack(self._encoder.encode_items(columns, num_rows), num_rows))
        rows.unnamed |= candidates.columns.keys() - self._names - {"id"}
        self._make_items(rows)
        return rows

    def _override(self, rows: CandidateRows, columns: Mapping[str, Sequence[Any]]) -> None:
        """Puts the values of the client's columns over those of the rows, and makes the item half of the result."""
        rows.unnamed |= columns.keys() - self._names - {"id"}
        packed_fields = {f.field.name: f for f in self._group.fields}
        changed = False
        for f in self._fields:
            column = columns.get(f.name)
            if column is None:
                continue
            changed = True
            packed = packed_fields[f.name]
            ids, weights = packed.pack(self._encoder.encode_column(f, column))
            sent = np.fromiter((value is not None for value in column), np.bool_, len(column))
            rows.arrays["item_ids"][sent, packed.start : packed.stop] = ids[sent]
            if self._group.is_weighted:
                rows.arrays["item_weights"][sent, packed.start : packed.stop] = weights[sent]
        if changed:
            self._make_items(rows)

    def _make_items(self, rows: CandidateRows) -> None:
        rows.arrays["items"] = self._item_graph({name: rows.arrays[name] for name in self._packed_names})
        unknown = rows.arrays["item_ids"] == self._group.oov_rows
        rows.unknown = {
            f.field.name: int(unknown[:, f.start : f.stop].sum())
            for f in self._group.fields
            if unknown[:, f.start : f.stop].any()
        }

    def _has_gaps(self, candidates: Candidates, positions: Sequence[int], row_of: Sequence[int], made: "_Made") -> bool:
        if candidates.columns is None:
            return not all(made.is_complete[row] for row in row_of)
        return not all(candidates.has_value(f.name, p) for f in self._fields for p in positions)

    def _is_complete_row(self, row: Row) -> bool:
        return all(row.get(f.name) is not None for f in self._fields)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Made:
    """Rows made for this request, in the order of their keys."""

    arrays: Arrays
    warnings: Mapping[int, RowWarnings]
    is_complete: Sequence[bool]  # the client sent every feature of the row


_NO_WARNINGS = RowWarnings()
_NO_LOOKUP = CacheLookup(
    keys=(),
    arrays={},
    warnings={},
    has_row=None,
    missing=np.zeros(0, dtype=np.int64),
    source_bytes={},
    sent_rows={},
    missing_ids=[],
    found_at=0.0,
)


def unknown_fields(group: PackedGroup, ids: NDArray[np.int64]) -> dict[int, tuple[str, ...]]:
    """By row of `ids` [n, K], the fields with a value never seen in training, one name for each such value."""
    unknown = ids == group.oov_rows
    if not unknown.any():
        return {}
    names = [f.field.name for f in group.fields for _ in range(f.start, f.stop)]
    return {
        row: tuple(names[column] for column in np.flatnonzero(unknown[row]).tolist())
        for row in np.flatnonzero(unknown.any(axis=1)).tolist()
    }


def _item_of(key: Key) -> str:
    return key if isinstance(key, str) else key[0]


def _is_complete(column: Sequence[Any] | None) -> bool:
    return column is not None and None not in column
