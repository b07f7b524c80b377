"""In-memory feature store: the twin of the Redis one, for tests, demos and development."""

import bisect
from collections.abc import Mapping, Sequence

from models.features.values import Row
from service.store.codec import Click, ClickHistory, enriched, order, pack_click_features, pack_row, unpack_row
from service.store.feature_store import FeatureStore, Fetched, OnFetched


class MemoryStore(FeatureStore):
    """The store without a server: for tests, demos and development.

    A user's past is bounded as in Redis; the numbers of users, items and marked events are not, and nothing expires.
    """

    def __init__(self, *, keep: int = 200) -> None:
        self._keep = keep
        self._users: dict[str, Row] = {}
        self._items: dict[str, bytes] = {}
        self._pasts: dict[str, list[Click]] = {}
        self._known: set[tuple[str, str]] = set()

    def fetch_soon(
        self,
        user: str | None,
        items: Sequence[str],
        on_fetched: OnFetched,
        *,
        before: float,
        limit: int,
        timeout_s: float | None = None,  # noqa: ARG002 - it answers at once
    ) -> None:
        earlier = [c for c in self._pasts.get(user or "", ()) if c.ts < before]
        past = earlier[max(len(earlier) - limit, 0) :]
        on_fetched(
            Fetched(
                user=self._users.get(user) if user is not None else None,
                behaviours=ClickHistory(
                    [c.item for c in past], [c.ts for c in past], [pack_click_features(c) for c in past]
                ),
                items=[self._items.get(item) for item in items],
            )
        )

    async def append(self, clicks: Sequence[Click]) -> list[bool]:
        new = await self.mark([(click.user, click.event_id) for click in clicks])
        for click, is_new in zip(clicks, new, strict=True):
            if is_new:
                past = self._pasts.setdefault(click.user, [])
                bisect.insort(past, enriched(click, unpack_row(self._items.get(click.item))), key=order)
                del past[: -self._keep]
        return new

    async def mark(self, events: Sequence[tuple[str, str]]) -> list[bool]:
        new = []
        for event in events:
            new.append(event not in self._known)
            self._known.add(event)
        return new

    async def put_users(self, rows: Mapping[str, Row]) -> None:
        self._users.update(rows)

    async def put_items(self, rows: Mapping[str, Row]) -> None:
        self._items.update({item: pack_row(row) for item, row in rows.items()})

    async def ping(self) -> None:
        return

    async def aclose(self) -> None:
        return
