"""The spine: one request from its user to its click probabilities."""

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.deadline import Deadline
from service.errors import Problem, of_arm, shadow_dropped
from service.experiments.assignment import Experiment, Running
from service.ids import spelled
from service.observability.metrics import Metrics
from service.registry.registry import ModelRegistry
from service.scoring.admission import Pace
from service.scoring.feature_merge import Given
from service.scoring.loaded_model import LoadedModel
from service.scoring.model_inputs import Inputs, Read
from service.scoring.recent_requests import Recent

log = logging.getLogger(__name__)

# What the arm's click rate can stand in for, by the reason of the refusal, and how the answer's `degraded` names it.
STANDS_IN = {"deadline": "deadline", "predicted_late": "deadline", "overloaded": "overloaded", "model_failed": "prior"}
PREVIOUS_VERSION = "previous_version"
SHADOW_MS = 1000.0  # after it the answer of a shadow arm is not worth its run
MAX_SHADOWS = 100  # requests under way

Fallback = Literal["none", "prior"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """An answer: calibrated click probabilities in the candidates' order, and what it had to do without."""

    request_id: str | int
    experiment: str
    arm: str
    model: str
    version: str
    ctr: NDArray[np.float64]
    degraded: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A request, whose it is, and its model."""

    request_id: str | int
    experiment: Experiment
    arm: str
    model: LoadedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded(Drawn):
    """A request on its way: also what its model is fed."""

    read: Read


class Scorer:
    """Where the model cannot be had in time, the model's previous version answers, or its click rate (`fallback`)."""

    def __init__(
        self, *, running: Running, catalog: ModelRegistry, inputs: Inputs, metrics: Metrics, fallback: Fallback
    ) -> None:
        self._running = running
        self._catalog = catalog
        self._inputs = inputs
        self._metrics = metrics
        self._fallback = fallback
        self._pace = Pace()
        self._process, self._numbers = secrets.token_hex(8), count()  # of requests without an id: a new one each
        self.recent = Recent()
        self._shadows: set[asyncio.Task[None]] = set()  # the loop itself holds no task

    def check(self, deadline: Deadline) -> None:
        """Raises Problem for a request that is too late already, or would be behind those under way: 504, 503.

        Before any work for it, unless the click rate is to stand in, for which its arm must be known.
        """
        if self._fallback == "none":
            deadline.check()
            self._pace.check(deadline)

    async def score(self, given: Given, *, request_id: str | int | None, deadline: Deadline) -> Scored:
        """Raises Problem: 422 for a value its field cannot take, 503 while the model is busy or broken, 504 late.

        But for the first of these it answers in steps, each named in `degraded`, as far as there are any.
        """
        drawn = self._draw(given, request_id)
        with of_arm(drawn.arm):
            num_candidates, batcher = len(given.candidates.ids), drawn.model.batcher
            expected_s = batcher.expected_s(num_candidates)
            try:
                with self._pace.admitted(num_candidates, expected_s, deadline):
                    scored = await self._by_model(drawn, given, deadline)
                self.recent.add(drawn.arm, given)  # only what a model could take: a load replays it
            except Problem as problem:
                if problem.reason == "predicted_late" and expected_s > deadline.left_s:
                    batcher.doubt()
                scored = await self._without_model(drawn, given, deadline, problem)
        self._metrics.arm(drawn.arm).scored(scored.ctr)
        self._begin_shadows(drawn, given)
        return scored

    async def encode(self, given: Given, *, request_id: str | int | None, deadline: Deadline) -> Encoded:
        """All that comes before the model: whose request it is, what the store knows, the arrays."""
        return await self._read(self._draw(given, request_id), given, deadline)

    def answer(self, encoded: Encoded, logits: NDArray[np.float32]) -> Scored:
        return _answer(encoded, encoded.model.artifact.calibration(logits), encoded.read.degraded)

    async def aclose(self) -> None:
        """Ends the shadow requests that are under way."""
        for task in self._shadows:
            task.cancel()
        await asyncio.gather(*self._shadows, return_exceptions=True)

    def _draw(self, given: Given, request_id: str | int | None) -> Drawn:
        experiment = self._running.now
        request_id = f"{self._process}-{next(self._numbers):x}" if request_id is None else request_id
        arm = experiment.assign(given.user if given.user is not None else spelled(request_id)).name
        return Drawn(request_id=request_id, experiment=experiment, arm=arm, model=self._catalog.models[arm])

    async def _read(self, drawn: Drawn, given: Given, deadline: Deadline) -> Encoded:
        with of_arm(drawn.arm):
            read = await self._inputs.read(drawn.model, given, deadline)
        return Encoded(
            request_id=drawn.request_id, experiment=drawn.experiment, arm=drawn.arm, model=drawn.model, read=read
        )

    async def _by_model(self, drawn: Drawn, given: Given, deadline: Deadline, *, shadow: bool = False) -> Scored:
        with drawn.model.batcher.held():  # from here on: a swap waits for it
            encoded = await self._read(drawn, given, deadline)
            if not shadow:
                for stage, seconds in encoded.read.seconds.items():
                    self._metrics.stages[stage].observe(seconds)
            deadline.check()
            logits = await drawn.model.batcher.submit(encoded.read.arrays, deadline, shadow=shadow)
            deadline.check()
        if not shadow:
            self._inputs.count(drawn.model, given, encoded.read)
        return self.answer(encoded, logits)

    async def _without_model(self, drawn: Drawn, given: Given, deadline: Deadline, problem: Problem) -> Scored:
        """Raises the problem itself where nothing stands in for the model."""
        if problem.reason not in STANDS_IN:
            raise problem
        previous = self._catalog.previous(drawn.arm) if problem.reason == "model_failed" else None
        if previous is not None:
            log.error("model failed", extra={"arm": drawn.arm, "cause": str(problem.__cause__ or problem)})
            try:
                scored = await self._by_model(replace(drawn, model=previous), given, deadline)
                return self._with_reason(scored, PREVIOUS_VERSION)
            except Problem as also:
                if also.reason in STANDS_IN:  # what that version has against the request is not the client's fault
                    problem = also
        rate = drawn.model.artifact.manifest.click_rate
        if self._fallback == "none" or rate is None or problem.reason not in STANDS_IN:
            raise problem
        ctr = np.full(len(given.candidates.ids), rate)
        return self._with_reason(_answer(drawn, ctr, []), STANDS_IN[problem.reason])

    def _with_reason(self, scored: Scored, reason: str) -> Scored:
        self._metrics.degraded(reason).inc()
        return replace(scored, degraded=[*scored.degraded, reason])

    def _begin_shadows(self, drawn: Drawn, given: Given) -> None:
        """Goes on behind the answer, which does not wait for it."""
        for arm in drawn.experiment.shadows(spelled(drawn.request_id)):
            model = self._catalog.models[arm.name]
            if len(self._shadows) >= MAX_SHADOWS or not model.batcher.takes_shadow:
                self._metrics.rejected(shadow_dropped().reason).inc()
                continue
            task = asyncio.create_task(self._score_shadow(replace(drawn, arm=arm.name, model=model), given))
            self._shadows.add(task)
            task.add_done_callback(self._shadows.discard)

    async def _score_shadow(self, drawn: Drawn, given: Given) -> None:
        deadline = Deadline.after(SHADOW_MS, since=time.monotonic())
        try:
            scored = await self._by_model(drawn, given, deadline, shadow=True)
        except Problem as problem:
            self._metrics.rejected(problem.reason).inc()
        except Exception:  # behind an answer there is nobody else to tell
            log.exception("unforeseen error", extra={"arm": drawn.arm})
        else:
            self._metrics.arm(drawn.arm).scored(scored.ctr)


def _answer(drawn: Drawn, ctr: NDArray[np.float64], degraded: list[str]) -> Scored:
    manifest = drawn.model.artifact.manifest
    return Scored(
        request_id=drawn.request_id,
        experiment=drawn.experiment.name,
        arm=drawn.arm,
        model=manifest.model,
        version=manifest.version,
        ctr=ctr,
        degraded=degraded,
    )
