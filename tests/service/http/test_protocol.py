"""What a client can do to a connection, and when its requests came."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from service.errors import Overloaded
from service.http import protocol
from service.http.middleware import ARRIVED_AT, RefusalLog
from service.http.problems import Compressed
from service.http.protocol import MAX_HEAD_BYTES, LoopLag, protocol_class
from service.observability.metrics import Metrics

GET = b"GET /healthz HTTP/1.1\r\n"
POST = b"POST /predict HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b"


def post(body: bytes = b"{}") -> bytes:
    return POST % (len(body), body)


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.closed = b"", asyncio.Event()

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed.set()

    def write_eof(self) -> None:
        self.closed.set()

    def is_closing(self) -> bool:
        return self.closed.is_set()

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Endpoint:
    """POST /predict as the tests want it: `handle` answers, or keeps the reply for later."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.replies: list[Any] = []
        self.num_cancelled = 0
        self.handle: Callable[[Any], None] = lambda reply: reply.answer(b"{}", "one")

    def start(self, body: bytes, reply: Any, *, arrived_at: float) -> Callable[[], None]:
        assert arrived_at <= time.monotonic()
        self.bodies.append(body)
        self.replies.append(reply)
        self.handle(reply)
        return self._cancel

    def _cancel(self) -> None:
        self.num_cancelled += 1


class Client:
    """One connection, and the scopes of the requests that went through the app."""

    def __init__(self, *, max_age_s: float = 0, keep_alive_s: float = 60, cors: bool = False) -> None:
        self.scopes: list[Scope] = []
        self.asked = asyncio.Event()
        self.app_reads_bodies = False
        self.endpoint, self.metrics = Endpoint(), Metrics()
        config = uvicorn.Config(self._app, interface="asgi3", log_config=None, timeout_keep_alive=keep_alive_s)  # type: ignore[arg-type]
        endpoint: Any = self.endpoint
        kind: Any = protocol_class(
            endpoint,
            self.metrics,
            RefusalLog(),
            max_age_s=max_age_s,
            max_body_bytes=1000,
            cors=cors,
        )
        self.state = ServerState()
        self.connection = kind(config=config, server_state=self.state, app_state={})
        self.transport = Transport()
        self.connection.connection_made(self.transport)

    def answers(self) -> list[tuple[bytes, bytes]]:
        """The status line and the body of everything that was written."""
        found, rest = [], self.transport.written
        while rest:
            head, _, rest = rest.partition(b"\r\n\r\n")
            length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
            found.append((head.splitlines()[0], rest[:length]))
            rest = rest[length:]
        return found

    def says(self, data: bytes) -> None:
        self.connection.data_received(data)

    @property
    def problem(self) -> tuple[bytes, dict[str, Any]]:
        """The first line of what it was told, and the body."""
        head, _, body = self.transport.written.partition(b"\r\n\r\n")
        assert b"content-type: application/problem+json" in head
        return head.splitlines()[0], json.loads(body)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if self.app_reads_bodies:
            await receive()
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
    lag = LoopLag(busy=lambda: busy, clock=lambda: clock)

    async def read(*, busy_s: float, idle_s: float) -> tuple[float, float]:
        nonlocal busy, clock
        busy, clock = busy + busy_s, clock + busy_s + idle_s
        first = lag.seconds()
        busy, clock = busy + 1, clock + 1  # reading takes time too, and what it reads came before that
        both = first, lag.seconds()
        await asyncio.sleep(0)
        return both

    assert await read(busy_s=5, idle_s=0) == (0, 0)  # before the first, whatever that was
    assert await read(busy_s=5, idle_s=1) == (5, 5)
    assert await read(busy_s=3, idle_s=6) == (3, 3)
    assert await read(busy_s=3, idle_s=60) == (0, 0)
    assert await read(busy_s=0, idle_s=0) == (0, 0)


async def test_a_connection_notes_when_its_request_came(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoopLag, "seconds", lambda _: 4.0)

    client.says(GET + b"\r\n")
    await client.asked.wait()

    assert client.scopes[0]["state"][ARRIVED_AT] == pytest.approx(time.monotonic() - 2, abs=1)


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


async def test_a_prediction_is_answered_without_the_app(client: Client) -> None:
    client.says(post(b'{"a": 1}'))
    client.says(post(b'{"b": 2}'))

    assert client.answers() == [(b"HTTP/1.1 200 OK", b"{}")] * 2
    assert client.endpoint.bodies == [b'{"a": 1}', b'{"b": 2}']
    assert not client.scopes
    assert not client.transport.is_closing()
    assert client.metrics.requests("/predict", "200", "one").value == 2


async def test_a_body_may_come_in_pieces(client: Client) -> None:
    for byte in post(b'{"candidates": []}'):
        client.says(bytes([byte]))

    assert client.endpoint.bodies == [b'{"candidates": []}']


async def test_requests_that_come_together_are_answered_in_their_order(client: Client) -> None:
    client.says(post(b"1") + post(b"2") + post(b"3"))

    assert client.endpoint.bodies == [b"1", b"2", b"3"]
    assert len(client.answers()) == 3


async def test_an_answer_that_comes_later_goes_to_its_connection(client: Client) -> None:
    client.endpoint.handle = lambda _: None

    client.says(post())
    assert not client.transport.written
    client.endpoint.replies[0].answer(b'{"late": 1}', "one")

    assert client.answers() == [(b"HTTP/1.1 200 OK", b'{"late": 1}')]


