"""The routes: bytes in, bytes out, and nothing decided here."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from service import documents, shapes
from service.catalog import Catalog
from service.deadline import Deadline
from service.decoding import Decoder
from service.errors import compressed, not_open, store_down, too_large, too_slow
from service.events import Events
from service.experiment import Experiment
from service.explain import Explainer
from service.features import FeatureStore, StoreUnavailable
from service.metrics import Metrics
from service.scorer import Scorer
from service.settings import Settings
from service.shapes import EventsDecoder, PredictRequest

BODY_S = 10.0  # for a client to send a body


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an open service is made of; app.py puts it together."""

    scorer: Scorer
    explainer: Explainer
    events: Events
    experiment: Experiment
    catalog: Catalog
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

        add("/predict", self.predict, methods=["POST"], **documents.PREDICT)
        add("/explain", self.explain, methods=["POST"], **documents.EXPLAIN)
        add("/events", self.events, methods=["POST"], **documents.EVENTS)
        add("/healthz", self.healthz, **documents.HEALTHZ)
        add("/readyz", self.readyz, **documents.READYZ)
        add("/models", self.models, **documents.MODELS)
        add("/experiments", self.experiments, **documents.EXPERIMENTS)
        add("/metrics", self.metrics, include_in_schema=False)
        add("/", self.index, include_in_schema=False)
        return router

    async def predict(self, request: Request) -> Response:
        arrived = time.monotonic()
        body = await self._body(request)
        started = time.perf_counter()
        asked = self._predict_decoder.decode(body)
        if asked.explain:
            return await self._explain(request, asked, arrived)
        given = shapes.given(asked, now=time.time(), max_candidates=self._settings.max_candidates)
        self._metrics.stages["parse"].observe(time.perf_counter() - started)

        deadline = Deadline.after(asked.timeout_ms or self._settings.timeout_ms, since=arrived)
        scored = await self._open().scorer.score(given, request_id=asked.request_id, deadline=deadline)

        started = time.perf_counter()
        request.state.arm = scored.arm
        answer = _json(shapes.answer(asked, scored))
        self._metrics.stages["respond"].observe(time.perf_counter() - started)
        return answer

    async def explain(self, request: Request) -> Response:
        arrived = time.monotonic()
        return await self._explain(request, self._predict_decoder.decode(await self._body(request)), arrived)

    async def _explain(self, request: Request, asked: PredictRequest, arrived: float) -> Response:
        limit = min(self._settings.max_explained, self._settings.max_candidates)
        given = shapes.given(asked, now=time.time(), max_candidates=limit)
        deadline = Deadline.after(asked.timeout_ms or self._settings.timeout_ms, since=arrived)
        explained = await self._open().explainer.explain(given, request_id=asked.request_id, deadline=deadline)
        request.state.arm = explained.scored.arm
        return _json(shapes.explained(asked, explained))

    async def events(self, request: Request) -> Response:
        sent = self._events_decoder.decode(await self._body(request))
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
        body = msgspec.json.encode({"status": status, "store": store, "arms": arms})
        return _json(body, status=503 if refusing else 200)

    async def models(self) -> Response:
        models = self._open().catalog.models
        return _json(msgspec.json.encode([{"arm": arm, **model.describe()} for arm, model in models.items()]))

    async def experiments(self) -> Response:
        experiment = self._open().experiment
        arms = [{**arm.model_dump(), "propensity": experiment.propensity(arm)} for arm in experiment.arms]
        return _json(msgspec.json.encode([{"experiment": experiment.name, "unit": experiment.unit, "arms": arms}]))

    async def metrics(self, request: Request) -> Response:
        text, content_type = self._metrics.exposition(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    async def index(self) -> Response:
        return RedirectResponse("/docs")

    def _open(self) -> Parts:
        if self.parts is None:
            raise not_open()
        return self.parts

    async def _body(self, request: Request) -> bytes:
        """The whole body. Raises Problem: 415 for a compressed one, 413 as soon as it is too large, 408 if late."""
        limit = self._settings.max_body_bytes
        coding = request.headers.get("content-encoding", "identity")
        if coding.lower() != "identity":
            raise compressed(coding)
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            raise too_large(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large(limit)
        except TimeoutError:
            raise too_slow(BODY_S) from None
        return bytes(body)

    async def _store_failure(self, store: FeatureStore) -> str | None:
        try:
            with self._metrics.store_call("ping"):
                await store.ping()
        except StoreUnavailable as err:
            return str(err)
        return None


def _json(body: bytes, *, status: int = 200) -> Response:
    return Response(body, status_code=status, media_type="application/json")
