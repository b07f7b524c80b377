"""What a client can do to a connection, and when its requests came."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from service.http import protocol
from service.http.middleware import CAME_AT
from service.http.protocol import MAX_HEAD_BYTES, _Away, connections_of

GET = b"GET /healthz HTTP/1.1\r\n"


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.closed = b"", asyncio.Event()

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed.set()

    def is_closing(self) -> bool:
        return self.closed.is_set()

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Client:
    """One connection, and the scopes of the requests that came through it."""

    def __init__(self, *, max_age_s: float = 0, keep_alive_s: float = 60) -> None:
        self.scopes: list[Scope] = []
        self.asked = asyncio.Event()
        config = uvicorn.Config(self._app, interface="asgi3", log_config=None)
        kind: Any = connections_of(max_age_s, keep_alive_s=keep_alive_s)
        self.connection = kind(config=config, server_state=ServerState(), app_state={})
        self.transport = Transport()
        self.connection.connection_made(self.transport)

    def says(self, data: bytes) -> None:
        self.connection.data_received(data)

    @property
    def problem(self) -> tuple[bytes, dict[str, Any]]:
        """The first line of what it was told, and the body."""
        head, _, body = self.transport.written.partition(b"\r\n\r\n")
        assert b"content-type: application/problem+json" in head
        return head.splitlines()[0], json.loads(body)

    async def _app(self, scope: Scope, _receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})
        self.asked.set()


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    client = Client()
    yield client
    client.connection.connection_lost(None)


async def test_what_is_read_in_one_go_waited_while_the_loop_was_busy_and_not_while_it_was_idle() -> None:
    busy = clock = 100.0
    away = _Away(busy=lambda: busy, clock=lambda: clock)

    async def read(*, busy_s: float, idle_s: float) -> tuple[float, float]:
        nonlocal busy, clock
        busy, clock = busy + busy_s, clock + busy_s + idle_s
        first = away.seconds()
        busy, clock = busy + 1, clock + 1  # reading takes time too, and what it reads came before that
        both = first, away.seconds()
        await asyncio.sleep(0)
        return both

    assert await read(busy_s=5, idle_s=0) == (0, 0)  # before the first, whatever that was
    assert await read(busy_s=5, idle_s=1) == (5, 5)
    assert await read(busy_s=3, idle_s=6) == (3, 3)
    assert await read(busy_s=3, idle_s=60) == (0, 0)
    assert await read(busy_s=0, idle_s=0) == (0, 0)


async def test_a_connection_notes_when_its_request_came(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Away, "seconds", lambda _: 4.0)

    client.says(GET + b"\r\n")
    await client.asked.wait()

    assert client.scopes[0]["state"][CAME_AT] == pytest.approx(time.monotonic() - 2, abs=1)


async def test_headers_without_end_are_refused_before_they_are_taken_in(client: Client) -> None:
    client.says(GET + b"X: ")
    for _ in range(MAX_HEAD_BYTES // 1024):
        client.says(b"x" * 1024)
        assert not client.transport.written

    client.says(b"x")

    assert client.problem == (
        b"HTTP/1.1 431 Request Header Fields Too Large",
        {
            "type": "about:blank",
            "title": "Request Header Fields Too Large",
            "status": 431,
            "detail": f"the request's headers are larger than {MAX_HEAD_BYTES} bytes",
        },
    )
    assert client.transport.is_closing()
    assert not client.scopes


async def test_large_heads_one_after_the_other_are_none_without_end(client: Client) -> None:
    for _ in range(3):
        client.says(GET + b"X: ")
        client.says(b"x" * (MAX_HEAD_BYTES - 10))
        client.says(b"\r\n\r\n")
        await client.asked.wait()
        client.asked.clear()

    assert len(client.scopes) == 3
    assert not client.transport.is_closing()


async def test_headers_that_drip_are_refused(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", 0.01)

    client.says(GET)
    client.says(b"X: y\r\n")
    async with asyncio.timeout(5):
        await client.transport.closed.wait()

    assert client.problem[0] == b"HTTP/1.1 408 Request Timeout"
    assert client.problem[1]["detail"] == "the request's headers did not arrive within 0.01 s"


async def test_who_connects_and_says_nothing_is_not_waited_for() -> None:
    client = Client(keep_alive_s=0.01)

    async with asyncio.timeout(5):
        await client.transport.closed.wait()

    assert not client.transport.written


async def test_what_is_no_http_is_told_as_everything_else(client: Client) -> None:
    client.says(b"hello\r\n\r\n")

    assert client.problem[0] == b"HTTP/1.1 400 Bad Request"


async def test_a_connection_that_is_old_ends_with_its_answer() -> None:
    client = Client(max_age_s=1e-9)

    client.says(GET + b"\r\n")
    await client.asked.wait()

    assert b"connection: close" in client.transport.written.lower()
