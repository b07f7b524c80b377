"""What is stored of a user is shown and removed, to operators alone."""

import time
from typing import Any

import pytest

from tests.service.conftest import Running, Start

TOKEN = {"authorization": "Bearer s3cret"}


def event(event_id: str, ts: float, **fields: Any) -> dict[str, Any]:
    return {"event_id": event_id, "type": "click", "ts": ts, "user": "a/b c", "item": "a1", **fields}


async def shown(service: Running) -> Any:
    return (await service.client.get("/users/a%2Fb%20c", headers=TOKEN)).json()


@pytest.mark.parametrize("on_redis", [False, True], ids=["memory", "redis"])
async def test_a_deleted_user_is_gone_and_what_comes_late_of_before_stays_out(
    start: Start, request: pytest.FixtureRequest, on_redis: bool
) -> None:
    url = request.getfixturevalue("redis_url") if on_redis else None
    async with start(admin_token="s3cret", redis_url=url, store_timeout_ms=5000) as service:
        now = time.time()
        await service.store.put_users({"a/b c": {"gender": "F"}})
        await service.client.post("/events", json=[event("1", now - 9, features={"coins": 3})])
        before = await shown(service)

        gone = await service.client.delete("/users/a%2Fb%20c", headers=TOKEN)
        await service.client.post("/events", json=[event("1", now - 9), event("2", now - 5), event("3", now + 60)])
        after = await shown(service)

    click = {"item": "a1", "features": {"coins": 3}, "context": {}, "item_features": {}}
    assert [before["features"], [c | {"ts": 0} for c in before["behaviours"]]] == [{"gender": "F"}, [click | {"ts": 0}]]
    assert before["behaviours"][0]["ts"] == pytest.approx(now - 9, abs=1e-4)
    assert gone.status_code == 204
    assert after["features"] is None
    assert [c["ts"] for c in after["behaviours"]] == [pytest.approx(now + 60, abs=1e-4)]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_only_operators_see_and_remove_users(start: Start, method: str) -> None:
    async with start(admin_token="s3cret") as service:
        refused = await service.client.request(method, "/users/u1", headers={"authorization": "Bearer wrong"})
    async with start() as service:
        closed = await service.client.request(method, "/users/u1", headers=TOKEN)

    assert (refused.status_code, closed.status_code) == (401, 403)
