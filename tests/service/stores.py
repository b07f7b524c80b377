"""Stores that fail as the tests want, and what the tests of the Redis store say to it."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from service.store.codec import Click, Mark
from service.store.feature_store import OnFetched, Outcome, StoreUnavailable
from service.store.memory_store import MemoryStore
from service.store.redis_store import RedisStore


def click(number: int, *, user: str = "u1", item: str = "ad1", **features: str) -> Click:
    return Click(event_id=f"e{number}", user=user, item=item, ts=float(number), features=features)


async def past(store: RedisStore, user: str = "u1") -> list[float]:
    return [event.ts for event in (await store.fetch(user, [], before=1e12, limit=1000)).behaviours]


async def answers(store: RedisStore) -> bool:
    try:
        await store.fetch("u1", ["ad1"], before=1e12, limit=1)
    except StoreUnavailable:
        return False
    return True


class BrokenStore(MemoryStore):
    """A store that answers nothing while `is_down`."""

    is_down = True

    def fetch_soon(self, user: str | None, items: Sequence[str], on_fetched: OnFetched, **options: Any) -> None:
        if self.is_down:
            on_fetched(StoreUnavailable("down"))
        else:
            super().fetch_soon(user, items, on_fetched, **options)

    async def append(self, events: Sequence[Click | Mark]) -> list[Outcome]:
        if self.is_down:
            raise StoreUnavailable("down")
        return await super().append(events)

    async def ping(self) -> None:
        if self.is_down:
            raise StoreUnavailable("down")


class SlowStore(MemoryStore):
    """A store whose answers come when they are `released`, or too late."""

    def __init__(self) -> None:
        super().__init__()
        self.was_asked, self.released = asyncio.Event(), asyncio.Event()

    def fetch_soon(
        self,
        user: str | None,
        items: Sequence[str],
        on_fetched: OnFetched,
        *,
        before: float,
        limit: int,
        timeout_s: float | None = None,
    ) -> None:
        self.was_asked.set()
        fetch = partial(super().fetch_soon, user, items, on_fetched, before=before, limit=limit)
        if self.released.is_set():
            fetch()
            return

        async def wait() -> None:
            try:
                async with asyncio.timeout(timeout_s):
                    await self.released.wait()
            except TimeoutError:
                on_fetched(StoreUnavailable("late"))
            else:
                fetch()

        self._waiting = asyncio.create_task(wait())
