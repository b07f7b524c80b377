"""ASGI middleware: each request counted once, each error an answer, work ended for clients that have gone."""

import asyncio
import logging
import time
from collections import Counter

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import InvalidValue, Reason, Refusal
from service.http.problems import (
    MEDIA_TYPE,
    FrameworkError,
    Internal,
    body_of,
    headers_of,
    nested_too_deep,
    rule_of,
)
from service.observability.metrics import NO_ARM, Metrics

log = logging.getLogger(__name__)

ARRIVED_AT = "arrived_at"  # in a request's state: when it came, on the monotonic clock, if the server has noted it
SAMPLED = frozenset((Reason.DEADLINE, Reason.OVERLOADED, Reason.PREDICTED_LATE))  # they come by the thousand
LOG_EVERY_S = 1.0  # each of them
WATCH_AFTER_S = 0.01  # a request that is answered sooner is not worth looking whether its client still waits


class RefusalLog:
    """Log of refusals. Under overload there is no time to log each: one a second of each kind, with their number."""

    def __init__(self) -> None:
        self._unlogged: Counter[Reason] = Counter()
        self._next: dict[Reason, float] = {}

    def note(self, route: str, refusal: Refusal) -> None:
        times = self._due(refusal.reason)
        if not times:
            return
        entry = {"route": route, "status": rule_of(refusal).status, "reason": refusal.reason, "detail": refusal.detail}
        if refusal.__cause__ is not None:
            entry["cause"] = str(refusal.__cause__)
        if times > 1:
            entry["times"] = times
        log.log(logging.ERROR if refusal.reason is Reason.MODEL_FAILED else logging.INFO, "refused", extra=entry)

    def _due(self, reason: Reason) -> int:
        """How many to log now; 0 for none yet."""
        if reason not in SAMPLED:
            return 1
        self._unlogged[reason] += 1
        now = time.monotonic()
        if now < self._next.get(reason, 0.0):
            return 0
        self._next[reason] = now + LOG_EVERY_S
        return self._unlogged.pop(reason)


class CancelOnDisconnect:
    """Cancels the task it was made in when the client leaves, which then sees ClientDisconnect.

    `receive` must have given the whole body. Enter it after that, around what takes time.
    """

    __slots__ = ("_has_gone", "_receive", "_task", "_timer", "_watcher")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._has_gone = False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._begin)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._has_gone and kind is asyncio.CancelledError and not self._task.uncancel():
            raise ClientDisconnect

    def _begin(self) -> None:
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        if (await self._receive())["type"] == "http.disconnect":
            self._has_gone = True
            self._task.cancel()


class MetricsMiddleware:
    """The outermost layer: every request is counted once, and what nobody foresaw becomes a 500 without internals."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        state = scope.setdefault("state", {})
        status = 0

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                reason = state.get("reason")
                if reason is not None:
                    self._metrics.rejected(reason).inc()
            await send(message)

        try:
            await self._app(scope, receive, counting_send)
        except ClientDisconnect:
            status = 499  # nginx's code for a client that left
        except Exception:
            log.exception("unforeseen error", extra={"route": scope["path"]})
            if status:
                raise  # half an answer is out: only closing the connection can tell
            refusal = Internal()
            state["reason"] = refusal.reason
            await _response(refusal, scope["path"])(scope, receive, counting_send)
        finally:
            route = getattr(scope.get("route"), "path", scope["path"])  # with its parameters' names, not their values
            route = route if route in self._routes else "other"
            arm = state.get("arm", NO_ARM)
            self._metrics.requests(route, str(status), arm).inc()
            self._metrics.request_seconds(route, arm).observe(time.perf_counter() - started)


class ErrorHandler:
    """Every refusal as an answer: ours, the framework's (no such path, no such method), and Python's own limit."""

    def __init__(self, refusals: RefusalLog) -> None:
        self._refusals = refusals

    def __call__(self, request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = FrameworkError(error.status_code, error.detail, error.headers)
        if isinstance(error, RecursionError):
            error = nested_too_deep()  # nothing here nests deeply but what a client sends
        assert isinstance(error, Refusal)
        request.scope["state"].update(reason=error.reason, arm=error.arm or NO_ARM)
        self._refusals.note(request.url.path, error)
        return _response(error, request.url.path)


def _response(refusal: Refusal, path: str) -> Response:
    """As problem+json; under /v2 as the Open Inference Protocol has it, which knows no 422."""
    status, headers = rule_of(refusal).status, headers_of(refusal)
    if path.startswith("/v2"):
        status = 400 if isinstance(refusal, InvalidValue) else status
        body = msgspec.json.encode({"error": refusal.detail})
        return Response(body, status_code=status, headers=headers, media_type="application/json")
    return Response(body_of(refusal), status_code=status, headers=headers, media_type=MEDIA_TYPE)
