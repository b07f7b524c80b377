"""How one process serves: its socket, its signals, and a stop that no client notices."""

import gc
import logging
import math
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.http.protocol import connections_of
from service.http.routes import Api
from service.process import sockets
from service.settings import Settings
from service.worker import WorkerInfo

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75  # longer than the idle time of common load balancers, so that they close first
IN_FLIGHT_S = 10  # for requests under way once no new one is taken


async def serve(settings: Settings, place: WorkerInfo, *, listening: Callable[[], None] | None = None) -> None:
    """Serves until SIGTERM or Ctrl-C, and says when connections are taken.

    Raises SettingsError for an address that is taken, and what opening raises.
    """
    bind = sockets.bound if place.folder is None else sockets.joined
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
                http=connections_of(settings.max_connection_s, keep_alive_s=KEEP_ALIVE_S),
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
        self._stop_at = math.inf

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        if self._api.stopping:
            self.force_exit = sig == signal.SIGINT
        self._api.stopping = True
        # Load balancers still send requests here for a moment after readiness fails, so keep answering; but a kept
        # connection outlives its place in the balancer, so let each go with its answer (within a second: uvicorn's
        # default headers are made once a second).
        self.config.encoded_headers = [(b"connection", b"close")]
        stop_at = time.monotonic() + (self._drain_s if sig == signal.SIGTERM else 0)
        self._stop_at = min(self._stop_at, stop_at)  # another SIGTERM begins no wait anew
        log.info("stopping", extra={"signal": signal.Signals(sig).name})

    async def on_tick(self, counter: int) -> bool:
        ended = await super().on_tick(counter)
        return ended or time.monotonic() >= self._stop_at
