"""Every metric by name, once: what is counted, with which labels, in which buckets."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder

from service.observability import multiprocess
from service.worker import WorkerInfo

# It doubles the number of series, and no dashboard reads the other half.
disable_created_metrics()  # type: ignore[no-untyped-call] # the library does not annotate it

Stage = Literal["parse", "fetch", "encode", "queue", "infer", "respond"]
STAGES: tuple[Stage, ...] = ("parse", "fetch", "encode", "queue", "infer", "respond")

NO_ARM = "none"  # a request that was refused before an arm was drawn, or that needs none
OTHER_FIELD = "other"  # a feature no model of the arm knows: clients name those, so they cannot be labels

_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
_CANDIDATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_CTR = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
_CTR_EDGES = np.array(_CTR)

_MODEL_INFO = "clickserve_model_info"


@dataclass(frozen=True, kw_only=True)
class ArmMetrics:
    """One arm's own counters, bound once: looking up a label costs four times the counting."""

    candidates: Counter
    predicted_ctr: Histogram

    def scored(self, ctr: NDArray[np.float64]) -> None:
        self.candidates.inc(len(ctr))
        # What observe() does, for all at once: a thousand calls of it would take longer than the model.
        histogram = self.predicted_ctr
        for bucket, count in enumerate(np.bincount(_CTR_EDGES.searchsorted(ctr), minlength=len(_CTR)).tolist()):
            if count:
                histogram._buckets[bucket].inc(count)  # noqa: SLF001
        histogram._sum.inc(float(ctr.sum()))  # noqa: SLF001


class Metrics:
    """All metrics of one process, in a registry of their own; what it exposes are those of all workers of its place."""

    def __init__(self, place: WorkerInfo | None = None) -> None:
        self.registry = registry = CollectorRegistry()
        if place is None or place.folder is None:
            ProcessCollector(registry=registry)
            self._exposed = registry
        else:
            self._exposed = multiprocess.join(place, hidden_at_zero=_MODEL_INFO)
        self._requests = Counter(
            "clickserve_requests", "Requests answered.", ["route", "status", "arm"], registry=registry
        )
        self._request_seconds = Histogram(
            "clickserve_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["route", "arm"],
            buckets=_SECONDS,
            registry=registry,
        )
        stage_seconds = Histogram(
            "clickserve_stage_seconds",
            "Where the time of a prediction goes.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.stages = {stage: stage_seconds.labels(stage) for stage in STAGES}
        self._candidates = Counter("clickserve_candidates", "Candidates scored.", ["arm"], registry=registry)
        self._predicted_ctr = Histogram(
            "clickserve_predicted_ctr",
            "Predicted click probabilities.",
            ["arm"],
            buckets=_CTR,
            registry=registry,
        )
        self.batch_candidates = Histogram(
            "clickserve_batch_candidates", "Candidates of one model run.", buckets=_CANDIDATES, registry=registry
        )
        self.queue_candidates = Gauge(
            "clickserve_queue_candidates",
            "Candidates that wait for a model.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._rejected = Counter("clickserve_rejected", "Requests refused.", ["reason"], registry=registry)
        self._degraded = Counter(
            "clickserve_degraded", "Requests answered without something.", ["reason"], registry=registry
        )
        self._store_seconds = Histogram(
            "clickserve_store_seconds", "Calls to the store.", ["op"], buckets=_SECONDS, registry=registry
        )
        self._store_errors = Counter("clickserve_store_errors", "Failed calls to the store.", ["op"], registry=registry)
        self._unknown_values = Counter(
            "clickserve_unknown_values", "Values never seen in training.", ["field"], registry=registry
        )
        self._impressions = Counter("clickserve_impressions", "Impressions reported.", ["arm"], registry=registry)
        self._clicks = Counter("clickserve_clicks", "Clicks reported.", ["arm"], registry=registry)
        self._model_info = Gauge(
            _MODEL_INFO,
            "1 for every model that serves.",
            ["arm", "model", "version"],
            registry=registry,
            multiprocess_mode="livemax",
        )
        self.control_version = Gauge(
            "clickserve_control_version",
            "Version of the control document that is followed; of several workers the one that is furthest behind.",
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.request_seconds = cache(self._request_seconds.labels)
        self.requests = cache(self._requests.labels)
        self.rejected = cache(self._rejected.labels)
        self.degraded = cache(self._degraded.labels)
        self.unknown_values = cache(self._unknown_values.labels)
        self.impressions = cache(self._impressions.labels)
        self.clicks = cache(self._clicks.labels)
        self._store_children = cache(lambda op: (self._store_seconds.labels(op), self._store_errors.labels(op)))
        self.arm = cache(self._arm)

    def _arm(self, name: str) -> ArmMetrics:
        self.impressions(name), self.clicks(name)  # so that a rate starts from a zero that was scraped
        return ArmMetrics(candidates=self._candidates.labels(name), predicted_ctr=self._predicted_ctr.labels(name))

    def model_serves(self, *, arm: str, model: str, version: str) -> None:
        self._model_info.labels(arm, model, version).set(1)

    def model_stops(self, *, arm: str, model: str, version: str) -> None:
        """Its series vanishes; with several workers, when the last of them has told so."""
        self._model_info.labels(arm, model, version).set(0)
        self._model_info.remove(arm, model, version)

    @contextmanager
    def store_call(self, op: str) -> Iterator[None]:
        """Times one call to the store; an exception counts as its error and passes on."""
        seconds, errors = self._store_children(op)
        started = time.perf_counter()
        try:
            yield
        except Exception:
            errors.inc()
            raise
        finally:
            seconds.observe(time.perf_counter() - started)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The metrics as text and its content type, in the format the scraper asks for."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # a version that is no number
            encode, content_type = choose_encoder("")
        return encode(self._exposed), content_type
