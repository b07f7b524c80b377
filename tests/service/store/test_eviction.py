"""A full server under volatile-ttl lets event tags go, and no history."""

from contextlib import aclosing

import redis

from service.store.codec import Click, Mark
from service.store.keys import KeySpace
from service.store.local_server import RedisServer
from service.store.redis_store import RedisStore

KEYS = KeySpace("cs")
USERS = [f"user {number}" for number in range(200)]


async def test_at_the_bound_of_memory_tags_are_evicted_and_no_users_history(own_redis: RedisServer) -> None:
    with redis.Redis.from_url(own_redis.url) as server:
        async with aclosing(RedisStore.connect(own_redis.url, timeout_s=5.0)) as store:
            for user in USERS:
                await store.append([Click(event_id=f"{n}", user=user, item="ad1", ts=float(n)) for n in range(20)])
            server.config_set("maxmemory-policy", "volatile-ttl")
            server.config_set("maxmemory", int(server.info("memory")["used_memory"]) + 1_000_000)
            call = 0
            while int(server.info("stats")["evicted_keys"]) < 2000:  # ten times the histories
                call += 1
                owners = [f"somebody {call} {n}" for n in range(500)]
                await store.append([Mark(type="impression", event_id="1", owner=owner, ts=1.0) for owner in owners])

            histories = server.exists(*(KEYS.behaviours(user) for user in USERS))

    assert histories == len(USERS)
