"""What a connection is held to: when its requests came, how long and how large their heads may be, and its age."""

import asyncio
import math
import random
import time
from asyncio import BaseTransport, TimerHandle
from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import Problem, answer_to, bad_http, head_too_large, head_too_slow
from service.http.middleware import CAME_AT

MAX_HEAD_BYTES = 64 * 2**10  # of a request's first line and headers, beside what is read with their beginning
HEAD_S = 10.0  # for all of them to come


def connections_of(max_age_s: float, *, keep_alive_s: float) -> type[HttpToolsProtocol]:
    """Connections that note when a request came, and that end after so many seconds, or up to half of it earlier.

    Under load a request is read long after it came, and its task begins long after that: its deadline does not wait.

    A kept connection stays with the process that took it, so one that starts later would get none of those there are.
    The client reads `connection: close` with an answer and connects anew for its next request: nothing is lost.

    A head without end is refused, as the time and memory it takes grow with the square of its length; a client that
    connects and says nothing has `keep_alive_s`. What is no HTTP is a problem like any other.
    """
    away = _Away()

    class Connection(HttpToolsProtocol):
        _in_head = False
        _head_bytes = 0
        _head_timer: TimerHandle | None = None

        def connection_made(self, transport: BaseTransport) -> None:
            super().connection_made(transport)  # type: ignore[arg-type] # it narrows the type itself
            age_s = max_age_s * random.uniform(0.5, 1)  # or those made together would go together
            self._close_at = time.monotonic() + age_s if max_age_s else math.inf
            self.timeout_keep_alive_task = self.loop.call_later(keep_alive_s, self.timeout_keep_alive_handler)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._unset_keepalive_if_required()
            self._end_head()

        def data_received(self, data: bytes) -> None:
            if self._in_head:
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES:
                    self._refuse(head_too_large(MAX_HEAD_BYTES))
                    return
            super().data_received(data)
            if self._in_head and self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_S, self._refuse, head_too_slow(HEAD_S))

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_head, self._head_bytes = True, 0

        def on_headers_complete(self) -> None:
            self._end_head()
            now = time.monotonic()
            self.scope["state"][CAME_AT] = now - away.seconds() / 2
            super().on_headers_complete()
            if now >= self._close_at:
                self.cycle.default_headers = [*self.cycle.default_headers, (b"connection", b"close")]

        def send_400_response(self, msg: str) -> None:
            self._refuse(bad_http(msg))

        def _refuse(self, problem: Problem) -> None:
            self._end_head()
            if not self.transport.is_closing():
                self.transport.write(answer_to(problem))
                self.transport.close()

        def _end_head(self) -> None:
            self._in_head = False
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return Connection


class _Away:
    """How long the event loop was busy before it read what it reads now: that came meanwhile, halfway on average.

    In processor time of its thread: of the wall clock's, nobody could tell how much it waited for something to come.
    Where it waited for most of that, what came was read soon.
    """

    def __init__(
        self, *, busy: Callable[[], float] = time.thread_time, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._busy, self._clock = busy, clock
        self._reading = False
        self._seconds = 0.0
        self._left_busy, self._left = 0.0, -math.inf  # whatever it did before the first

    def seconds(self) -> float:
        """For one of those that are read in one go."""
        if not self._reading:
            self._reading = True
            busy_s = self._busy() - self._left_busy
            # Not half: the model's thread and other processes may want the same core.
            self._seconds = busy_s if busy_s > (self._clock() - self._left) / 4 else 0.0
            asyncio.get_running_loop().call_soon(self._read)  # before the task of any of them
        return self._seconds

    def _read(self) -> None:
        self._reading = False
        self._left_busy, self._left = self._busy(), self._clock()
