"""Row table: encoded rows by key in preallocated arrays, many taken at once; a ring, so the oldest are replaced."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from models.features.arrays import Arrays

EMPTY_SLOT = 0  # the slot of no row, and never fresh


@dataclass(frozen=True, kw_only=True, slots=True)
class RowWarnings:
    """What was odd about a row, by field name.

    `invalid`: stored values that could not be encoded; `unnamed`: features that came and the model does not have;
    `unknown`: values never seen in training.
    """

    invalid: frozenset[str] = frozenset()
    unnamed: frozenset[str] = frozenset()
    unknown: tuple[str, ...] = ()


class RowTable:
    """At most `capacity` rows of the arrays whose widths are `columns`. A row that is put again stays in its slot.

    A slot is good until something else is put: take what was found before anything is awaited.
    """

    def __init__(
        self,
        columns: Mapping[str, tuple[DTypeLike, int]],
        *,
        capacity: int,
        empty: Arrays,
        group_of: Callable[[Any], Hashable] | None = None,
    ) -> None:
        """`empty` is what the slot of no row holds, by column; `group_of` a key's group, to be expired together."""
        self._group_of = group_of
        self._slots_of_group: dict[Hashable, set[int]] = {}
        self._warnings: dict[int, RowWarnings] = {}
        self._has_warnings = np.zeros(capacity + 1, dtype=np.bool_)
        self._slot_of: dict[Hashable, int] = {}
        self._keys: list[Hashable] = [None] * (capacity + 1)
        self._next = EMPTY_SLOT + 1
        self._fresh_until = np.full(capacity + 1, -np.inf)
        self._sources: list[bytes | None] = [None] * (capacity + 1)
        self._arrays: dict[str, NDArray[Any]] = {}
        for name, (dtype, width) in columns.items():
            self._arrays[name] = np.zeros((capacity + 1, width), dtype)
            self._arrays[name][EMPTY_SLOT] = empty.get(name, 0)

    def find(self, keys: Iterable[Hashable], count: int) -> NDArray[np.int64]:
        """Each key's slot; EMPTY_SLOT where there is no row."""
        return np.fromiter(map(self._slot_of.get, keys, repeat(EMPTY_SLOT)), np.int64, count)

    def stale(self, slots: NDArray[np.int64], now: float) -> NDArray[np.int64]:
        """The positions whose slot has no row, or one whose time is over."""
        return np.flatnonzero(self._fresh_until.take(slots) <= now)

    def take(self, name: str, slots: NDArray[np.int64]) -> NDArray[Any]:
        """One array's rows in these slots, copied."""
        return self._arrays[name].take(slots, axis=0)

    def warnings(self, slots: NDArray[np.int64]) -> dict[int, RowWarnings]:
        """The warnings of the rows in these slots, by position."""
        if not self._warnings or not (flags := self._has_warnings.take(slots)).any():
            return {}
        return {position: self._warnings[int(slots[position])] for position in np.flatnonzero(flags).tolist()}

    def source(self, slot: int) -> bytes | None:
        """The stored bytes that the row in this slot was made of."""
        return self._sources[slot]

    def extend_ttl(self, sources: Mapping[Hashable, bytes | None], *, until: float) -> None:
        """Keeps each of these keys' rows until then, if it is still there and made of that."""
        for key, source in sources.items():
            slot = self._slot_of.get(key, EMPTY_SLOT)
            if slot != EMPTY_SLOT and self._sources[slot] == source:
                self._fresh_until[slot] = until

    def expire(self, groups: Iterable[Hashable]) -> None:
        """Ends the time of these groups' rows, but of those that are kept for ever."""
        for group in groups:
            for slot in self._slots_of_group.get(group, ()):
                if self._fresh_until[slot] < np.inf:
                    self._fresh_until[slot] = -np.inf

    def expire_all(self) -> None:
        self._fresh_until[self._fresh_until < np.inf] = -np.inf

    def put(
        self,
        keys: Sequence[Hashable],
        arrays: Arrays,
        *,
        rows: Sequence[int],
        until: Sequence[float],
        warnings: Mapping[int, RowWarnings],
        sources: Sequence[bytes | None] | None = None,
    ) -> None:
        """Keeps these rows of the arrays, each under its key until its time; all but `rows` are by row."""
        slots = []
        for row in rows:
            slot = self._slot_for(keys[row])
            slots.append(slot)
            self._fresh_until[slot] = until[row]
            self._sources[slot] = None if sources is None else sources[row]
            self._warnings.pop(slot, None)
            if row in warnings:
                self._warnings[slot] = warnings[row]
            self._has_warnings[slot] = row in warnings
        # Of rows that fell into one slot the last remains, in numpy's assignment as in the loop above.
        for name, values in self._arrays.items():
            values[slots] = arrays[name][rows]

    def _slot_for(self, key: Hashable) -> int:
        slot = self._slot_of.get(key)
        if slot is not None:
            return slot
        slot = self._next
        self._next = slot + 1 if slot + 1 < len(self._keys) else EMPTY_SLOT + 1
        if self._keys[slot] is not None:
            self._forget(slot)
        self._keys[slot] = key
        self._slot_of[key] = slot
        if self._group_of is not None:
            self._slots_of_group.setdefault(self._group_of(key), set()).add(slot)
        return slot

    def _forget(self, slot: int) -> None:
        key = self._keys[slot]
        del self._slot_of[key]
        if self._group_of is not None:
            group = self._group_of(key)
            self._slots_of_group[group].discard(slot)
            if not self._slots_of_group[group]:
                del self._slots_of_group[group]
