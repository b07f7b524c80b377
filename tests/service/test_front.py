"""The straight way of /predict: what it answers, and what happens when its client leaves."""

import asyncio
from typing import Any

import pytest

from service.features import Fetched, MemoryStore
from tests.service.conftest import Start

SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b""}
BODY = b'{"user": {"id": "u1"}, "candidates": [{"id": "a1"}]}'


class Stuck(MemoryStore):
    """A store that answers nobody, and tells when it is asked and when the asker has gone."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.left = asyncio.Event(), asyncio.Event()

    async def fetch(self, *_: Any, **__: Any) -> Fetched:
        self.asked.set()
        try:
            return await asyncio.Future()
        finally:
            self.left.set()


async def test_a_client_that_leaves_ends_the_work_for_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Stuck()
    monkeypatch.setattr("service.app.MemoryStore", lambda **_: store)
    messages = [{"type": "http.request", "body": BODY, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await store.asked.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pytest.fail(f"nobody is there to read {message}")

    async with start() as service:
        await service.app(dict(SCOPE), receive, send)

        assert store.left.is_set()
        assert await service.metric('clickserve_requests_total{arm="none",route="/predict",status="499"}') == 1


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
