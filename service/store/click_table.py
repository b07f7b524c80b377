"""Click table: the clicks of many users as columns, which are packed all at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.features.values import Row
from service.store.codec import absent_in, pack_records, present
from service.store.words import Rows

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Column(Generic[T]):
    """A value of each click, as its position among the distinct ones."""

    values: Sequence[T]
    positions: NDArray[np.int64]

    def __getitem__(self, click: int) -> T:
        return self.values[int(self.positions[click])]

    def take(self, clicks: NDArray[np.int64]) -> "Column[T]":
        return replace(self, positions=self.positions[clicks])


class UserRecords(NamedTuple):
    """The clicks of one user as records."""

    user: str
    records: bytes
    num_clicks: int
    last_size: int


@dataclass(frozen=True, kw_only=True)
class ClickTable:
    """Clicks of many users, one user's together and in the order of a past (time, item, tag), none of them twice."""

    users: Sequence[str]
    ends: NDArray[np.int64]
    """Where the clicks of each user end."""
    items: Column[str]
    ts: NDArray[np.int64]
    """In tenths of a millisecond since 1970."""
    tags: NDArray[np.uint8]
    """Three bytes each, which tell clicks of one user, time and item apart."""
    features: Column[Row]

    def __len__(self) -> int:
        return len(self.ts)

    def newest(self, limit: int) -> "ClickTable":
        """The last `limit` clicks of each user."""
        counts = np.diff(self.ends, prepend=0)
        if not len(counts) or counts.max() <= limit:
            return self
        newest = np.flatnonzero(np.repeat(self.ends, counts) - np.arange(len(self)) <= limit)
        return replace(
            self, ends=np.cumsum(np.minimum(counts, limit)), items=self.items.take(newest), ts=self.ts[newest],
            tags=self.tags[newest], features=self.features.take(newest),
        )  # fmt: skip

    def rows(self, item_rows: Sequence[Row | None]) -> Column[Rows]:
        """The features of each click: the stored ones of its item, but for those that it brings, and its own.

        `item_rows` are those of the items' values.
        """
        num_own = max(len(self.features.values), 1)
        is_stored = np.fromiter((bool(row) for row in item_rows), bool, len(item_rows))
        item = np.where(is_stored[self.items.positions], self.items.positions + 1, 0)  # 0: of none that is stored
        pairs, positions = np.unique(item * num_own + self.features.positions, return_inverse=True)
        values: list[Rows] = []
        for pair in pairs.tolist():
            row = (item_rows[pair // num_own - 1] if pair >= num_own else None) or {}
            own = self.features.values[pair % num_own]
            values.append((present(absent_in(own, row)), present(own), {}))
        return Column(values=values, positions=positions)

    def records(self, features: Column[bytes]) -> Iterator[UserRecords]:
        """The clicks of each user with their features as they are packed."""
        pieces, sizes = pack_records(
            ts=self.ts,
            tags=self.tags,
            items=self.items.values,
            item_positions=self.items.positions,
            features=features.values,
            features_positions=features.positions,
        )
        begin = 0
        for user, end in zip(self.users, self.ends.tolist(), strict=True):
            yield UserRecords(user, b"".join(pieces[3 * begin : 3 * end]), end - begin, int(sizes[end - 1]))
            begin = end
