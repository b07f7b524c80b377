"""The wiring: what a service is made of, in which order it opens and closes, and how every error becomes an answer."""

import asyncio
import importlib.metadata
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import documents, experiment
from service.api import Api, Parts
from service.catalog import Catalog
from service.errors import MEDIA_TYPE, Problem, too_deep
from service.events import Events
from service.experiment import Experiment
from service.explain import Explainer
from service.features import FeatureStore, MemoryStore, StoreUnavailable
from service.inputs import Inputs
from service.metrics import NO_ARM, Metrics
from service.redis_store import RedisStore
from service.scorer import Scorer
from service.settings import Settings, SettingsError
from service.worker import Worker

log = logging.getLogger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI app. It opens in its lifespan, which raises what is wrong with settings or artifacts."""
    metrics = Metrics()
    api = Api(settings, metrics)
    router = api.router()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with open_parts(settings, metrics) as parts:
            api.parts = parts
            try:
                yield
            finally:
                api.parts = None

    app = FastAPI(
        title="Clickserve",
        description=documents.DESCRIPTION,
        version=importlib.metadata.version("clickserve"),
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.api = api
    app.include_router(router)
    app.add_middleware(
        Recorder, metrics=metrics, routes=frozenset(r.path for r in router.routes if isinstance(r, APIRoute))
    )
    documents.describe(app, max_candidates=settings.max_candidates, max_explained=settings.max_explained)
    for kind in (Problem, HTTPException, RecursionError):
        app.add_exception_handler(kind, _answer_error)
    return app


@asynccontextmanager
async def open_parts(settings: Settings, metrics: Metrics) -> AsyncIterator[Parts]:
    """Opens store, then models; closes in reverse. Raises SettingsError, ExperimentError or ArtifactError."""
    async with AsyncExitStack() as stack:
        running = _experiment(settings)
        store, writing = _stores(settings)
        for opened in (store, writing):
            stack.push_async_callback(opened.aclose)
        try:
            await store.ping()
        except StoreUnavailable as err:
            log.warning("starting without the store", extra={"error": str(err)})
        catalog = await asyncio.to_thread(Catalog.load, settings.artifacts_dir, running.arms)
        stack.callback(catalog.close)
        worker = Worker(metrics, max_queued_candidates=settings.max_queued_candidates)
        stack.callback(worker.close)
        for arm, model in catalog.models.items():
            manifest = model.artifact.manifest
            metrics.model_serves(arm=arm, model=manifest.model, version=manifest.version)
        inputs = Inputs(store=store, metrics=metrics)
        scorer = Scorer(experiment=running, catalog=catalog, inputs=inputs, worker=worker, metrics=metrics)
        explainer = Explainer(scorer)
        stack.callback(explainer.close)
        yield Parts(
            scorer=scorer,
            explainer=explainer,
            events=Events(store=writing, experiment=running, metrics=metrics),
            experiment=running,
            catalog=catalog,
            store=store,
        )


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
            await _response(problem)(scope, receive, noting)
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            arm = state.get("arm", NO_ARM)
            self._metrics.requests(route, str(status), arm).inc()
            self._metrics.request_seconds(route, arm).observe(time.perf_counter() - started)


def _answer_error(request: Request, error: Exception) -> Response:
    """Every refusal as problem+json: ours, the framework's (no such path, no such method), and Python's own limit."""
    if isinstance(error, HTTPException):
        reason = {404: "no_such_path", 405: "no_such_method"}.get(error.status_code, "other")
        error = Problem(error.status_code, error.detail, reason=reason, headers=error.headers)
    if isinstance(error, RecursionError):
        error = too_deep()  # nothing here nests deeply but what a client sends
    assert isinstance(error, Problem)
    request.state.reason = error.reason
    request.state.arm = error.arm or NO_ARM
    refusal = {"route": request.url.path, "status": error.status, "reason": error.reason, "detail": error.detail}
    if error.__cause__ is not None:
        refusal["cause"] = str(error.__cause__)
    log.log(logging.ERROR if error.reason == "model_failed" else logging.INFO, "refused", extra=refusal)
    return _response(error)


def _response(problem: Problem) -> Response:
    return Response(problem.to_json(), status_code=problem.status, headers=problem.headers, media_type=MEDIA_TYPE)


def _experiment(settings: Settings) -> Experiment:
    if settings.experiment is None:
        raise SettingsError("the setting experiment is missing: name the experiment file, or write what stands in it")
    if isinstance(settings.experiment, dict):
        return experiment.parse(settings.experiment, source="setting experiment")
    return experiment.read(settings.experiment)


def _stores(settings: Settings) -> tuple[FeatureStore, FeatureStore]:
    """One store by two ways: for predictions, which cannot wait for it, and for events, which can and must be kept."""
    if settings.redis_url is None:
        log.warning("no redis_url: clicks are kept in this process, and lost with it")
        memory = MemoryStore()
        return memory, memory
    try:
        reading, writing = (
            RedisStore.connect(settings.redis_url, timeout_s=timeout_ms / 1000)
            for timeout_ms in (settings.store_timeout_ms, settings.store_write_timeout_ms)
        )
    except ValueError as err:
        raise SettingsError(f"setting redis_url: {err}") from None
    return reading, writing
