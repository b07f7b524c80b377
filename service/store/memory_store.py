"""In-memory feature store: the twin of the Redis one, for tests, demos and development."""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from models.features.values import Row
from service.store.click_table import ClickTable
from service.store.codec import (
    NO_WORDS,
    Click,
    ClickHistory,
    Mark,
    OrderKey,
    enriched,
    event_tag,
    order,
    pack_click,
    pack_row,
    rounded,
    unpack_row,
)
from service.store.feature_store import FeatureStore, Fetched, ItemChanges, OnFetched, Outcome

MAX_CHANGES = 10_000  # that are remembered


@dataclass(kw_only=True, slots=True)
class _Past:
    clicks: list[tuple[OrderKey, Click]] = field(default_factory=list)
    floor: OrderKey | None = None  # what is not later is not taken


class MemoryStore(FeatureStore):
    """The store without a server: for tests, demos and development.

    A user's past is bounded as in Redis; the numbers of users, items and known events are not, and nothing expires.
    """

    def __init__(self, *, max_clicks: int = 100, max_bytes: int = 32_768) -> None:
        self.max_clicks = max_clicks
        self._max_bytes = max_bytes
        self._users: dict[str, Row] = {}
        self._items: dict[str, bytes] = {}
        self._pasts: dict[str, _Past] = {}
        self._known: dict[str, set[bytes]] = {}
        self._changes: list[str] = []
        self._forgotten = 0

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
        past = self._pasts.get(user or "", _Past())
        earlier = [click for _, click in past.clicks if click.ts < rounded(before)]
        last = earlier[max(len(earlier) - limit, 0) :]
        on_fetched(
            Fetched(
                user=self._users.get(user) if user is not None else None,
                behaviours=ClickHistory(
                    [c.item for c in last], [c.ts for c in last], [NO_WORDS.pack(c.rows) for c in last]
                ),
                items=[self._items.get(item) for item in items],
            )
        )

    async def append(self, events: Sequence[Click | Mark]) -> list[Outcome]:
        outcomes = []
        for event in events:
            known = self._known.setdefault(event.owner, set())
            tag = event_tag(event)
            if tag in known:
                outcomes.append(Outcome.KNOWN)
                continue
            known.add(tag)
            is_new = True
            if isinstance(event, Click):
                is_new = self._insert(order(event), enriched(event, unpack_row(self._items.get(event.item))))
            outcomes.append(Outcome(is_new))
        return outcomes

    async def merge(self, clicks: ClickTable, *, max_per_s: float | None = None) -> list[int | None]:  # noqa: ARG002
        clicks = clicks.newest(self.max_clicks)
        rows = clicks.rows([unpack_row(self._items.get(item)) for item in clicks.items.values])
        num_new: list[int | None] = []
        begin = 0
        for user, end in zip(clicks.users, clicks.ends.tolist(), strict=True):
            before = {key for key, _ in self._pasts.get(user, _Past()).clicks}
            for n in range(begin, end):
                item, ts = clicks.items[n], int(clicks.ts[n]) / 1e4
                item_features, features, _ = rows[n]
                click = Click(event_id="", user=user, item=item, ts=ts, features=features, item_features=item_features)
                self._insert((ts, item, clicks.tags[n].tobytes()), click)
            num_new.append(len({key for key, _ in self._pasts[user].clicks} - before))
            begin = end
        return num_new

    def _insert(self, key: OrderKey, click: Click) -> bool:
        """Whether the click was not there."""
        past = self._pasts.setdefault(click.user, _Past())
        if past.floor is not None and key <= past.floor:
            return True
        at = bisect.bisect_left(past.clicks, key, key=itemgetter(0))
        if at < len(past.clicks) and past.clicks[at][0] == key:
            return False
        past.clicks.insert(at, (key, click))
        del past.clicks[: -self.max_clicks]
        dropped = None
        while sum(len(pack_click(c, NO_WORDS)) for _, c in past.clicks) > self._max_bytes:
            dropped, _ = past.clicks.pop(0)
        if dropped is not None:
            past.floor = dropped
        elif len(past.clicks) == self.max_clicks:
            past.floor = None
        return True

    async def delete_user(self, user: str, *, at: float) -> None:
        self._users.pop(user, None)
        self._known.pop(user, None)
        self._pasts[user] = _Past(floor=(at, "", b""))

    async def put_users(self, rows: Mapping[str, Row]) -> None:
        self._users.update(rows)

    async def put_items(self, rows: Mapping[str, Row]) -> None:
        self._items.update({item: pack_row(row) for item, row in rows.items()})
        self._changes += rows
        if len(self._changes) > MAX_CHANGES:
            self._forgotten += len(self._changes)
            self._changes = []

    async def changed_items(self, since: str | None) -> ItemChanges:
        position = str(self._forgotten + len(self._changes))
        if since is None:
            return ItemChanges(items=(), position=position)
        read = int(since) - self._forgotten
        return ItemChanges(items=self._changes[read:] if read >= 0 else None, position=position)

    async def check(self) -> None:
        return

    async def ping(self) -> None:
        return

    async def aclose(self) -> None:
        return
