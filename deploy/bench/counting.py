"""What counting one prediction's metrics costs: as plain numbers, and with prometheus_client's own objects.

    python deploy/bench/counting.py [--rounds 60] [--candidates 100]

The metrics of one answered request, counted by one thread. The two take turns; the table has medians, and the median
of the ratios within a turn. Then the time of one GET /metrics of two workers. Markdown on stdout.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from service.observability.metrics import STAGES, Metrics
from service.process.supervisor import SHARED_MEMORY
from service.worker import WorkerInfo

REPEATS = 300  # requests of one turn
EDGES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--candidates", type=int, default=100)
    options = parser.parse_args()
    ctr = np.random.default_rng(0).beta(1, 20, options.candidates)
    metrics, library = Metrics(), LibraryObjects()
    ways: dict[str, Callable[[], None]] = {
        "plain numbers": lambda: count(metrics, ctr),
        "prometheus_client": lambda: library.count(ctr),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            for _ in range(REPEATS):
                way()
            taken[name].append((time.perf_counter() - started) / REPEATS * 1e6)
    print("| counted | us a request | ratio |\n|---|---|---|")
    for name, turns in taken.items():
        ratio = statistics.median(one / base for one, base in zip(turns, taken["plain numbers"], strict=True))
        print(f"| {name} | {statistics.median(turns):.1f} | {ratio:.2f} |")
    print_shared(ctr)


def count(metrics: Metrics, ctr: NDArray[np.float64]) -> None:
    """What one answered prediction counts, of which most are observations of its times."""
    metrics.requests("/predict", "200", "one").inc()
    metrics.request_seconds("/predict", "one").observe(0.0031)
    for stage in STAGES:
        metrics.stages[stage].observe(0.0007)
    metrics.batch_candidates.observe(100)
    for waiting in (100, 0):
        metrics.queue_candidates.set(waiting)
    with metrics.store_call("fetch"):
        pass
    metrics.arm("one").scored(ctr)


class LibraryObjects:
    """The same numbers in the library's objects, each bound once; but for the probabilities, of which only the mean."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._requests = Counter("requests", "", ["route"], registry=registry).labels("/predict")
        self._seconds = [Histogram(f"seconds_{n}", "", registry=registry) for n in range(len(STAGES) + 2)]
        self._batch = Histogram("batch", "", registry=registry)
        self._queue = Gauge("queue", "", registry=registry)
        self._candidates = Counter("candidates", "", registry=registry)
        self._ctr = Histogram("ctr", "", buckets=EDGES, registry=registry)

    def count(self, ctr: NDArray[np.float64]) -> None:
        self._requests.inc()
        for seconds in self._seconds:
            seconds.observe(0.0007)
        self._batch.observe(100)
        for waiting in (100, 0):
            self._queue.set(waiting)
        self._candidates.inc(len(ctr))
        self._ctr.observe(float(ctr.mean()))


def print_shared(ctr: NDArray[np.float64]) -> None:
    with TemporaryDirectory(dir=SHARED_MEMORY) as folder:
        workers = [Metrics(WorkerInfo(slot=slot, workers=2, folder=Path(folder))) for slot in range(2)]
        for metrics in workers:
            count(metrics, ctr)
        print(f"\nGET /metrics of two workers: {_median_ms(lambda: workers[0].exposition('')):.1f} ms")


def _median_ms(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(50):
        started = time.perf_counter()
        call()
        taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
