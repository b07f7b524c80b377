"""Changed features of an ad are served by whoever kept the old ones, and nothing else is read again."""

from collections.abc import Awaitable, Callable

import pytest

from service.scoring.item_changes import ItemChangeFollower
from service.store.feature_store import ItemChanges, StoreUnavailable
from service.store.memory_store import MemoryStore
from tests.service.conftest import Running, Start

Eventually = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


class Recorder:
    """A model, of whose inputs it notes what is expired."""

    def __init__(self) -> None:
        self.inputs = self
        self.expired: list[list[str] | None] = []

    def expire_items(self, items: list[str] | None) -> None:
        self.expired.append(items)


class Store(MemoryStore):
    is_down = False

    async def changed_items(self, since: str | None) -> ItemChanges:
        if self.is_down:
            raise StoreUnavailable("down")
        return await super().changed_items(since)


async def test_what_changed_is_expired_once_and_everything_after_the_store_was_away() -> None:
    store, recorder = Store(), Recorder()
    follower = ItemChangeFollower(store=store, models=lambda: [recorder])  # type: ignore[list-item]
    await store.put_items({"before": {}})

    await follower.poll()
    await store.put_items({"a1": {}})
    await follower.poll()
    await follower.poll()
    store.is_down = True
    await follower.poll()
    store.is_down = False
    await follower.poll()
    await follower.poll()

    assert recorder.expired == [None, ["a1"], None]


@pytest.mark.parametrize("on_redis", [False, True], ids=["memory", "redis"])
async def test_new_features_of_an_ad_are_served_within_a_second(
    start: Start, request: pytest.FixtureRequest, eventually: Eventually, on_redis: bool
) -> None:
    url = request.getfixturevalue("redis_url") if on_redis else None
    async with start(redis_url=url, store_timeout_ms=5000, item_cache_s=3600) as service:
        first = await _scores(service)
        assert await _scores(service) == first

        await service.store.put_items({"a1": {"price": 100.0, "genres": ["x"]}})

        async def has_changed() -> bool:
            return await _scores(service) != first

        await eventually(has_changed)


async def _scores(service: Running) -> list[float]:
    answer = await service.predict(user={"id": "u1"}, candidates=[{"id": "a1"}, {"id": "a2"}])
    return [prediction["ctr"] for prediction in answer.json()["predictions"]]
