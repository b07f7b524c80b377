"""How one process serves: its socket, its signals, and a stop that no client notices."""

import logging
import signal
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.api import Api
from service.app import create_app
from service.settings import Settings, SettingsError

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75  # longer than the idle time of common load balancers, so that they close first
IN_FLIGHT_S = 10  # for requests under way once no new one is taken


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM or Ctrl-C. Raises SettingsError for an address that is taken, and what opening raises."""
    with _bound(settings.host, settings.port) as listener:
        app = create_app(settings)
        # The lifespan is entered here and not by uvicorn, which would print a traceback for a bad artifact.
        async with app.router.lifespan_context(app):
            host, port = listener.getsockname()[:2]
            log.info("serving", extra={"host": host, "port": port})
            await Server(app, drain_s=settings.drain_s).serve(sockets=[listener])
    log.info("stopped")


class Server(uvicorn.Server):
    """SIGTERM: not ready, answer for `drain_s` more, then finish what is under way. Ctrl-C skips the wait."""

    def __init__(self, app: FastAPI, *, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http="httptools",
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=IN_FLIGHT_S,
            )
        )
        self._api: Api = app.state.api
        self._drain_s = drain_s
        self._stop_at: float | None = None

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


def _bound(host: str, port: int) -> socket.socket:
    """Bound at once, so that a taken address is told before models load; it listens when there are answers."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as err:
        listener.close()
        raise SettingsError(f"settings host and port: cannot listen on {host}:{port}: {err.strerror or err}") from None
    return listener
