"""What every request passes first and last: /predict by the straight way, each counted once, each error an answer."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import MEDIA_TYPE, Problem, too_deep
from service.observability.metrics import NO_ARM, Metrics

log = logging.getLogger(__name__)

CAME_AT = "came_at"  # in a request's state: when it came, on the monotonic clock, if the server has noted it
FLOODS = frozenset(("deadline", "overloaded", "predicted_late"))  # refusals that come by the thousand when they come
LOG_EVERY_S = 1.0  # each of them
WATCH_AFTER_S = 0.01  # a request that is answered sooner is not worth looking whether its client still waits
PREDICT = "/predict"

Answer = Callable[[Scope, Receive], Coroutine[Any, Any, bytes]]
"""The body of a 200. Raises Problem."""


class App(FastAPI):
    """FastAPI, past whose routing a prediction goes."""

    predict: ASGIApp  # set by whoever makes the app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == PREDICT and scope["method"] == "POST":
            await self.predict(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class Straight:
    """One route with nothing between the server and what answers it. A client that leaves ends the work for it."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._floods = _Floods()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, media_type, headers = 200, b"application/json", []
        try:
            body = await self._answer(scope, receive)
        except (Problem, RecursionError) as err:
            problem = err if isinstance(err, Problem) else too_deep()
            _note(scope, problem, times=self._floods.due(problem.reason))
            status, media_type, body = problem.status, MEDIA_TYPE.encode(), problem.to_json()
            headers = [(name.lower().encode(), value.encode()) for name, value in problem.headers.items()]
        headers += [(b"content-type", media_type), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class _Floods:
    """Under overload there is no time to log every refusal: one a second of each kind, and how many it stands for."""

    def __init__(self) -> None:
        self._unsaid: Counter[str] = Counter()
        self._next: dict[str, float] = {}

    def due(self, reason: str) -> int:
        """How many to tell of now; 0 for none yet."""
        if reason not in FLOODS:
            return 1
        self._unsaid[reason] += 1
        now = time.monotonic()
        if now < self._next.get(reason, 0.0):
            return 0
        self._next[reason] = now + LOG_EVERY_S
        return self._unsaid.pop(reason)


class Departure:
    """Cancels the task it was made in when the client leaves, which then sees ClientDisconnect.

    `receive` must have given the whole body. Enter it after that, around what takes time.
    """

    __slots__ = ("_gone", "_receive", "_task", "_timer", "_watcher")

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False
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
        if self._gone and kind is asyncio.CancelledError and not self._task.uncancel():
            raise ClientDisconnect

    def _begin(self) -> None:
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        if (await self._receive())["type"] == "http.disconnect":
            self._gone = True
            self._task.cancel()


class Recorder:
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

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                reason = state.get("reason")
                if reason is not None:
                    self._metrics.rejected(reason).inc()
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except ClientDisconnect:
            status = 499  # nginx's code for a client that left
        except Exception:
            log.exception("unforeseen error", extra={"route": scope["path"]})
            if status:
                raise  # half an answer is out: only closing the connection can tell
            problem = Problem(500, "an error of the service; it has been logged", reason="internal")
            state["reason"] = problem.reason
            await _response(problem, scope["path"])(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", scope["path"])  # with its parameters' names, not their values
            route = route if route in self._routes else "other"
            arm = state.get("arm", NO_ARM)
            self._metrics.requests(route, str(status), arm).inc()
            self._metrics.request_seconds(route, arm).observe(time.perf_counter() - started)


def answer_error(request: Request, error: Exception) -> Response:
    """Every refusal as an answer: ours, the framework's (no such path, no such method), and Python's own limit."""
    if isinstance(error, HTTPException):
        reason = {404: "no_such_path", 405: "no_such_method"}.get(error.status_code, "other")
        error = Problem(error.status_code, error.detail, reason=reason, headers=error.headers)
    if isinstance(error, RecursionError):
        error = too_deep()  # nothing here nests deeply but what a client sends
    assert isinstance(error, Problem)
    _note(request.scope, error)
    return _response(error, request.url.path)


def _note(scope: Scope, problem: Problem, *, times: int = 1) -> None:
    """For the metrics, and in the log if it is to be told of so many times."""
    scope["state"].update(reason=problem.reason, arm=problem.arm or NO_ARM)
    if not times:
        return
    told = {"route": scope["path"], "status": problem.status, "reason": problem.reason, "detail": problem.detail}
    if problem.__cause__ is not None:
        told["cause"] = str(problem.__cause__)
    if times > 1:
        told["times"] = times
    log.log(logging.ERROR if problem.reason == "model_failed" else logging.INFO, "refused", extra=told)


def _response(problem: Problem, path: str) -> Response:
    """As problem+json; under /v2 as the Open Inference Protocol has it, which knows no 422."""
    if path.startswith("/v2"):
        body, status = msgspec.json.encode({"error": problem.detail}), 400 if problem.status == 422 else problem.status
        return Response(body, status_code=status, headers=problem.headers, media_type="application/json")
    return Response(problem.to_json(), status_code=problem.status, headers=problem.headers, media_type=MEDIA_TYPE)
