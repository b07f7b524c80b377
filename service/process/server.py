"""HTTP server of one process: its socket, its signals, and a stop that no client notices."""

import asyncio
import gc
import logging
import math
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import FrameType
from typing import Any, Protocol

import uvicorn

from service.process import sockets
from service.process.watchdog import Watchdog
from service.settings import Settings
from service.worker import WorkerInfo

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75  # longer than the idle time of common load balancers, so that they close first
IN_FLIGHT_S = 10  # for requests under way once no new one is taken

Application = Callable[..., Any]
"""An ASGI app."""


class Lifecycle(Protocol):
    """What the app looks at for its readiness."""

    stopping: bool


async def serve(
    app: Application,
    *,
    opened: AbstractAsyncContextManager[Any],
    protocol: type[asyncio.Protocol],
    lifecycle: Lifecycle,
    settings: Settings,
    worker: WorkerInfo,
    listening: Callable[[], None] | None = None,
) -> None:
    """Serves until SIGTERM or Ctrl-C, with the app `opened`; calls `listening` when connections are taken.

    Raises SettingsError for an address that is taken, before anything opens, and what opening raises.
    """
    bind = sockets.bind if worker.folder is None else sockets.bind_shared
    with bind(settings.host, settings.port) as listener:
        # The app is opened here and not by uvicorn, which would print a traceback for a bad artifact.
        async with opened:
            # What there is now stays. Looking through all of it for garbage would stop the process for some 60 ms.
            gc.collect()
            gc.freeze()
            server = Server(
                app,
                protocol=protocol,
                lifecycle=lifecycle,
                drain_s=settings.drain_s,
                listening=listening or _log_serving(listener),
            )
            with Watchdog(settings.watchdog_s):
                await server.serve(sockets=[listener])
    log.info("stopped")


def _log_serving(listener: socket.socket) -> Callable[[], None]:
    host, port = listener.getsockname()[:2]
    return lambda: log.info("serving", extra={"host": host, "port": port, "workers": 1})


class Server(uvicorn.Server):
    """SIGTERM: not ready, answer for `drain_s` more, then finish what is under way. Ctrl-C skips the wait.

    SIGHUP is a SIGTERM: one process alone cannot be replaced without a gap, and its terminal may be gone.
    """

    def __init__(
        self,
        app: Application,
        *,
        protocol: type[asyncio.Protocol],
        lifecycle: Lifecycle,
        drain_s: float,
        listening: Callable[[], None],
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=protocol,
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
        self._lifecycle = lifecycle
        self._listening = listening
        self._drain_s = drain_s
        self._stop_at = math.inf

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
            hang_up = signal.SIGTERM
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.handle_exit, hang_up, None)
        await super().startup(sockets)
        self._listening()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        if self._lifecycle.stopping:
            self.force_exit = sig == signal.SIGINT
        self._lifecycle.stopping = True
        # Load balancers still send requests here for a moment after readiness fails, so keep answering; but a kept
        # connection outlives its entry in the balancer, so let each go with its answer (within a second: uvicorn's
        # default headers are made once a second).
        self.config.encoded_headers = [(b"connection", b"close")]
        stop_at = time.monotonic() + (self._drain_s if sig == signal.SIGTERM else 0)
        self._stop_at = min(self._stop_at, stop_at)  # another SIGTERM begins no wait anew
        log.info("stopping", extra={"signal": signal.Signals(sig).name})

    async def on_tick(self, counter: int) -> bool:
        ended = await super().on_tick(counter)
        return ended or time.monotonic() >= self._stop_at
