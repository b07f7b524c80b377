"""HTTP connections: limits on headers and age, and POST /predict answered without an ASGI cycle or a task."""

import asyncio
import logging
import math
import random
import time
from asyncio import BaseTransport, TimerHandle
from collections.abc import Callable

from uvicorn._types import ASGISendCallable, ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.errors import Refusal
from service.http.middleware import ARRIVED_AT, RefusalLog
from service.http.predict import ROUTE, Cancel, PredictEndpoint, arm_of
from service.http.problems import (
    BadHTTP,
    BodyTooSlow,
    HeadersTooLarge,
    HeadersTooSlow,
    Internal,
    response_bytes,
    rule_of,
)
from service.observability.metrics import NO_ARM, Metrics

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 * 2**10  # of a request's first line and headers, beside what is read with their beginning
HEAD_S = 10.0  # for all of them to come
BODY_S = 10.0  # for a client to send a body
LINGER_S = 5.0  # for a client that is still sending to read why it should not

_PATH = ROUTE.encode()
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%b\r\n"
# With these a request goes through FastAPI, which knows what to do with them.
_UNUSUAL = frozenset((b"transfer-encoding", b"content-encoding", b"expect", b"upgrade"))


class PredictCall:
    """One POST /predict on its connection, in the place of uvicorn's RequestResponseCycle."""

    __slots__ = (
        "_arrived_at",
        "_cancel",
        "_chunks",
        "_protocol",
        "_started",
        "disconnected",
        "keep_alive",
        "more_body",
        "response_complete",
        "timer",
    )

    def __init__(self, protocol: "PredictProtocol", *, arrived_at: float, keep_alive: bool) -> None:
        self._protocol = protocol
        self._arrived_at = arrived_at
        self._started = time.perf_counter()
        self._chunks: list[bytes] = []
        self._cancel: Cancel | None = None
        self.timer: TimerHandle | None = None  # while the body is incomplete
        self.keep_alive = keep_alive
        self.more_body = True
        self.disconnected = False
        self.response_complete = False

    @property
    def message_event(self) -> "PredictCall":
        return self

    def set(self) -> None:
        """The server signals a part of the body or the end of the connection, each of which is handled here anyway."""

    def receive_body(self, chunk: bytes) -> None:
        self._chunks.append(chunk)

    def start(self) -> None:
        """The body is complete."""
        self.more_body = False
        if self.timer is not None:
            self.timer.cancel()
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        cancel = self._protocol.endpoint.start(body, self, arrived_at=self._arrived_at)
        if not self.response_complete:
            self._cancel = cancel

    def answer(self, body: bytes, arm: str) -> None:
        self._send(_HEAD % (len(body), self._protocol.default_head(self)) + body)
        self._count("200", arm)

    def refuse(self, error: Exception) -> None:
        if isinstance(error, Refusal):
            refusal = error
        else:
            log.error("unforeseen error", exc_info=error, extra={"route": ROUTE})
            refusal = Internal()
        arm = arm_of(refusal)
        self._protocol.refusals.note(ROUTE, refusal)
        self._protocol.default_head(self)
        rule = rule_of(refusal)
        self.keep_alive = self.keep_alive and not rule.closes
        self._send(response_bytes(refusal, close=not self.keep_alive))
        self._protocol.metrics.rejected(refusal.reason).inc()
        self._count(str(rule.status), arm)

    def expire_body(self) -> None:
        self.refuse(BodyTooSlow(BODY_S))

    def abandon(self) -> None:
        """The connection is lost: nobody waits for the answer any more."""
        if self.timer is not None:
            self.timer.cancel()
        if not self.response_complete:
            self.response_complete = True
            if self._cancel is not None:
                self._cancel()
            self._count("499", NO_ARM)  # nginx's code for a client that left

    def _send(self, content: bytes) -> None:
        self.response_complete = True
        self._cancel = None
        transport = self._protocol.transport
        # An error here would be raised in the callback of whoever brought the answer, and end his connection.
        if not transport.is_closing():
            transport.write(content)
            if not self.keep_alive:
                transport.close()
        self._protocol.on_response_complete()

    def _count(self, status: str, arm: str) -> None:
        metrics = self._protocol.metrics
        metrics.requests(ROUTE, status, arm).inc()
        metrics.request_seconds(ROUTE, arm).observe(time.perf_counter() - self._started)


class LingeringTransport:
    """The transport of one request: if its body is still coming when it is closed, the connection lingers.

    Closing with bytes unread resets the connection, and the client that is still sending never reads its answer.
    """

    def __init__(self, protocol: "PredictProtocol") -> None:
        self._protocol = protocol
        self.write, self.is_closing = protocol.transport.write, protocol.transport.is_closing

    def close(self) -> None:
        if self._protocol.cycle.more_body:
            self._protocol.linger()
        else:
            self._protocol.transport.close()


