"""The store dies or freezes while requests flow: every one is answered, readiness tells, and it heals by itself."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest

from service.store import local_server
from service.store.local_server import RedisServer
from tests.service.conftest import Running, Start

Eventually = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


class Fault:
    """A server with data on disk that can be taken away and given back under the same address."""

    def __init__(self, folder: Path, servers: ExitStack, how: signal.Signals) -> None:
        self._folder, self._servers, self._how = folder, servers, how
        self._server = self._start()

    @property
    def url(self) -> str:
        return self._server.url

    def strike(self) -> None:
        os.kill(self._server.pid, self._how)

    def heal(self) -> None:
        if self._how == signal.SIGSTOP:
            os.kill(self._server.pid, signal.SIGCONT)
        else:
            self._server = self._start()

    def _start(self) -> RedisServer:
        return self._servers.enter_context(local_server.start(self._folder, durable=True))


@contextmanager
def prepared(how: signal.Signals) -> Iterator[Fault]:
    with TemporaryDirectory(prefix="clickserve-test-") as folder, ExitStack() as servers:
        yield Fault(Path(folder), servers, how)


class Traffic:
    """Clients that ask without pause, and what they were told."""

    def __init__(self, service: Running) -> None:
        self._service = service
        self._flowing = True
        self.statuses: list[int] = []
        self.answers: list[dict[str, Any]] = []

    async def ask(self) -> httpx.Response:
        return await self._service.predict(user={"id": "u1"}, candidates=[{"id": "a1"}, {"id": "a2"}])

    async def flow(self) -> None:
        while self._flowing:
            response = await self.ask()
            self.statuses.append(response.status_code)
            self.answers.append(response.json())

    def stop(self) -> None:
        self._flowing = False

    async def is_degraded(self) -> bool:
        return "behaviours_unavailable" in self.answers[-1].get("degraded", ()) if self.answers else False

    async def is_whole(self) -> bool:
        return bool(self.answers) and self.answers[-1].get("degraded") == []


def click(number: int, item: str) -> dict[str, Any]:
    return {"event_id": f"e{number}", "type": "click", "ts": 1000.0 + number, "user": "u1", "item": item}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_every_request_is_answered_and_the_past_is_whole_again_afterwards(
    how: signal.Signals, session_redis: RedisServer, start: Start, eventually: Eventually
):
    with prepared(how) as redis:
        async with start(redis_url=redis.url, store_timeout_ms=300) as service, asyncio.TaskGroup() as clients:
            traffic = Traffic(service)
            for _ in range(3):
                clients.create_task(traffic.flow())

            async def store_is_ready() -> bool:
                return bool((await service.client.get("/readyz")).json()["store"]["ok"])

            try:
                assert (await service.client.post("/events", json=[click(1, "a1")])).status_code == 202
                with_past = (await traffic.ask()).json()["predictions"]

                redis.strike()
                await eventually(traffic.is_degraded)
                ready = await service.client.get("/readyz")
                refused = await service.client.post("/events", json=[click(2, "a2")])

                assert ready.status_code == 200
                assert ready.json()["store"]["ok"] is False
                assert refused.status_code == 503
                assert int(refused.headers["retry-after"]) >= 1
                assert traffic.answers[-1]["predictions"] != with_past

                redis.heal()
                await eventually(traffic.is_whole)
                await eventually(store_is_ready)
                again = await service.client.post("/events", json=[click(1, "a1"), click(2, "a2")])

                # The click refused above may still have lain in a frozen server's socket: then it is a duplicate now.
                assert again.status_code == 202
                assert again.json()["duplicates"] in ((1, 2) if how == signal.SIGSTOP else (1,))
                fetched = await service.store.fetch("u1", [], before=1e9, limit=10)
                assert [event.item for event in fetched.behaviours] == ["a1", "a2"]
            finally:
                traffic.stop()

        assert set(traffic.statuses) == {200}
