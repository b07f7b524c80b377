"""The wiring: what a service is made of, and in which order it opens and closes."""

import asyncio
import importlib.metadata
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from service.errors import Problem
from service.experiments import assignment
from service.experiments.assignment import Running
from service.http import openapi
from service.http.middleware import App, Recorder, Straight, answer_error
from service.http.routes import Api, Parts
from service.ingest.events import Events
from service.observability.metrics import Metrics
from service.registry import follower
from service.registry.changes import Changes
from service.registry.follower import ControlFollower
from service.registry.loader import ModelLoader
from service.registry.local_copy import LocalCopy
from service.registry.registry import ModelRegistry
from service.registry.warmup import ModelWarmer
from service.runtime.batcher import Runner
from service.scoring.explainer import Explainer
from service.scoring.model_inputs import Inputs
from service.scoring.scorer import Scorer
from service.settings import Settings
from service.store import redis_store
from service.store.control_store import ControlStore, MemoryControlStore
from service.store.feature_store import FeatureStore, StoreUnavailable
from service.store.memory_store import MemoryStore
from service.store.redis_control_store import RedisControlStore
from service.worker import WorkerInfo

log = logging.getLogger(__name__)

GPU_THREADS = 2  # one feeds the GPU while the other waits for it


def create_app(settings: Settings, worker: WorkerInfo | None = None) -> FastAPI:
    """The service as an ASGI app. It opens in its lifespan, which raises what is wrong with settings or artifacts."""
    metrics = Metrics(worker)
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

    app = App(
        title="Clickserve",
        description=openapi.DESCRIPTION,
        version=importlib.metadata.version("clickserve"),
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.api = api
    app.include_router(router)
    routes = frozenset(r.path for r in router.routes if isinstance(r, APIRoute))
    app.add_middleware(Recorder, metrics=metrics, routes=routes)
    app.predict = Recorder(Straight(api.predicted), metrics=metrics, routes=routes)
    openapi.describe(app, max_candidates=settings.max_candidates, max_explained=settings.max_explained)
    for kind in (Problem, HTTPException, RecursionError):
        app.add_exception_handler(kind, answer_error)
    return app


@asynccontextmanager
async def open_parts(settings: Settings, metrics: Metrics) -> AsyncIterator[Parts]:
    """Opens store, then models; closes in reverse. Raises SettingsError, ExperimentError or ArtifactError."""
    async with AsyncExitStack() as stack:
        experiment = assignment.from_setting(settings.experiment)
        running = Running(experiment)
        store, writing = _stores(settings)
        for opened in (store, writing):
            stack.push_async_callback(opened.aclose)
        try:
            await store.ping()
        except StoreUnavailable as err:
            log.warning("starting without the store", extra={"error": str(err)})
        control_store = _control_store(settings, experiment.name)
        stack.push_async_callback(control_store.aclose)
        local_copy = LocalCopy.of(settings.state_dir, experiment=experiment.name)
        start = await follower.find_start(control_store, local_copy, experiment)
        on_gpu = any(arm.device == "cuda" for arm in experiment.served)
        runner = Runner(
            metrics, max_queued_candidates=settings.max_queued_candidates, threads=GPU_THREADS if on_gpu else 1
        )
        stack.push_async_callback(runner.aclose)
        loader = ModelLoader(
            root=settings.artifacts_dir,
            runner=runner,
            max_candidates=settings.max_batch_candidates,
            keep_behaviours=settings.keep_behaviours,
        )
        catalog = await asyncio.to_thread(
            ModelRegistry.load,
            loader,
            experiment.served,
            keep_versions=settings.keep_versions,
            versions=None if start.document is None else start.document.state.models,
        )
        stack.push_async_callback(catalog.aclose)
        stack.push_async_callback(runner.aclose)  # before it: a model is closed when nothing runs on it
        for arm, model in catalog.models.items():
            manifest = model.artifact.manifest
            metrics.model_serves(arm=arm, model=manifest.model, version=manifest.version)
        inputs = Inputs(store=store, metrics=metrics, item_rows=settings.item_cache_rows, fresh_s=settings.item_cache_s)
        scorer = Scorer(running=running, catalog=catalog, inputs=inputs, metrics=metrics, fallback=settings.fallback)
        stack.push_async_callback(scorer.aclose)
        explainer = Explainer(scorer)
        stack.callback(explainer.close)
        warmer = ModelWarmer(registry=catalog, inputs=inputs, recent=scorer.recent)
        control = ControlFollower(
            store=control_store,
            experiment=experiment,
            running=running,
            registry=catalog,
            warmer=warmer,
            metrics=metrics,
            local_copy=local_copy,
        )
        await control.join(start)
        await stack.enter_async_context(control.following())
        changes = Changes(store=control_store, follower=control, experiment=experiment, registry=catalog, warmer=warmer)
        yield Parts(
            scorer=scorer,
            explainer=explainer,
            events=Events(store=writing, running=running, metrics=metrics),
            running=running,
            changes=changes,
            control=control,
            control_store=control_store,
            catalog=catalog,
            store=store,
        )


def _stores(settings: Settings) -> tuple[FeatureStore, FeatureStore]:
    """One store by two ways: for predictions, which cannot wait for it, and for events, which can and must be kept."""
    if settings.redis_url is None:
        log.warning("no redis_url: clicks are kept in this process, and lost with it")
        memory = MemoryStore(keep=settings.keep_behaviours)
        return memory, memory
    reading, writing = (
        redis_store.opened(settings, timeout_s=timeout_ms / 1000)
        for timeout_ms in (settings.store_timeout_ms, settings.store_write_timeout_ms)
    )
    return reading, writing


def _control_store(settings: Settings, experiment: str) -> ControlStore:
    if settings.redis_url is None:
        return MemoryControlStore()
    if settings.state_dir is None:
        log.warning("no state_dir: a restart while the store is down serves what the experiment file says")
    timeout_s = settings.store_write_timeout_ms / 1000
    return RedisControlStore.connect(settings.redis_url, experiment=experiment, timeout_s=timeout_s)
