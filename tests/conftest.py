"""What tests share: a real Redis server, and waiting for what another process does."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest
from hypothesis import HealthCheck, settings

from service.store import local_cluster, local_server
from service.store.local_cluster import LocalCluster, WatchedServers
from service.store.local_server import NoRedisServer, RedisServer

# A law holds however slow the machine is.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# Under nohup SIGHUP is ignored, in children too, and no supervisor would reload.
signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture(scope="session")
def session_redis() -> Iterator[RedisServer]:
    """One real server for all tests that need no server of their own. Skips on a laptop without one, fails in CI."""
    try:
        local_server.binary()
    except NoRedisServer as err:
        if os.environ.get("CI"):
            pytest.fail(str(err))
        pytest.skip(str(err))
    with local_server.start() as server:
        yield server


@pytest.fixture
def own_redis(session_redis: RedisServer) -> Iterator[RedisServer]:
    """A server for one test to freeze, fill or kill."""
    with local_server.start() as server:
        yield server


@pytest.fixture
def redis_url(session_redis: RedisServer) -> str:
    """An empty real server."""
    import redis

    with redis.Redis.from_url(session_redis.url) as client:
        client.flushall()
    return session_redis.url


@pytest.fixture(scope="session")
def session_cluster(session_redis: RedisServer) -> Iterator[LocalCluster]:
    with local_cluster.start_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(session_cluster: LocalCluster) -> LocalCluster:
    """An empty Cluster, for a test to kill servers of; they are started again for the next one."""
    session_cluster.mend()
    for server in session_cluster.primaries:
        server.ask("FLUSHALL")
    return session_cluster


@pytest.fixture
def watched(session_redis: RedisServer) -> Iterator[WatchedServers]:
    """A primary, its replica and three Sentinels, for one test."""
    with local_cluster.start_watched() as servers:
        yield servers


Condition = Callable[[], Awaitable[bool]]


@pytest.fixture
def eventually() -> Callable[[Condition], Awaitable[None]]:
    """Waits until an async condition holds; fails after ten seconds. For what another process or task does."""

    async def wait(condition: Condition) -> None:
        deadline = time.monotonic() + 10
        while not await condition():
            assert time.monotonic() < deadline, "the condition did not come true within ten seconds"
            await asyncio.sleep(0.005)

    return wait
