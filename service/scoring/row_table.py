"""Encoded rows by key in preallocated arrays, so that many are taken at once: the oldest go when it is full."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.features.arrays import Arrays
from models.features.field import Input

NOTHING = 0  # the slot of no row: all padding, and never fresh


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What was odd about a row: stored values that could not be encoded, given names that the model does not have."""

    bad: frozenset[str] = frozenset()
    unnamed: frozenset[str] = frozenset()


class Table:
    """At most `capacity` rows of the given inputs. A row that is put again stays in its slot.

    A slot is good until something else is put: nobody may wait between finding and taking.
    """

    def __init__(self, inputs: Sequence[Input], *, capacity: int) -> None:
        self._notes: dict[int, Note] = {}
        self._slot_of: dict[Hashable, int] = {}
        self._keys: list[Hashable] = [None] * (capacity + 1)
        self._next = NOTHING + 1
        self._until = np.full(capacity + 1, -np.inf)
        self._sources: list[bytes | None] = [None] * (capacity + 1)
        # A row's single values stand side by side: after a run of the model little is left in the caches.
        self._singles: list[tuple[list[str], NDArray[Any]]] = []
        for dtype in ("int64", "float32"):
            names = [i.name for i in inputs if i.dtype == dtype and _width(i) is None]
            if names:
                self._singles.append((names, np.zeros((capacity + 1, len(names)), dtype)))
        wide = [(i.name, i.dtype, width) for i in inputs if (width := _width(i)) is not None]
        self._lists = [(name, np.zeros((capacity + 1, width), dtype)) for name, dtype, width in wide]

    def find(self, keys: Iterable[Hashable], count: int) -> NDArray[np.int64]:
        """Each key's slot; NOTHING where no row is held."""
        return np.fromiter(map(self._slot_of.get, keys, repeat(NOTHING)), np.int64, count)

    def stale(self, slots: NDArray[np.int64], now: float) -> NDArray[np.bool_]:
        """Which of the slots hold no row, or one whose time is over."""
        return self._until.take(slots) <= now

    def take(self, slots: NDArray[np.int64]) -> Arrays:
        """The rows in these slots, copied."""
        arrays: Arrays = {}
        for names, values in self._singles:
            arrays.update(zip(names, np.ascontiguousarray(values.take(slots, axis=0).T), strict=True))
        for name, values in self._lists:
            arrays[name] = values.take(slots, axis=0)
        return arrays

    def noted(self, slots: NDArray[np.int64]) -> dict[int, Note]:
        """The notes of the rows in these slots, by position."""
        notes = self._notes
        return {p: notes[slot] for p, slot in enumerate(slots.tolist()) if slot in notes} if notes else {}

    def source(self, slot: int) -> bytes | None:
        """What the row in this slot was made of."""
        return self._sources[slot]

    def renew(self, sources: Mapping[Hashable, bytes | None], *, until: float) -> None:
        """Keeps each of these keys' rows until then, if it is still there and made of that."""
        for key, source in sources.items():
            slot = self._slot_of.get(key, NOTHING)
            if slot != NOTHING and self._sources[slot] == source:
                self._until[slot] = until

    def put(
        self,
        keys: Sequence[Hashable],
        arrays: Arrays,
        *,
        until: Sequence[float],
        notes: Mapping[int, Note],
        rows: Sequence[int],
        sources: Sequence[bytes | None] | None = None,
    ) -> None:
        """Keeps these rows of the arrays, each under its key until its time; `notes` are by row, as `sources`."""
        slots = []
        for row in rows:
            slot = self._slot_for(keys[row])
            slots.append(slot)
            self._until[slot] = until[row]
            self._sources[slot] = None if sources is None else sources[row]
            self._notes.pop(slot, None)
            if row in notes:
                self._notes[slot] = notes[row]
        # Of rows that fell into one slot the last remains, in numpy's assignment as in the loop above.
        for names, values in self._singles:
            for place, name in enumerate(names):
                values[slots, place] = arrays[name][rows]
        for name, values in self._lists:
            values[slots] = arrays[name][rows]

    def _slot_for(self, key: Hashable) -> int:
        held = self._slot_of.get(key)
        if held is not None:
            return held
        slot = self._next
        self._next = slot + 1 if slot + 1 < len(self._keys) else NOTHING + 1
        if self._keys[slot] is not None:
            del self._slot_of[self._keys[slot]]
        self._keys[slot] = key
        self._slot_of[key] = slot
        return slot


def _width(wanted: Input) -> int | None:
    """How many values a row has of an input; None for one that is no list."""
    last = wanted.dims[-1]
    fixed = len(wanted.dims) - (2 if wanted.name.startswith("hist.") else 1)
    return int(last) if fixed else None
