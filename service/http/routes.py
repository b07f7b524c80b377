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

from service.deadline import Deadline
from service.errors import compressed, not_open, store_down, too_large, too_slow, upgrading
from service.experiments.assignment import Running
from service.http import openapi, schemas
from service.http.admin import Admin
from service.http.decoding import Decoder
from service.http.middleware import CAME_AT, Departure
from service.http.open_inference import OpenInference
from service.http.schemas import EventsDecoder, PredictRequest
from service.ingest.events import Events
from service.observability.metrics import Metrics
from service.registry.changes import Changes
from service.registry.follower import ControlFollower
from service.registry.registry import ModelRegistry
from service.scoring.explainer import Explainer
from service.scoring.feature_merge import Unreadable
from service.scoring.scorer import Scorer
from service.settings import Settings
from service.store.control_store import ControlStore
from service.store.feature_store import FeatureStore, StoreUnavailable

BODY_S = 10.0  # for a client to send a body


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an open service is made of; app.py puts it together."""

    scorer: Scorer
    explainer: Explainer
    events: Events
    running: Running
    changes: Changes
    control: ControlFollower
    control_store: ControlStore
    catalog: ModelRegistry
    store: FeatureStore


class Api:
    """`parts` is None while the service is not open; `stopping` takes readiness away before that."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.parts: Parts | None = None
        self.stopping = False
        self._settings = settings
        self._metrics = metrics
        self._predict_decoder = Decoder(PredictRequest)
        self._events_decoder = EventsDecoder()

    def router(self) -> APIRouter:
        router = APIRouter(default_response_class=Response)

        def add(path: str, answer: Callable[..., Any], **told: Any) -> None:
            router.add_api_route(path, answer, **told)
            if "methods" not in told:  # it is read with GET, and then HTTP wants HEAD too: load balancers probe with it
                router.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)

        add("/predict", self.predict, methods=["POST"], **openapi.PREDICT)
        add("/explain", self.explain, methods=["POST"], **openapi.EXPLAIN)
        add("/events", self.events, methods=["POST"], **openapi.EVENTS)
        add("/healthz", self.healthz, **openapi.HEALTHZ)
        add("/readyz", self.readyz, **openapi.READYZ)
        add("/models", self.models, **openapi.MODELS)
        add("/experiments", self.experiments, **openapi.EXPERIMENTS)
        OpenInference(
            self._settings, catalog=lambda: self._open().catalog, body=self._body, ready=self.readyz
        ).add_routes(add)
        Admin(self._settings.tokens_by_name, parts=self._open, body=self._body).add_routes(add)
        add("/metrics", self.metrics, include_in_schema=False)
        add("/", self.index, include_in_schema=False)
        return router

    async def predict(self, request: Request) -> Response:
        """Where the path is only found by routing, as behind a prefix; see front.py for the straight way."""
        return _json(await self.predicted(request.scope, request.receive))

    async def predicted(self, scope: Scope, receive: Receive) -> bytes:
        """The answer to a prediction. Raises Problem, and ClientDisconnect when nobody waits for it any more."""
        arrived = scope["state"].get(CAME_AT) or time.monotonic()
        body = await self._body(scope, receive)
        with Departure(receive):
            return await self._predicted(scope, body, arrived)

    async def _predicted(self, scope: Scope, body: bytes, arrived: float) -> bytes:
        started = time.perf_counter()
        asked = self._predict_decoder.decode(body)
        if asked.explain:
            return await self._explained(scope, body, asked, arrived)
        deadline = Deadline.after(asked.timeout_ms or self._settings.timeout_ms, since=arrived)
        scorer = self._open().scorer
        scorer.check(deadline)
        given = schemas.given(asked, now=time.time(), max_candidates=self._settings.max_candidates)
        self._metrics.stages["parse"].observe(time.perf_counter() - started)

        try:
            scored = await scorer.score(given, request_id=asked.request_id, deadline=deadline)
        except Unreadable as err:
            raise self._predict_decoder.refusal(body, str(err)) from None

        started = time.perf_counter()
        scope["state"]["arm"] = scored.arm
        answer = schemas.answer(asked, scored)
        self._metrics.stages["respond"].observe(time.perf_counter() - started)
        return answer

    async def explain(self, request: Request) -> Response:
        arrived = time.monotonic()
        body = await self._body(request.scope, request.receive)
        with Departure(request.receive):
            return _json(await self._explained(request.scope, body, self._predict_decoder.decode(body), arrived))

    async def _explained(self, scope: Scope, body: bytes, asked: PredictRequest, arrived: float) -> bytes:
        limit = min(self._settings.max_explained, self._settings.max_candidates)
        given = schemas.given(asked, now=time.time(), max_candidates=limit)
        deadline = Deadline.after(asked.timeout_ms or self._settings.timeout_ms, since=arrived)
        try:
            explained = await self._open().explainer.explain(given, request_id=asked.request_id, deadline=deadline)
        except Unreadable as err:
            raise self._predict_decoder.refusal(body, str(err)) from None
        scope["state"]["arm"] = explained.scored.arm
        return schemas.explained(asked, explained)

    async def events(self, request: Request) -> Response:
        sent = self._events_decoder.decode(await self._body(request.scope, request.receive))
        try:
            receipt = await self._open().events.record(sent)
        except StoreUnavailable as err:
            raise store_down() from err
        return _json(msgspec.json.encode(receipt), status=202)

    async def healthz(self) -> Response:
        return _json(b'{"status":"alive"}')

    async def readyz(self) -> Response:
        """Ready without a store, unless the settings say otherwise: an ad server must keep getting answers."""
        if self.parts is None:
            return _json(b'{"status":"starting"}', status=503)
        failure = await self._store_failure(self.parts.store)
        refusing = self.stopping or (failure is not None and self._settings.require_store)
        status = "stopping" if self.stopping else "ready" if failure is None else "degraded"
        store = {"ok": True} if failure is None else {"ok": False, "detail": failure}
        arms = {name: model.artifact.manifest.version for name, model in self.parts.catalog.models.items()}
        described = {"status": status, "store": store, "arms": arms, "control": self.parts.control.describe()}
        body = msgspec.json.encode(described)
        return _json(body, status=503 if refusing else 200)

    async def models(self) -> Response:
        parts = self._open()
        return _json(msgspec.json.encode([parts.control.describe_arm(arm) for arm in parts.catalog.models]))

    async def experiments(self) -> Response:
        return _json(msgspec.json.encode([self._open().control.describe_experiment()]))

    async def metrics(self, request: Request) -> Response:
        text, content_type = self._metrics.exposition(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    async def index(self) -> Response:
        return RedirectResponse("/docs")

    def _open(self) -> Parts:
        if self.parts is None:
            raise not_open()
        return self.parts

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises Problem: 415 for a compressed one, 413 as soon as it is too large, 408 if late."""
        limit = self._settings.max_body_bytes
        for name, value in scope["headers"]:
            if name == b"content-encoding" and value.lower() != b"identity":
                raise compressed(value.decode("latin-1"))
            if name == b"content-length" and value.isdigit() and int(value) > limit:
                raise too_large(limit)
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
                        raise too_large(limit)
                    if not message.get("more_body", False):
                        if not body and _upgrading(scope):
                            raise upgrading()
                        return body
        except TimeoutError:
            raise too_slow(BODY_S) from None

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