async def test_the_next_request_before_an_answer_waits_for_it(client: Client) -> None:
    client.endpoint.handle = lambda _: None
    client.says(post())

    client.says(GET + b"\r\n")
    await asyncio.sleep(0)
    assert not client.transport.written
    client.endpoint.replies[0].answer(b"{}", "one")
    await client.asked.wait()

    assert [line for line, _ in client.answers()] == [b"HTTP/1.1 200 OK"] * 2


async def test_a_refusal_is_a_problem_and_the_connection_stays(client: Client) -> None:
    client.endpoint.handle = lambda reply: reply.refuse(Overloaded("too much"))

    client.says(post())
    client.says(post())

    (line, body), _ = client.answers()
    assert line == b"HTTP/1.1 503 Service Unavailable"
    assert json.loads(body)["detail"] == "too much"
    assert b"retry-after: 1" in client.transport.written
    assert not client.transport.is_closing()
    assert client.metrics.rejected("overloaded").value == 2
    assert client.metrics.requests("/predict", "503", "none").value == 2


async def test_a_refusal_that_leaves_a_body_unread_ends_the_connection(client: Client) -> None:
    client.endpoint.handle = lambda reply: reply.refuse(Compressed("gzip"))

    client.says(post())

    assert b"connection: close" in client.transport.written
    assert client.transport.is_closing()


@pytest.mark.parametrize("reads", [False, True])
async def test_an_answer_in_place_of_100_continue_ends_the_connection_and_one_to_the_body_does_not(
    client: Client, *, reads: bool
) -> None:
    client.app_reads_bodies = reads

    client.says(b"POST /events HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
    await asyncio.sleep(0)
    assert client.transport.written.startswith(b"HTTP/1.1 100 Continue" if reads else b"HTTP/1.1 200 OK")
    client.says(b"{}")
    await client.asked.wait()

    assert (b"connection: close" in client.transport.written) == (not reads)
    assert client.transport.is_closing() == (not reads)


async def test_an_unforeseen_error_is_a_500_that_tells_nothing(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    client.endpoint.handle = lambda reply: reply.refuse(KeyError("secret"))

    client.says(post())

    assert client.answers()[0][0] == b"HTTP/1.1 500 Internal Server Error"
    assert b"secret" not in client.transport.written
    assert "secret" in caplog.text
    assert client.metrics.rejected("internal").value == 1


async def test_a_client_that_has_gone_ends_its_work_and_an_answer_to_it_harms_nobody(client: Client) -> None:
    client.endpoint.handle = lambda _: None
    client.says(post())

    client.transport.close()
    client.connection.connection_lost(None)
    client.endpoint.replies[0].answer(b"{}", "one")  # from inside the store's callback: it must not raise

    assert client.endpoint.num_cancelled == 1
    assert not client.transport.written
    assert client.metrics.requests("/predict", "499", "none").value == 1


@pytest.mark.parametrize(
    "head",
    [
        b"GET /predict HTTP/1.1\r\n\r\n",
        b"POST /predict/ HTTP/1.1\r\ncontent-length: 0\r\n\r\n",
        b"POST /predict HTTP/1.0\r\ncontent-length: 0\r\n\r\n",
        b"POST /predict HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"POST /predict HTTP/1.1\r\ncontent-encoding: gzip\r\ncontent-length: 0\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n",
        b"POST /predict HTTP/1.1\r\ncontent-length: 1001\r\n\r\n",
    ],
)
async def test_what_is_unusual_goes_through_the_app(client: Client, head: bytes) -> None:
    client.says(head)
    await client.asked.wait()

    assert len(client.scopes) == 1
    assert not client.endpoint.bodies


@pytest.mark.parametrize("cors", [False, True])
async def test_a_pages_prediction_goes_through_the_app_where_pages_may_ask_and_else_as_any(*, cors: bool) -> None:
    client = Client(cors=cors)

    client.says(b"POST /predict HTTP/1.1\r\norigin: https://shop.example\r\ncontent-length: 2\r\n\r\n{}")
    if cors:
        await client.asked.wait()

    assert (len(client.scopes), len(client.endpoint.bodies)) == ((1, 0) if cors else (0, 1))
    client.connection.connection_lost(None)


async def test_a_body_that_drips_is_refused(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "BODY_S", 0.01)

    client.says(b"POST /predict HTTP/1.1\r\ncontent-length: 9\r\n\r\n{")
    async with asyncio.timeout(5):
        await client.transport.closed.wait()

    assert client.answers()[0][0] == b"HTTP/1.1 408 Request Timeout"
    assert not client.endpoint.bodies


async def test_a_server_that_stops_ends_connections_with_their_answers(client: Client) -> None:
    client.says(post())
    assert not client.transport.is_closing()

    client.state.default_headers = [(b"connection", b"close")]
    client.says(post())

    assert client.transport.is_closing()
    assert len(client.answers()) == 2


async def test_a_shutdown_waits_for_the_answer_under_way(client: Client) -> None:
    client.endpoint.handle = lambda _: None
    client.says(post())

    client.connection.shutdown()
    assert not client.transport.is_closing()
    client.endpoint.replies[0].answer(b"{}", "one")

    assert client.transport.is_closing()
    assert b"connection: close" in client.transport.written
