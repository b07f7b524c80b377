"""The predict endpoint: from a body's bytes to the bytes of the answer, whoever carries them."""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from service.deadline import Deadline
from service.errors import NotOpen, Refusal
from service.http import schemas
from service.http.decoding import Decoder
from service.http.problems import nested_too_deep
from service.http.schemas import PredictRequest
from service.observability.metrics import NO_ARM, Metrics
from service.scoring.explainer import Explainer
from service.scoring.pending_score import Outcome, Scored
from service.scoring.request import MalformedFeatures
from service.scoring.scorer import Scorer
from service.settings import Settings

ROUTE = "/predict"

Cancel = Callable[[], None]


class Scoring(Protocol):
    """What of an open service this needs."""

    @property
    def scorer(self) -> Scorer: ...
    @property
    def explainer(self) -> Explainer: ...


class Reply(Protocol):
    """Who sends the answer: one of the two is called, once."""

    def answer(self, body: bytes, arm: str) -> None: ...
    def refuse(self, error: Exception) -> None:
        """A Refusal, or an unforeseen error."""


class PredictEndpoint:
    """`service` is None while the service is not open."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.service: Scoring | None = None
        self.decoder = Decoder(PredictRequest)
        self._settings = settings
        self._parse_seconds, self._respond_seconds = metrics.stages["parse"], metrics.stages["respond"]

    def start(self, body: bytes, reply: Reply, *, arrived_at: float) -> Cancel | None:
        """Answers by `reply`, perhaps before this returns; what it returns ends the work of a client that has gone.

        `arrived_at` is when the request came, on the monotonic clock: its deadline does not wait for us.
        """
        try:
            return self._start(body, reply, arrived_at)
        except RecursionError:  # nothing here nests deeply but what a client sends
            reply.refuse(nested_too_deep())
        except Exception as err:  # noqa: BLE001 - the reply tells a refusal from an error of ours
            reply.refuse(err)
        return None

    def _start(self, body: bytes, reply: Reply, arrived_at: float) -> Cancel | None:
        started = time.perf_counter()
        sent = self.decoder.decode(body)
        if self.service is None:
            raise NotOpen
        if sent.explain:
            task = asyncio.get_running_loop().create_task(self._explain(sent, body, reply, arrived_at))
            return task.cancel  # type: ignore[return-value] # whether it was cancelled interests nobody
        scorer = self.service.scorer
        deadline = Deadline.after(sent.timeout_ms or self._settings.timeout_ms, since=arrived_at)
        scorer.check(deadline)
        request = schemas.scoring_request(sent, now=time.time(), max_candidates=self._settings.max_candidates)
        self._parse_seconds.observe(time.perf_counter() - started)

        def on_outcome(outcome: Outcome) -> None:
            if isinstance(outcome, Scored):
                responding = time.perf_counter()
                content = schemas.answer(sent, outcome)
                reply.answer(content, outcome.arm)
                self._respond_seconds.observe(time.perf_counter() - responding)
            elif isinstance(outcome, MalformedFeatures):
                reply.refuse(self.decoder.refusal(body, str(outcome)))
            else:
                reply.refuse(outcome)

        pending = scorer.start(request, request_id=sent.request_id, deadline=deadline, on_outcome=on_outcome)
        return lambda: scorer.cancel(pending)

    async def explain(self, body: bytes, *, arrived_at: float) -> tuple[bytes, str]:
        """The answer of POST /explain, and its arm. Raises Refusal."""
        return await self._explained(self.decoder.decode(body), body, arrived_at)

    async def _explain(self, sent: PredictRequest, body: bytes, reply: Reply, arrived_at: float) -> None:
        try:
            content, arm = await self._explained(sent, body, arrived_at)
        except Exception as err:  # noqa: BLE001 - as above
            reply.refuse(err)
        else:
            reply.answer(content, arm)

    async def _explained(self, sent: PredictRequest, body: bytes, arrived_at: float) -> tuple[bytes, str]:
        if self.service is None:
            raise NotOpen
        limit = min(self._settings.max_explained, self._settings.max_candidates)
        request = schemas.scoring_request(sent, now=time.time(), max_candidates=limit)
        deadline = Deadline.after(sent.timeout_ms or self._settings.timeout_ms, since=arrived_at)
        try:
            explained = await self.service.explainer.explain(request, request_id=sent.request_id, deadline=deadline)
        except MalformedFeatures as err:
            raise self.decoder.refusal(body, str(err)) from None
        return schemas.explained(sent, explained), explained.scored.arm


def arm_of(error: Exception) -> str:
    return error.arm or NO_ARM if isinstance(error, Refusal) else NO_ARM
