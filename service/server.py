"""How one process serves: its socket, its signals, and a stop that no client notices."""

import asyncio
import gc
import logging
import math
import random
import signal
import socket
import time
from asyncio import BaseTransport
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service import address
from service.api import Api
from service.app import create_app
from service.front import CAME_AT
from service.place import Place
from service.settings import Settings

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75  # longer than the idle time of common load balancers, so that they close first
IN_FLIGHT_S = 10  # for requests under way once no new one is taken


async def serve(settings: Settings, place: Place, *, listening: Callable[[], None] | None = None) -> None:
    """Serves until SIGTERM or Ctrl-C, and says when connections are taken.

    Raises SettingsError for an address that is taken, and what opening raises.
    """
    bind = address.bound if place.folder is None else address.joined
    with bind(settings.host, settings.port) as listener:
        app = create_app(settings, place)
        # The lifespan is entered here and not by uvicorn, which would print a traceback for a bad artifact.
        async with app.router.lifespan_context(app):
            # What there is now stays. Looking through all of it for garbage would stop the process for some 60 ms.
            gc.collect()
            gc.freeze()
            await Server(app, settings, listening or _log_serving(listener)).serve(sockets=[listener])
    log.info("stopped")


def _log_serving(listener: socket.socket) -> Callable[[], None]:
    host, port = listener.getsockname()[:2]
    return lambda: log.info("serving", extra={"host": host, "port": port, "workers": 1})


class Server(uvicorn.Server):
    """SIGTERM: not ready, answer for `drain_s` more, then finish what is under way. Ctrl-C skips the wait."""

    def __init__(self, app: FastAPI, settings: Settings, listening: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=_connections_of(settings.max_connection_s),
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=IN_FLIGHT_S,
            )
        )
        self._api: Api = app.state.api
        self._listening = listening
        self._drain_s = settings.drain_s
        self._stop_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        if self._stop_at is not None:
            self.force_exit = sig == signal.SIGINT
        self._api.stopping = True
        # Load balancers still send requests here for a moment after readiness fails, so keep answering; but a kept
        # connection outlives its place in the balancer, so let each go with its answer (within a second: uvicorn's
        # default headers are made once a second).
        self.config.encoded_headers = [(b"connection", b"close")]
        self._stop_at = time.monotonic() + (self._drain_s if sig == signal.SIGTERM else 0)
        log.info("stopping", extra={"signal": signal.Signals(sig).name})

    async def on_tick(self, counter: int) -> bool:
        ended = await super().on_tick(counter)
        return ended or (self._stop_at is not None and time.monotonic() >= self._stop_at)


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


def _connections_of(max_age_s: float) -> type[HttpToolsProtocol]:
    """Connections that note when a request came, and that end after so many seconds, or up to half of it earlier.

    Under load a request is read long after it came, and its task begins long after that: its deadline does not wait.

    A kept connection stays with the process that took it, so one that starts later would get none of those there are.
    The client reads `connection: close` with an answer and connects anew for its next request: nothing is lost.
    """
    away = _Away()

    class Connection(HttpToolsProtocol):
        def connection_made(self, transport: BaseTransport) -> None:
            super().connection_made(transport)  # type: ignore[arg-type] # it narrows the type itself
            age_s = max_age_s * random.uniform(0.5, 1)  # or those made together would go together
            self._close_at = time.monotonic() + age_s if max_age_s else math.inf

        def on_headers_complete(self) -> None:
            now = time.monotonic()
            self.scope["state"][CAME_AT] = now - away.seconds() / 2
            super().on_headers_complete()
            if now >= self._close_at:
                self.cycle.default_headers = [*self.cycle.default_headers, (b"connection", b"close")]

    return Connection