class PredictProtocol(HttpToolsProtocol):
    """A connection that takes POST /predict by itself and leaves everything else to the ASGI app.

    A kept connection stays with the process that took it, so one that starts later would get none of those there are:
    after `max_age_s` seconds, or up to half of it earlier, `connection: close` goes with an answer, and the client
    connects anew for its next request. A head without end is refused, as the time and memory it takes grow with the
    square of its length; a client that connects and says nothing has the time of a kept connection.

    Hooks into uvicorn's own class; tests/service/http/test_protocol.py holds each to the version that is locked.
    """

    # Set on a subclass by `protocol_class`: uvicorn makes the connections.
    endpoint: PredictEndpoint
    metrics: Metrics
    refusals: RefusalLog
    lag: "LoopLag"
    max_age_s: float
    max_body_bytes: int
    unusual: frozenset[bytes]

    _in_head = False
    _linger_timer: TimerHandle | None = None  # once the answer is out and what still comes is dropped
    _head_bytes = 0
    _head_timer: TimerHandle | None = None
    _default_headers: list[tuple[bytes, bytes]] | None = None
    _default_head = b""

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type] # it narrows the type itself
        age_s = self.max_age_s * random.uniform(0.5, 1)  # or those made together would go together
        self._close_at = time.monotonic() + age_s if self.max_age_s else math.inf
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._end_head()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        if isinstance(self.cycle, PredictCall):
            self.cycle.abandon()

    def data_received(self, data: bytes) -> None:
        if self._linger_timer is not None:
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadersTooLarge(MAX_HEAD_BYTES))
                return
        super().data_received(data)
        if self._in_head and self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self._refuse, HeadersTooSlow(HEAD_S))
        call = self.cycle
        if isinstance(call, PredictCall) and call.more_body and call.timer is None:
            call.timer = self.loop.call_later(BODY_S, call.expire_body)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._end_head()
        arrived_at = time.monotonic() - self.lag.seconds() / 2
        if self.url == _PATH and self._is_usual():
            call = PredictCall(self, arrived_at=arrived_at, keep_alive=self.parser.should_keep_alive())
            self.cycle = call  # type: ignore[assignment] # stands where uvicorn's own would
            return
        self.scope["state"][ARRIVED_AT] = arrived_at
        super().on_headers_complete()
        self.cycle.transport = LingeringTransport(self)  # type: ignore[assignment] # as far as a cycle uses it
        if self.cycle.waiting_for_100_continue:
            self.cycle.send = _send_instead_of_continue(self.cycle)  # type: ignore[assignment, method-assign]
        if time.monotonic() >= self._close_at:
            self.cycle.default_headers = [*self.cycle.default_headers, (b"connection", b"close")]

    def on_body(self, body: bytes) -> None:
        if isinstance(self.cycle, PredictCall):
            if not self.cycle.response_complete:
                self.cycle.receive_body(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        call = self.cycle
        if isinstance(call, PredictCall):
            if not call.response_complete:
                call.start()
        else:
            super().on_message_complete()

    def linger(self) -> None:
        """The answer was the last; what the client sends is dropped until it closes or has had its time."""
        self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)
        self.transport.write_eof()
        self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        self._refuse(BadHTTP(msg))

    def default_head(self, call: PredictCall) -> bytes:
        """The headers that every answer has, as bytes; tells the call when the connection ends with it."""
        headers = self.server_state.default_headers  # a new list each second, and when the server stops
        if headers is not self._default_headers:
            self._default_headers = headers
            self._default_head = b"".join(b"%b: %b\r\n" % header for header in headers)
        if (b"connection", b"close") in headers or time.monotonic() >= self._close_at:
            call.keep_alive = False
        return self._default_head if call.keep_alive else self._default_head + b"connection: close\r\n"

    def _is_usual(self) -> bool:
        """Whether nothing but its body matters of a request: else it goes through FastAPI, with the same answer."""
        if self.parser.get_method() != b"POST" or self.parser.get_http_version() != "1.1":
            return False
        if (self.cycle is not None and not self.cycle.response_complete) or self.flow.write_paused:
            return False
        for name, value in self.headers:
            if name in self.unusual:
                return False
            if name == b"content-length" and int(value) > self.max_body_bytes:
                return False
        return True

    def _refuse(self, refusal: Refusal) -> None:
        self._end_head()
        if not self.transport.is_closing():
            self.transport.write(response_bytes(refusal, close=True))
            self.transport.close()

    def _end_head(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def _send_instead_of_continue(cycle: RequestResponseCycle) -> ASGISendCallable:
    """`send` of a request that waits for `100 Continue`: an answer before that ends the connection.

    The client then sends no body, and what it sends next would be read as one.
    """
    send = cycle.send

    async def closing_send(message: ASGISendEvent) -> None:
        if cycle.waiting_for_100_continue:
            cycle.keep_alive = False
        await send(message)

    return closing_send


def protocol_class(
    endpoint: PredictEndpoint,
    metrics: Metrics,
    refusals: RefusalLog,
    *,
    max_age_s: float,
    max_body_bytes: int,
    cors: bool = False,
) -> type[HttpToolsProtocol]:
    """The class of connections for uvicorn's setting `http`. With `cors` a page's requests go through the framework."""
    members = {
        "endpoint": endpoint,
        "metrics": metrics,
        "refusals": refusals,
        "lag": LoopLag(),
        "max_age_s": max_age_s,
        "max_body_bytes": max_body_bytes,
        "unusual": _UNUSUAL | {b"origin"} if cors else _UNUSUAL,
    }
    return type("Connection", (PredictProtocol,), members)


class LoopLag:
    """Lag of the event loop: how long it was busy before it read what it reads now.

    What is read came meanwhile, halfway on average. In processor time of its thread: of the wall clock's, nobody could
    tell how much the loop waited for something to come. Where it waited for most of that, what came was read soon.
    """

    def __init__(
        self, *, busy: Callable[[], float] = time.thread_time, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._busy, self._clock = busy, clock
        self._is_reading = False
        self._seconds = 0.0
        self._read_busy, self._read_at = 0.0, -math.inf  # whatever it did before the first

    def seconds(self) -> float:
        """For one of those that are read in one go."""
        if not self._is_reading:
            self._is_reading = True
            busy_s = self._busy() - self._read_busy
            # Not half: the model's thread and other processes may want the same core.
            self._seconds = busy_s if busy_s > (self._clock() - self._read_at) / 4 else 0.0
            asyncio.get_running_loop().call_soon(self._end)  # before what any of them makes
        return self._seconds

    def _end(self) -> None:
        self._is_reading = False
        self._read_busy, self._read_at = self._busy(), self._clock()
