"""Every metric by name, once: what is counted, with which labels, in which buckets.

Series whose labels are known exist from the start with 0, so that a rate begins at a zero that was scraped.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, ProcessCollector

from service.errors import Degraded, Reason
from service.observability import exposition
from service.observability.exposition import NumbersCollector
from service.observability.instruments import OTHER, Counter, Families, Histogram
from service.observability.multiprocess import WorkerFiles, WorkerProcesses
from service.worker import WorkerInfo

Stage = Literal["parse", "fetch", "encode", "queue", "infer", "respond"]
STAGES: tuple[Stage, ...] = ("parse", "fetch", "encode", "queue", "infer", "respond")
STORE_OPS = ("fetch", "append", "ping")

NO_ARM = "none"  # a request that was refused before an arm was drawn, or that needs none
OTHER_FIELD = OTHER  # a feature no model of the arm knows: clients name those, so they cannot be labels

# The answers of each route that are worth a zero before the first: of an arm's requests, and of those without one.
_ARM_STATUSES = {"/predict": ("200", "503", "504"), "/explain": ("200",)}
_NO_ARM_STATUSES = {"/predict": ("400", "422", "503"), "/explain": ("422",), "/events": ("202", "422", "503")}

_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
_CANDIDATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_CTR = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
_HISTORY = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0
_FRESHNESS = (1.0, 10.0, _MINUTE, 10 * _MINUTE, _HOUR, 6 * _HOUR, _DAY, 3 * _DAY, 7 * _DAY, 30 * _DAY, 90 * _DAY)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmMetrics:
    """One arm's counters."""

    candidates: Counter
    predicted_ctr: Histogram

    def scored(self, ctr: NDArray[np.float64]) -> None:
        self.candidates.inc(len(ctr))
        self.predicted_ctr.observe_many(ctr)


