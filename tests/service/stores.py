"""What the tests of the Redis store say to it."""

from service.store.codec import Click
from service.store.feature_store import StoreUnavailable
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
