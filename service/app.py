"""The wiring: what a service is made of, and in which order it opens and closes."""

import asyncio
import importlib.metadata
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from service.errors import Refusal
from service.experiments import assignment
from service.experiments.assignment import Running
from service.http import openapi
from service.http.middleware import ErrorHandler, MetricsMiddleware, RefusalLog
from service.http.protocol import protocol_class
from service.http.routes import Api, OpenService
from service.ingest.events import EventRecorder
from service.observability.metrics import Metrics
from service.registry import follower
from service.registry.changes import Changes
from service.registry.follower import ControlFollower
from service.registry.loader import ModelLoader
from service.registry.local_copy import LocalCopy
from service.registry.registry import ModelRegistry
from service.registry.warmup import ModelWarmer
from service.runtime.scheduler import Scheduler
from service.scoring.explainer import Explainer
from service.scoring.item_changes import ItemChangeFollower
from service.scoring.scorer import Scorer
from service.settings import Settings
from service.store import redis_store
from service.store.control_store import ControlStore, MemoryControlStore
from service.store.faults import Fault, FaultState
from service.store.feature_store import FeatureStore, StoreUnavailable
from service.store.memory_store import MemoryStore
from service.store.redis_control_store import RedisControlStore
from service.worker import WorkerInfo

log = logging.getLogger(__name__)

# Pages predict and send events. Nothing is changed from one: that takes the admin token, which no page should know.
CORS: Mapping[str, Any] = {
    "allow_methods": ("GET", "POST"),
    "allow_headers": ("Content-Type",),
    "expose_headers": ("Retry-After",),
}
GPU_THREADS = 2  # one feeds the GPU while the other waits for it


def create_app(settings: Settings, worker: WorkerInfo | None = None) -> FastAPI:
    """The service as an ASGI app. It opens in its lifespan, which raises what is wrong with settings or artifacts.

    `app.state.connection` is the class of its HTTP connections, which answer POST /predict without the framework.
    """
    metrics = Metrics(worker)
    api = Api(settings, metrics)
    router = api.router()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with open_service(settings, metrics) as service:
            api.service = service
            try:
                yield
            finally:
                api.service = None

    app = FastAPI(
        title="Clickserve",
        description=openapi.DESCRIPTION,
        version=importlib.metadata.version("clickserve"),
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
    )
    app.include_router(router)
    routes = frozenset(r.path for r in router.routes if isinstance(r, APIRoute))
    refusals = RefusalLog()
    metrics.declare_routes(sorted(routes))
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, **CORS)
    app.add_middleware(MetricsMiddleware, metrics=metrics, routes=routes)
    openapi.describe(app, max_candidates=settings.max_candidates, max_explained=settings.max_explained)
    for kind in (Refusal, HTTPException, RecursionError):
        app.add_exception_handler(kind, ErrorHandler(refusals))
    app.state.api = api
    app.state.connection = protocol_class(
        api.endpoint,
        metrics,
        refusals,
        max_age_s=settings.max_connection_s,
        max_body_bytes=settings.max_body_bytes,
        cors=bool(settings.cors_origins),
    )
    return app


@asynccontextmanager
async def open_service(settings: Settings, metrics: Metrics) -> AsyncIterator[OpenService]:
    """Opens store, then models; closes in reverse. Raises SettingsError, ExperimentError or ArtifactError."""
    async with AsyncExitStack() as stack:
        stack.enter_context(metrics.shared())
        experiment = assignment.from_setting(settings.experiment)
        running = Running(experiment)
        store = _store(settings, metrics)
        stack.push_async_callback(store.aclose)
        try:
            await store.check()
            await store.ping()
        except StoreUnavailable as err:
            log.warning("starting without the store", extra={"error": str(err)})
        control_store = _control_store(settings, experiment.name)
        stack.push_async_callback(control_store.aclose)
        local_copy = LocalCopy.of(settings.state_dir, experiment=experiment.name)
        start = await follower.find_start(control_store, local_copy, experiment)
        on_gpu = any(arm.device == "cuda" for arm in experiment.served)
        scheduler = Scheduler(
            max_queued_candidates=settings.max_queued_candidates,
            max_candidates=settings.max_batch_candidates,
            threads=GPU_THREADS if on_gpu else 1,
        )
        stack.push_async_callback(scheduler.aclose)
        loader = ModelLoader(
            root=settings.artifacts_dir,
            max_candidates=settings.max_batch_candidates,
            keep_behaviours=settings.keep_behaviours,
            item_rows=settings.item_cache_rows,
            fresh_s=settings.item_cache_s,
        )
        registry = await asyncio.to_thread(
            ModelRegistry.load,
            loader,
            experiment.served,
            keep_versions=settings.keep_versions,
            versions=None if start.document is None else start.document.state.models,
        )
        stack.push_async_callback(registry.aclose)
        stack.push_async_callback(scheduler.aclose)  # before it: a model is closed when nothing runs on it
        for arm, model in registry.models.items():
            metrics.arm(arm)
            metrics.model_serves(arm=arm, model=model.name, version=model.version)
            metrics.declare_fields(f.name for f in model.artifact.schema.fields if f.vocabulary is not None)
        scorer = Scorer(
            running=running,
            models=registry,
            store=store,
            scheduler=scheduler,
            metrics=metrics,
            fallback=settings.fallback,
            inline_run_ms=settings.inline_run_ms,
        )
        explainer = Explainer(scorer)
        stack.callback(explainer.close)
        warmer = ModelWarmer(registry=registry, scorer=scorer)
        control = ControlFollower(
            store=control_store,
            experiment=experiment,
            running=running,
            registry=registry,
            warmer=warmer,
            metrics=metrics,
            local_copy=local_copy,
        )
        await control.join(start)
        await stack.enter_async_context(control.following())
        item_changes = ItemChangeFollower(store=store, models=registry.loaded_models)
        await stack.enter_async_context(item_changes.following())
        yield OpenService(
            scorer=scorer,
            scheduler=scheduler,
            explainer=explainer,
            events=EventRecorder(
                store=store, arm_of=lambda ts, unit: running.at(ts).assign(unit).name, metrics=metrics
            ),
            running=running,
            changes=Changes(
                store=control_store, follower=control, experiment=experiment, registry=registry, warmer=warmer
            ),
            control=control,
            control_store=control_store,
            registry=registry,
            store=store,
        )


def _store(settings: Settings, metrics: Metrics) -> FeatureStore:
    metrics.declare_causes(Fault)
    if settings.redis_url is not None:
        faults = FaultState(
            on_change=lambda fault, stands: metrics.store_state(fault).set(int(stands)),
            on_failure=lambda fault: metrics.store_failures(fault).inc(),
        )
        return redis_store.opened(settings, faults=faults)
    log.warning("no redis_url: clicks are kept in this process, and lost with it")
    return MemoryStore(max_clicks=settings.keep_behaviours, max_bytes=settings.keep_behaviours_bytes)


def _control_store(settings: Settings, experiment: str) -> ControlStore:
    if settings.redis_url is None:
        return MemoryControlStore()
    if settings.state_dir is None:
        log.warning("no state_dir: a restart while the store is down serves what the experiment file says")
    timeout_s = settings.store_write_timeout_ms / 1000
    return RedisControlStore.connect(
        settings.redis_url, experiment=experiment, timeout_s=timeout_s, prefix=settings.redis_prefix
    )
