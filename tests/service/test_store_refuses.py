"""A store that takes no writes is told as what it is, and predictions go on."""

import time
from collections.abc import Awaitable, Callable

import pytest
from redis import Redis

from service.settings import SettingsError
from service.store.local_cluster import LocalCluster
from service.store.local_server import RedisServer
from tests.service.conftest import Running, Start

Eventually = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


def click(event_id: str) -> dict[str, object]:
    return {"event_id": event_id, "type": "click", "ts": time.time(), "user": "u1", "item": "a1"}


async def standing(service: Running, cause: str) -> float:
    return await service.metric(f'clickserve_store_state{{cause="{cause}"}}')


@pytest.mark.parametrize(
    ("cause", "begin", "end"),
    [
        ("oom", ["CONFIG", "SET", "maxmemory", "1"], ["CONFIG", "SET", "maxmemory", "0"]),
        ("readonly", ["REPLICAOF", "127.0.0.1", "1"], ["REPLICAOF", "NO", "ONE"]),
        ("noperm", ["ACL", "SETUSER", "default", "-set"], ["ACL", "SETUSER", "default", "+set"]),
    ],
)
async def test_a_server_that_refuses_writes_is_told_by_its_cause_until_it_takes_one(
    start: Start, own_redis: RedisServer, cause: str, begin: list[str], end: list[str]
) -> None:
    with Redis.from_url(own_redis.url) as server:
        async with start(redis_url=own_redis.url, store_timeout_ms=5000) as service:
            assert await standing(service, cause) == 0
            server.execute_command(*begin)

            refused = await service.client.post("/events", json=[click("1")])
            answered = await service.predict(user={"id": "u1"}, candidates=[{"id": "a1"}])
            ready = (await service.client.get("/readyz")).json()
            during = await standing(service, cause)
            server.execute_command(*end)
            taken = await service.client.post("/events", json=[click("1")])
            after = await standing(service, cause)
            healed = (await service.client.get("/readyz")).json()
            counted = await service.metric(f'clickserve_store_failures_total{{cause="{cause}"}}')

    assert refused.status_code == 503
    assert "the store refused: " in refused.json()["detail"]
    assert (answered.status_code, answered.json()["degraded"]) == (200, [])
    assert (ready["status"], list(ready["store"]["failing"])) == ("degraded", [cause])
    assert (taken.status_code, taken.json()["accepted"]) == (202, 1)
    assert (healed["status"], "failing" in healed["store"]) == ("ready", False)
    assert (during, after) == (1, 0)
    assert counted >= 1


async def test_a_cluster_named_as_one_server_is_refused_at_the_start(start: Start, cluster: LocalCluster) -> None:
    server = cluster.primaries[0]

    with pytest.raises(SettingsError, match="redis\\+cluster"):
        async with start(redis_url=f"redis://127.0.0.1:{server.port}"):
            pass


async def test_a_click_is_in_the_next_score_on_a_cluster(start: Start, cluster: LocalCluster) -> None:
    async with start(redis_url=cluster.url, store_timeout_ms=5000) as service:
        await service.store.put_items({"a1": {"price": 3.0, "genres": ["x"]}})
        before = await service.predict(user={"id": "u1"}, candidates=[{"id": f"a{n}"} for n in range(30)])
        taken = await service.client.post("/events", json=[click("1")])
        shown = [event.item for event in (await service.store.fetch("u1", [], before=1e12, limit=9)).behaviours]

    assert (before.status_code, before.json()["degraded"]) == (200, [])
    assert taken.json()["accepted"] == 1
    assert shown == ["a1"]
