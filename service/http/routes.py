"""The routes: bytes in, bytes out, and nothing decided here."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from service.errors import NotOpen, StoreDown
from service.experiments.assignment import Running
from service.http import openapi
from service.http.admin import Admin
from service.http.event_schemas import EventsDecoder, receipt_of
from service.http.middleware import ARRIVED_AT, CancelOnDisconnect
from service.http.open_inference import OpenInference
from service.http.predict import PredictEndpoint
from service.http.problems import BodyTooLarge, BodyTooSlow, Compressed, Upgrading
from service.http.protocol import BODY_S
from service.ingest.events import EventRecorder
from service.observability.metrics import Metrics
from service.registry.changes import Changes
from service.registry.follower import ControlFollower
from service.registry.registry import ModelRegistry
from service.runtime.scheduler import Scheduler
from service.scoring.explainer import Explainer
from service.scoring.scorer import Scorer
from service.settings import Settings
from service.store.control_store import ControlStore
from service.store.feature_store import FeatureStore, StoreUnavailable


@dataclass(frozen=True, kw_only=True)
class OpenService:
    """What an open service is made of; app.py puts it together."""

    scorer: Scorer
    scheduler: Scheduler
    explainer: Explainer
    events: EventRecorder
    running: Running
    changes: Changes
    control: ControlFollower
    control_store: ControlStore
    registry: ModelRegistry
    store: FeatureStore


class _Waiting:
    """A reply that a coroutine waits for."""

    def __init__(self) -> None:
        self.outcome: asyncio.Future[tuple[bytes, str]] = asyncio.get_running_loop().create_future()

    def answer(self, body: bytes, arm: str) -> None:
        if not self.outcome.done():
            self.outcome.set_result((body, arm))

    def refuse(self, error: Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)


class Api:
    """`stopping` takes readiness away before the service closes."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.endpoint = PredictEndpoint(settings, metrics)
        self.stopping = False
        self._service: OpenService | None = None
        self._settings = settings
        self._metrics = metrics
        self._events_decoder = EventsDecoder(max_age_s=settings.keep_behaviours_days * 86_400)

    @property
    def service(self) -> OpenService | None:
        """None while the service is not open."""
        return self._service

    @service.setter
    def service(self, service: OpenService | None) -> None:
        self._service = self.endpoint.service = service

    def router(self) -> APIRouter:
        router = APIRouter(default_response_class=Response)

        def add(path: str, answer: Callable[..., Any], **options: Any) -> None:
            router.add_api_route(path, answer, **options)
            if "methods" not in options:  # what is read with GET has HEAD too: load balancers probe with it
                router.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)

        add("/predict", self.predict, methods=["POST"], **openapi.PREDICT)
        add("/explain", self.explain, methods=["POST"], **openapi.EXPLAIN)
        add("/events", self.events, methods=["POST"], **openapi.EVENTS)
        add("/healthz", self.healthz, **openapi.HEALTHZ)
        add("/readyz", self.readyz, **openapi.READYZ)
        add("/models", self.models, **openapi.MODELS)
        add("/experiments", self.experiments, **openapi.EXPERIMENTS)
        OpenInference(
            self._settings,
            models=lambda: self._open().registry,
            scheduler=lambda: self._open().scheduler,
            body=self._body,
            ready=self.readyz,
        ).add_routes(add)
        Admin(self._settings.tokens_by_name, parts=self._open, body=self._body).add_routes(add)
        add("/metrics", self.metrics, include_in_schema=False)
        add("/", self.index, include_in_schema=False)
        return router

    async def predict(self, request: Request) -> Response:
        """What the protocol leaves to the framework: bodies in chunks, pipelined requests, paths behind a prefix."""
        arrived_at = request.scope["state"].get(ARRIVED_AT) or time.monotonic()
        body = await self._body(request.scope, request.receive)
        with CancelOnDisconnect(request.receive):
            waiting = _Waiting()
            cancel = self.endpoint.start(body, waiting, arrived_at=arrived_at)
            try:
                answer, arm = await waiting.outcome
            except asyncio.CancelledError:
                if cancel is not None:
                    cancel()
                raise
        request.state.arm = arm
        return _json(answer)

    async def explain(self, request: Request) -> Response:
        arrived_at = time.monotonic()
        body = await self._body(request.scope, request.receive)
        with CancelOnDisconnect(request.receive):
            answer, request.state.arm = await self.endpoint.explain(body, arrived_at=arrived_at)
        return _json(answer)

    async def events(self, request: Request) -> Response:
        events, rejected = self._events_decoder.decode(await self._body(request.scope, request.receive))
        try:
            outcomes = await self._open().events.record(list(events.values()))
        except StoreUnavailable as err:
            raise StoreDown(str(err)) from err
        return _json(msgspec.json.encode(receipt_of(events, outcomes, rejected)), status=202)

    async def healthz(self) -> Response:
        return _json(b'{"status":"alive"}')

    async def readyz(self) -> Response:
        """Ready without a store, unless the settings say otherwise: an ad server must keep getting answers."""
        service = self._service
        if service is None:
            return _json(b'{"status":"starting"}', status=503)
        failure = await self._store_failure(service.store)
        refusing = self.stopping or (failure is not None and self._settings.require_store)
        store: dict[str, Any] = {"ok": True} if failure is None else {"ok": False, "detail": failure}
        failing = {each.fault.value: each.message for each in service.store.failures()}
        if failing:
            store["failing"] = failing
        status = "stopping" if self.stopping else "ready" if failure is None and not failing else "degraded"
        arms = {name: model.version for name, model in service.registry.models.items()}
        document = {"status": status, "store": store, "arms": arms, "control": service.control.describe()}
        return _json(msgspec.json.encode(document), status=503 if refusing else 200)

    async def models(self) -> Response:
        service = self._open()
        return _json(msgspec.json.encode([service.control.describe_arm(arm) for arm in service.registry.models]))

    async def experiments(self) -> Response:
        return _json(msgspec.json.encode([self._open().control.describe_experiment()]))

    async def metrics(self, request: Request) -> Response:
        text, content_type = self._metrics.exposition(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    async def index(self) -> Response:
        return RedirectResponse("/docs")

    def _open(self) -> OpenService:
        if self._service is None:
            raise NotOpen
        return self._service

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises Problem: 415 for a compressed one, 413 as soon as it is too large, 408 if late."""
        limit = self._settings.max_body_bytes
        for name, value in scope["headers"]:
            if name == b"content-encoding" and value.lower() != b"identity":
                raise Compressed(value.decode("latin-1"))
            if name == b"content-length" and value.isdigit() and int(value) > limit:
                raise BodyTooLarge(limit)
        body = b""
        chunk: bytes
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    chunk = message.get("body", b"")
                    body = body + chunk if body else chunk
                    if len(body) > limit:
                        raise BodyTooLarge(limit)
                    if not message.get("more_body", False):
                        if not body and _upgrading(scope):
                            raise Upgrading
                        return body
        except TimeoutError:
            raise BodyTooSlow(BODY_S) from None

    async def _store_failure(self, store: FeatureStore) -> str | None:
        try:
            with self._metrics.store_call("ping"):
                await store.ping()
        except StoreUnavailable as err:
            return str(err)
        return None


def _upgrading(scope: Scope) -> bool:
    """Whether the server has dropped a body as that of another protocol: Java's client asks for HTTP/2 by default."""
    headers = dict(scope["headers"])
    announced = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
    return announced and b"upgrade" in headers


def _json(body: bytes, *, status: int = 200) -> Response:
    return Response(body, status_code=status, media_type="application/json")