class Metrics:
    """All metrics of one process. What it exposes are those of all workers, where its place has several."""

    def __init__(self, place: WorkerInfo | None = None) -> None:
        families = Families()
        self._requests = families.counter("clickserve_requests", "Requests answered.", "route", "status", "arm")
        self._request_seconds = families.histogram(
            "clickserve_request_seconds",
            "From the first byte of a request to the last of its answer.",
            "route",
            "arm",
            edges=_SECONDS,
        )
        stage_seconds = families.histogram(
            "clickserve_stage_seconds", "Where the time of a prediction goes.", "stage", edges=_SECONDS
        )
        self._candidates = families.counter("clickserve_candidates", "Candidates scored.", "arm")
        self._predicted_ctr = families.histogram(
            "clickserve_predicted_ctr", "Predicted click probabilities.", "arm", edges=_CTR
        )
        batch_candidates = families.histogram(
            "clickserve_batch_candidates", "Candidates of one model run.", edges=_CANDIDATES
        )
        queue_candidates = families.gauge(
            "clickserve_queue_candidates", "Candidates that wait for a model, in all workers.", combine="sum"
        )
        rejected = families.counter("clickserve_rejected", "Requests refused.", "reason")
        degraded = families.counter("clickserve_degraded", "Requests answered without something.", "reason")
        self._store_seconds = families.histogram(
            "clickserve_store_seconds", "Calls to the store.", "op", edges=_SECONDS
        )
        self._store_errors = families.counter("clickserve_store_errors", "Failed calls to the store.", "op")
        store_failures = families.counter("clickserve_store_failures", "Failed commands to the store.", "cause")
        store_state = families.gauge(
            "clickserve_store_state", "1 while commands to the store fail by this cause.", "cause", combine="max"
        )
        unknown_values = families.counter("clickserve_unknown_values", "Values never seen in training.", "field")
        impressions = families.counter("clickserve_impressions", "Impressions reported.", "arm")
        clicks = families.counter("clickserve_clicks", "Clicks reported.", "arm")
        self._model_info = families.gauge(
            "clickserve_model_info", "1 for every model that serves.", "arm", "model", "version", combine="max"
        )
        history_length = families.histogram(
            "clickserve_history_length", "Past clicks of a request's user that its model was fed.", edges=_HISTORY
        )
        freshness_seconds = families.histogram(
            "clickserve_freshness_seconds",
            "Age of the latest click in a request's history, at the request's own time.",
            edges=_FRESHNESS,
        )
        control_version = families.gauge(
            "clickserve_control_version",
            "Version of the control document that serves: of the worker that is furthest behind.",
            combine="min",
        )

        self.stages = {stage: stage_seconds.labels(stage) for stage in STAGES}
        self.batch_candidates = batch_candidates.labels()
        self.queue_candidates = queue_candidates.labels()
        self.history_length = history_length.labels()
        self.freshness_seconds = freshness_seconds.labels()
        self.control_version = control_version.labels()
        self.requests = self._requests.labels
        self.request_seconds = self._request_seconds.labels
        self.rejected = rejected.labels
        self.degraded = degraded.labels
        self.unknown_values = unknown_values.labels
        self.impressions = impressions.labels
        self.clicks = clicks.labels
        self.arm = cache(self._arm)
        self.store_failures, self.store_state = store_failures.labels, store_state.labels
        self._store_ops = {op: self._store_op(op) for op in STORE_OPS}
        for reason in Reason:
            self.rejected(reason)
        for degradation in Degraded:
            self.degraded(degradation)
        self.unknown_values(OTHER_FIELD)

        self.registry = CollectorRegistry()
        self._files: WorkerFiles | None = None
        if place is None or place.folder is None:
            self.registry.register(NumbersCollector(families, lambda: exposition.numbers_of(families)))
            ProcessCollector(registry=self.registry)
        else:
            self._files = WorkerFiles(place, families)
            self._files.join()
            self.registry.register(NumbersCollector(families, self._files.numbers_of_all))
            self.registry.register(WorkerProcesses(place))

    def declare_routes(self, routes: Iterable[str]) -> None:
        """The service's routes: any other path is counted as "other"."""
        routes = (*routes, OTHER)
        for family in (self._requests, self._request_seconds):
            family.bound("route", routes)
        for route in routes:
            self.request_seconds(route, NO_ARM)
            for status in _NO_ARM_STATUSES.get(route, ("404",) if route == OTHER else ("200",)):
                self.requests(route, status, NO_ARM)

    def declare_causes(self, causes: Iterable[str]) -> None:
        """Why commands to the store fail."""
        for cause in causes:
            self.store_failures(cause)
            self.store_state(cause).set(0)

    def declare_fields(self, fields: Iterable[str]) -> None:
        """The fields with a vocabulary, of a model that serves."""
        for field in fields:
            self.unknown_values(field)

    def model_serves(self, *, arm: str, model: str, version: str) -> None:
        self._model_info.labels(arm, model, version).set(1)

    def model_stops(self, *, arm: str, model: str, version: str) -> None:
        """Its series ends; with several workers, when the last of them has stopped serving it."""
        self._model_info.remove(arm, model, version)

    def store_call(self, op: str) -> "StoreCall":
        """Times one call to the store; an exception counts as its error and passes on."""
        return StoreCall(*self.store_op(op))

    def store_op(self, op: str) -> tuple[Histogram, Counter]:
        """Seconds and errors of one kind of call, for who cannot wrap it."""
        instruments = self._store_ops.get(op)
        if instruments is None:
            instruments = self._store_ops[op] = self._store_op(op)
        return instruments

    @contextmanager
    def shared(self) -> Iterator[None]:
        """While it is open, on a running event loop, the other workers see these numbers within a second."""
        if self._files is None:
            yield
            return
        with self._files.kept_up_to_date():
            yield

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The metrics as text and its content type, in the format the scraper asks for."""
        return exposition.written(self.registry, accept)

    def _arm(self, name: str) -> ArmMetrics:
        self.impressions(name), self.clicks(name)
        for route, statuses in _ARM_STATUSES.items():
            self.request_seconds(route, name)
            for status in statuses:
                self.requests(route, status, name)
        return ArmMetrics(candidates=self._candidates.labels(name), predicted_ctr=self._predicted_ctr.labels(name))

    def _store_op(self, op: str) -> tuple[Histogram, Counter]:
        return self._store_seconds.labels(op), self._store_errors.labels(op)


class StoreCall:
    """Times what is inside; an exception counts as an error, and passes on. A cancellation is none of the store's."""

    __slots__ = ("_errors", "_seconds", "_started")

    def __init__(self, seconds: Histogram, errors: Counter) -> None:
        self._seconds = seconds
        self._errors = errors

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, Exception):
            self._errors.inc()
        self._seconds.observe(time.perf_counter() - self._started)
