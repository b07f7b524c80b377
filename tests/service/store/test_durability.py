"""An event is taken when it has reached what the settings ask for."""

from contextlib import aclosing

import pytest
import redis

from service.store.feature_store import Outcome, StoreUnavailable
from service.store.local_cluster import WatchedServers
from service.store.local_server import RedisServer
from service.store.redis_store import Durability, RedisStore
from tests.service.stores import click


async def test_a_click_is_on_disk_when_it_is_taken(own_redis: RedisServer) -> None:
    with redis.Redis.from_url(own_redis.url) as server:
        async with aclosing(RedisStore.connect(own_redis.url, timeout_s=2.0, durability="disk")) as store:
            server.config_set("appendfsync", "everysec")
            server.config_set("appendonly", "yes")

            assert await store.append([click(1)]) == [Outcome.NEW]


@pytest.mark.parametrize("durability", ["disk", "replica"])
async def test_what_does_not_get_there_is_refused_and_a_duplicate_when_it_is_sent_again(
    own_redis: RedisServer, durability: Durability
) -> None:
    async with aclosing(RedisStore.connect(own_redis.url, timeout_s=0.4, durability=durability)) as store:
        with pytest.raises(StoreUnavailable, match="not with a replica yet|refused: ERR WAITAOF cannot be used"):
            await store.append([click(1)])
    async with aclosing(RedisStore.connect(own_redis.url, timeout_s=2.0)) as store:
        assert await store.append([click(1)]) == [Outcome.KNOWN]


async def test_a_click_is_with_a_replica_when_it_is_taken(watched: WatchedServers) -> None:
    async with aclosing(RedisStore.connect(watched.url, timeout_s=5.0, durability="replica")) as store:
        assert await store.append([click(1)]) == [Outcome.NEW]
