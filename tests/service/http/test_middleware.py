"""What goes through the framework: the same answers, each counted once, and none for a client that has gone."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from service.http.middleware import ARRIVED_AT
from tests.service.conftest import Start
from tests.service.stores import SlowStore

SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b""}
BODY = b'{"user": {"id": "u1"}, "candidates": [{"id": "a1"}]}'


async def test_a_client_that_leaves_ends_the_work_for_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SlowStore()
    monkeypatch.setattr("service.app.MemoryStore", lambda **_: store)
    messages = [{"type": "http.request", "body": BODY, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await store.was_asked.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pytest.fail(f"nobody is there to read {message}")

    async with start() as service:
        await service.app(dict(SCOPE), receive, send)

        assert service.parts.scorer._admission.backlog_s == 0
        assert not any(model.served.leases for model in service.parts.registry.models.values())
        assert await service.metric('clickserve_requests_total{arm="none",route="/predict",status="499"}') == 1
        store.released.set()
        await asyncio.sleep(0)  # what the store answers now is for nobody


async def test_a_body_may_come_in_pieces(start: Start) -> None:
    pieces = [BODY[at : at + 7] for at in range(0, len(BODY), 7)]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    async with start() as service:
        await service.app(dict(SCOPE), receive, send)
        whole = await service.client.post("/predict", content=BODY)

    start_of_answer, body = sent
    assert start_of_answer["status"] == 200
    assert dict(start_of_answer["headers"])[b"content-length"] == str(len(body["body"])).encode()
    assert body["body"].partition(b'"experiment"')[2] == whole.content.partition(b'"experiment"')[2]


async def test_behind_a_prefix_the_routing_finds_the_same_answer(start: Start) -> None:
    async with start() as service:
        straight = await service.predict(request_id="r", ts=5, candidates=[{"id": "a1"}])
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            body = b'{"request_id": "r", "ts": 5, "candidates": [{"id": "a1"}]}'
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await service.app({**SCOPE, "root_path": "/ads", "path": "/ads/predict"}, receive, send)

    assert sent[0]["status"] == 200
    assert sent[1]["body"] == straight.content


async def test_a_flood_of_refusals_is_logged_once_a_second_with_their_number(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "service.http.middleware")
    async with start() as service:
        for _ in range(5):
            late = await service.predict(candidates=[{"id": "a1"}], timeout_ms=1e-6)
        monkeypatch.setattr("service.http.middleware.LOG_EVERY_S", 0.0)
        wrong = [await service.predict(candidates=[]) for _ in range(2)]
        entries = [vars(record) for record in caplog.records if record.msg == "refused"]
        monkeypatch.setattr(
            "service.http.middleware.time", SimpleNamespace(monotonic=lambda: 1e12, perf_counter=time.perf_counter)
        )
        await service.predict(candidates=[{"id": "a1"}], timeout_ms=1e-6)
        later = vars(caplog.records[-1])["times"]
        counted = await service.metric('clickserve_rejected_total{reason="deadline"}')

    assert (late.status_code, late.headers["content-type"]) == (504, "application/problem+json")
    assert late.json()["detail"] == "no score within 1e-06 ms"
    assert [answer.status_code for answer in wrong] == [422, 422]
    assert [(entry["reason"], entry.get("times", 1)) for entry in entries] == [
        ("deadline", 1),
        ("invalid", 1),
        ("invalid", 1),
    ]
    assert later == 5
    assert counted == 6


async def test_a_request_that_came_long_before_its_task_began_is_late_before_any_work(start: Start) -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    async with start(timeout_ms=500) as service:
        for ago_s in (0.1, 0.6):
            scope = {**SCOPE, "state": {ARRIVED_AT: time.monotonic() - ago_s}}
            await service.app(scope, receive, send)
        fetched = await service.metric('clickserve_store_seconds_count{op="fetch"}')

    assert [message["status"] for message in sent[::2]] == [200, 504]
    assert fetched == 1


async def test_requests_without_an_id_get_one_each(start: Start) -> None:
    async with start() as one, start() as other:
        answers = [await service.predict(candidates=[{"id": "a1"}]) for service in (one, other) for _ in range(3)]

    assert len({answer.json()["request_id"] for answer in answers}) == 6
