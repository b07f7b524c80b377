"""The scorer: one request from its user to its click probabilities, a straight line with the store in its middle.

    start     assign -> admit -> find the ads' rows -> ask the store
    _score    encode -> run -> calibrate -> count -> answer

Both halves are plain calls. A request makes no task, no thread hop and no timer of its own, unless its run is too long
for the event loop.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.deadline import Deadline
from service.errors import Degraded, ModelFailed, Reason, Refusal, ShadowDropped, WouldBeLate
from service.experiments.assignment import Experiment, Running
from service.ids import canonical_id
from service.observability.metrics import OTHER_FIELD, Metrics
from service.runtime.scheduler import Run, RunOutcome, Scheduler, run_once
from service.scoring.admission import AdmissionController
from service.scoring.loaded_model import LoadedModel, Models
from service.scoring.model_inputs import ModelInput
from service.scoring.pending_score import OnOutcome, Outcome, PendingScore, PreparedInput, Scored
from service.scoring.recent_requests import RecentRequests
from service.scoring.request import ScoringRequest
from service.store.codec import NO_HISTORY
from service.store.feature_store import FeatureStore, Fetched, StoreUnavailable

log = logging.getLogger(__name__)

STORE_SHARE = 0.5  # of the time a request has left, for the store; the model needs the rest
SLICE_S = 0.005  # that the event loop scores requests for in one go, before it lets I/O in
SHADOW_MS = 1000.0  # after it the answer of a shadow arm is not worth its run
MAX_SHADOWS = 100  # requests under way
# What the arm's click rate can stand in for, by the reason of the refusal, and how `degraded` names it.
STANDS_IN = {
    Reason.DEADLINE: Degraded.DEADLINE,
    Reason.PREDICTED_LATE: Degraded.DEADLINE,
    Reason.OVERLOADED: Degraded.OVERLOADED,
    Reason.MODEL_FAILED: Degraded.PRIOR,
}

Fallback = Literal["none", "prior"]


class Scorer:
    """Where the model cannot be had in time, the model's previous version answers, or its click rate (`fallback`).

    Runs that are expected to take at most `inline_run_ms` are made by the event loop itself; longer ones, those of
    models that join requests, and all while a run is overdue go to the scheduler's thread.
    """

    def __init__(
        self,
        *,
        running: Running,
        models: Models,
        store: FeatureStore,
        scheduler: Scheduler,
        metrics: Metrics,
        fallback: Fallback,
        inline_run_ms: float,
    ) -> None:
        self._running = running
        self._models = models
        self._store = store
        self._scheduler = scheduler
        self._metrics = metrics
        self._fallback = fallback
        self._inline_s = inline_run_ms / 1000
        self._fetch_seconds, self._fetch_errors = metrics.store_op("fetch")
        self._admission = AdmissionController()
        self._process, self._numbers = secrets.token_hex(8), count()  # of requests without an id: a new one each
        self._ready: deque[PendingScore] = deque()
        self._is_scheduled = False
        self._num_shadows = 0
        self.recent = RecentRequests()

    def check(self, deadline: Deadline) -> None:
        """Raises DeadlinePassed or WouldBeLate for a request that is late already, or would be behind others.

        Before any work for it, unless the click rate is to stand in, for which its arm must be known.
        """
        if self._fallback == "none":
            deadline.check()
            self._admission.check(deadline)

    def start(
        self, request: ScoringRequest, *, request_id: str | int | None, deadline: Deadline, on_outcome: OnOutcome
    ) -> PendingScore:
        """The first half. `on_outcome` is called once, perhaps before this returns, unless the request is cancelled.

        Refusals are InvalidValue for a value its field cannot take; Overloaded, WouldBeLate, ModelFailed while the
        model is busy or broken; DeadlinePassed. But for the first it answers in steps, each named in `degraded`, as
        far as there are any. MalformedFeatures: the body has to tell what is wrong.
        """
        experiment, request_id, arm = self._assign(request, request_id)
        pending = PendingScore(
            request, request_id, deadline, on_outcome, experiment=experiment, arm=arm, model=self._models.get(arm)
        )
        self._begin(pending)
        return pending

    def cancel(self, pending: PendingScore) -> None:
        """The client has gone: nothing more is done for it, and its outcome is told to nobody."""
        if not pending.is_done:
            self._end(pending)
            if pending.run is not None:
                self._scheduler.cancel(pending.run)

    async def score(self, request: ScoringRequest, *, request_id: str | int | None, deadline: Deadline) -> Scored:
        """The same for who can wait. Raises what `start` says."""
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

        def on_outcome(value: Outcome) -> None:
            if not outcome.done():
                outcome.set_result(value)

        pending = self.start(request, request_id=request_id, deadline=deadline, on_outcome=on_outcome)
        try:
            value = await outcome
        except asyncio.CancelledError:
            self.cancel(pending)
            raise
        if isinstance(value, Exception):
            raise value
        return value

    async def prepare(
        self, request: ScoringRequest, *, request_id: str | int | None, deadline: Deadline
    ) -> PreparedInput:
        """All that comes before the model, with the packed ids that an explanation reads. Raises as `start`."""
        experiment, request_id, arm = self._assign(request, request_id)
        model = self._models.get(arm)
        try:
            built = await self.build_input(model, request, deadline, with_ids=True)
        except Refusal as refusal:
            refusal.arm = arm
            raise
        return PreparedInput(
            request=request, request_id=request_id, experiment=experiment, arm=arm, model=model, input=built
        )

    async def build_input(
        self, model: LoadedModel, request: ScoringRequest, deadline: Deadline, *, with_ids: bool = False
    ) -> ModelInput:
        """One request's inputs for one model, whoever serves it: explanations and warm-up. Raises as `start`."""
        with model.served.lease():
            lookup = model.inputs.find(request, with_ids=with_ids)
            fetched: Fetched | None = None
            if lookup.needs_store(request):
                try:
                    async with asyncio.timeout(max(STORE_SHARE * deadline.left_s, 0)):
                        fetched = await self._store.fetch(
                            request.user, lookup.items, before=request.ts, limit=lookup.num_clicks
                        )
                except (StoreUnavailable, TimeoutError):
                    self._fetch_errors.inc()
            else:
                fetched = NOTHING_FETCHED
            return model.inputs.build(request, lookup, fetched)

    # --- first half ---

    def _assign(self, request: ScoringRequest, request_id: str | int | None) -> tuple[Experiment, str | int, str]:
        """The running experiment, the request's id (a new one where it has none), and the arm of its user or id."""
        experiment = self._running.now
        if request_id is None:
            request_id = f"{self._process}-{next(self._numbers):x}"
        unit = request.user if request.user is not None else canonical_id(request_id)
        return experiment, request_id, experiment.assign(unit).name

    def _begin(self, pending: PendingScore) -> None:
        started = time.perf_counter()
        model, request = pending.model, pending.request
        model.served.acquire()
        try:
            expected_s = model.served.latency.expected_s(pending.num_candidates)
            if not pending.is_shadow:
                self._admission.admit(expected_s, pending.deadline)
                pending.expected_s = expected_s
            pending.lookup = lookup = model.inputs.find(request)
            pending.asked_at = now = time.perf_counter()
            pending.busy_s = now - started
            if lookup.needs_store(request):
                self._store.fetch_soon(
                    request.user,
                    lookup.items,
                    lambda fetched: self._on_fetched(pending, fetched),
                    before=request.ts,
                    limit=lookup.num_clicks,
                    timeout_s=STORE_SHARE * pending.deadline.left_s,
                )
            else:
                self._on_fetched(pending, NOTHING_FETCHED)
        except Exception as err:  # noqa: BLE001 - whoever waits hears of it, whatever it is
            self._fail(pending, err)

    def _on_fetched(self, pending: PendingScore, fetched: Fetched | StoreUnavailable) -> None:
        """The store has answered: the request is scored with those whose answers came together."""
        if pending.is_done:
            return
        pending.fetch_s = time.perf_counter() - pending.asked_at
        if isinstance(fetched, StoreUnavailable):
            self._fetch_errors.inc()
            self._fetch_seconds.observe(pending.fetch_s)
        else:
            pending.fetched = fetched
        self._ready.append(pending)
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._score_ready)

    # --- second half ---

    def _score_ready(self) -> None:
        """Scores what is ready, one request after the other, for at most a slice of time."""
        self._is_scheduled = False
        until = time.perf_counter() + SLICE_S
        scored: list[PendingScore] = []
        while self._ready:
            pending = self._ready.popleft()
            if pending.is_done:
                continue
            try:
                if self._run(pending):
                    scored.append(pending)
            except Exception as err:  # noqa: BLE001 - as above
                self._fail(pending, err)
            if time.perf_counter() >= until:
                break
        if scored:
            self._finish(scored)
        if self._ready and not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._score_ready)

    def _run(self, pending: PendingScore) -> bool:
        """Whether the logits are there; else the model's thread brings them."""
        pending.deadline.check()
        started = time.perf_counter()
        assert pending.lookup is not None
        model, served = pending.model, pending.model.served
        pending.input = model.inputs.build(pending.request, pending.lookup, pending.fetched)
        encoded = time.perf_counter()
        pending.busy_s += encoded - started
        pending.encode_s = pending.busy_s
        if self._runs_inline(pending):
            outcome = run_once(served.backend, pending.input.arrays, pending.num_candidates)
            pending.infer_s = time.perf_counter() - encoded
            pending.busy_s += pending.infer_s
            if isinstance(outcome, Refusal):
                raise outcome
            pending.logits = outcome
            return True
        pending.run = Run(
            model=served,
            arrays=pending.input.arrays,
            num_candidates=pending.num_candidates,
            expires_at=pending.deadline.at,
            timeout_ms=pending.deadline.timeout_ms,
            is_shadow=pending.is_shadow,
            on_run=lambda outcome, run: self._on_run(pending, outcome, run),
        )
        self._scheduler.submit(pending.run)
        self._metrics.queue_candidates.set(self._scheduler.num_queued)
        return False

    def _runs_inline(self, pending: PendingScore) -> bool:
        return (
            not pending.is_shadow
            and not pending.model.served.backend.joins
            and pending.expected_s <= self._inline_s
            and not self._scheduler.is_overdue
        )

    def _on_run(self, pending: PendingScore, outcome: RunOutcome, run: Run) -> None:
        """The model's thread is done with it, or its deadline has passed."""
        self._metrics.queue_candidates.set(self._scheduler.num_queued)
        if pending.is_done:
            return
        if run.started_at:
            self._metrics.stages["queue"].observe(run.started_at - run.queued_at)
        if isinstance(outcome, Refusal):
            self._fail(pending, outcome)
            return
        pending.infer_s = run.seconds
        pending.busy_s += run.seconds
        pending.logits = outcome
        self._finish([pending])

    def _finish(self, scored: list[PendingScore]) -> None:
        """Calibrates, counts and answers requests that were scored together: by arm, in one call each."""
        by_model: dict[LoadedModel, list[PendingScore]] = {}
        for pending in scored:
            by_model.setdefault(pending.model, []).append(pending)
        for model, group in by_model.items():
            logits = [pending.logits for pending in group if pending.logits is not None]
            ctr = model.calibration(logits[0] if len(logits) == 1 else np.concatenate(logits))
            start = 0
            for pending in group:
                stop = start + pending.num_candidates
                self._answer(pending, ctr[start:stop])
                start = stop

    def _answer(self, pending: PendingScore, ctr: NDArray[np.float64]) -> None:
        started = time.perf_counter()
        try:
            if not np.isfinite(ctr.sum()):
                raise ModelFailed("the model gave a score that is no number")
            pending.deadline.check()
        except Refusal as refusal:
            self._fail(pending, refusal)
            return
        assert pending.input is not None
        model = pending.model
        self._end(pending)
        self._count(pending, ctr)
        self._resolve(pending, model, ctr, _degraded(pending.input.degraded, pending.cause))
        model.served.latency.observe(pending.num_candidates, pending.busy_s + time.perf_counter() - started)
        if not pending.is_shadow:
            self.recent.add(pending.arm, pending.request)  # only what a model could take: a load replays it
            if pending.experiment.shadow:
                self._start_shadows(pending)

    def _resolve(
        self, pending: PendingScore, model: LoadedModel, ctr: NDArray[np.float64], degraded: Sequence[Degraded]
    ) -> None:
        pending.on_outcome(
            Scored(
                request_id=pending.request_id,
                experiment=pending.experiment.name,
                arm=pending.arm,
                model=model.name,
                version=model.version,
                ctr=ctr,
                degraded=degraded,
            )
        )

    def _count(self, pending: PendingScore, ctr: NDArray[np.float64]) -> None:
        """What is scored, and what it did without, in the metrics."""
        metrics, of_input = self._metrics, pending.input
        assert of_input is not None
        metrics.arm(pending.arm).scored(ctr)
        stages = metrics.stages
        stages["infer"].observe(pending.infer_s)
        metrics.batch_candidates.observe(pending.num_candidates)
        if pending.is_shadow:
            return
        if pending.fetched is not None and pending.fetched is not NOTHING_FETCHED:
            self._fetch_seconds.observe(pending.fetch_s)
        stages["fetch"].observe(pending.fetch_s)
        stages["encode"].observe(pending.encode_s)
        for name, number in of_input.unknown.items():
            metrics.unknown_values(name).inc(number)
        if of_input.num_unnamed:
            metrics.unknown_values(OTHER_FIELD).inc(of_input.num_unnamed)
        for reason in _degraded(of_input.degraded, pending.cause):
            metrics.degraded(reason).inc()
        if pending.request.behaviours is None and pending.fetched is not None and pending.lookup is not None:
            history = pending.fetched.behaviours
            if pending.lookup.num_clicks:
                metrics.history_length.observe(len(history))
                if len(history):
                    metrics.freshness_seconds.observe(pending.request.ts - history.ts[-1])

    # --- what stands in for the model ---

    def _fail(self, pending: PendingScore, err: Exception) -> None:
        """The request has no score of its model: another answer, where there is one, or the refusal."""
        if pending.is_done:
            return
        self._end(pending)
        if not isinstance(err, Refusal):
            pending.on_outcome(err)
            return
        err.arm = pending.arm
        latency = pending.model.served.latency
        if isinstance(err, WouldBeLate) and latency.expected_s(pending.num_candidates) > pending.deadline.left_s:
            latency.decay()
        if pending.cause is not None and err.reason not in STANDS_IN:
            err = pending.cause  # what the previous version has against the request is not the client's fault
        if pending.is_shadow or err.reason not in STANDS_IN:
            pending.on_outcome(err)
            return
        previous = self._models.previous(pending.arm)
        if isinstance(err, ModelFailed) and previous is not None and pending.cause is None:
            log.error("model failed", extra={"arm": pending.arm, "cause": str(err.__cause__ or err)})
            self._begin(
                PendingScore(
                    pending.request,
                    pending.request_id,
                    pending.deadline,
                    pending.on_outcome,
                    experiment=pending.experiment,
                    arm=pending.arm,
                    model=previous,
                    cause=err,
                )
            )
            return
        model = self._models.get(pending.arm)
        rate = model.artifact.manifest.click_rate
        if self._fallback == "none" or rate is None:
            pending.on_outcome(err)
            return
        reason = STANDS_IN[err.reason]
        ctr = np.full(pending.num_candidates, rate)
        self._metrics.degraded(reason).inc()
        self._metrics.arm(pending.arm).scored(ctr)
        self._resolve(pending, model, ctr, (reason,))

    def _end(self, pending: PendingScore) -> None:
        pending.is_done = True
        pending.model.served.release()
        if pending.expected_s:
            self._admission.release(pending.expected_s)
        if pending.is_shadow:
            self._num_shadows -= 1

    # --- shadow arms ---

    def _start_shadows(self, pending: PendingScore) -> None:
        """Behind the answer, which does not wait for it."""
        for arm in pending.experiment.shadows(canonical_id(pending.request_id)):
            if self._num_shadows >= MAX_SHADOWS or not self._scheduler.takes_shadow:
                self._metrics.rejected(ShadowDropped.reason).inc()
                continue
            self._num_shadows += 1
            self._begin(
                PendingScore(
                    pending.request,
                    pending.request_id,
                    Deadline.after(SHADOW_MS, since=time.monotonic()),
                    self._on_shadow,
                    experiment=pending.experiment,
                    arm=arm.name,
                    model=self._models.get(arm.name),
                    is_shadow=True,
                )
            )

    def _on_shadow(self, outcome: Outcome) -> None:
        if isinstance(outcome, Refusal):
            self._metrics.rejected(outcome.reason).inc()
        elif isinstance(outcome, Exception):  # behind an answer there is nobody else to tell
            log.error("unforeseen error of a shadow arm", exc_info=outcome)


def _degraded(reasons: Sequence[Degraded], cause: ModelFailed | None) -> Sequence[Degraded]:
    return reasons if cause is None else [*reasons, Degraded.PREVIOUS_VERSION]


NOTHING_FETCHED = Fetched(user=None, behaviours=NO_HISTORY, items=[])
