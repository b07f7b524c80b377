"""What counting one prediction's metrics costs: in memory, in files of several workers, and in the library's own way.

    python deploy/bench/counting.py [--rounds 60]

The metrics of one answered request of 100 candidates, counted by one thread. The three take turns; medians are told,
and the medians of the ratios within a turn. Then the time of one GET /metrics for two workers. Markdown on stdout.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from prometheus_client import values

from service.observability import multiprocess
from service.observability.metrics import STAGES, Metrics
from service.process.supervisor import SHARED_MEMORY
from service.worker import WorkerInfo

REPEATS = 300  # requests of one turn
CTR = np.random.default_rng(0).beta(1, 20, 100)
IN_MEMORY = "in memory"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    rounds: int = parser.parse_args().rounds
    with TemporaryDirectory(dir=SHARED_MEMORY) as ours, TemporaryDirectory(dir=SHARED_MEMORY) as librarys:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = librarys
        place = WorkerInfo(slot=0, workers=2, folder=Path(ours))
        (Path(ours) / "metrics").mkdir()
        kinds: dict[str, type] = {
            IN_MEMORY: values.MutexValue,
            "our files": multiprocess.value_class(Path(ours) / "metrics", place.slot),
            "the library's files": values.MultiProcessValue(lambda: place.slot),  # type: ignore[no-untyped-call]
        }
        metrics = {}
        for name, kind in kinds.items():
            values.ValueClass = kind  # the library's own switch
            metrics[name] = Metrics()
            count(metrics[name])
        taken: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(rounds):
            for name, counted in metrics.items():
                started = time.perf_counter()
                for _ in range(REPEATS):
                    count(counted)
                taken[name].append((time.perf_counter() - started) / REPEATS * 1e6)
        print("| counted | us a request | ratio |\n|---|---|---|")
        for name, turns in taken.items():
            ratio = statistics.median(mine / base for mine, base in zip(turns, taken[IN_MEMORY], strict=True))
            print(f"| {name} | {statistics.median(turns):.1f} | {ratio:.2f} |")
        print(f"\nGET /metrics of two workers: {_scrape_ms(place):.1f} ms")


def count(metrics: Metrics) -> None:
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
    metrics.arm("one").scored(CTR)


def _scrape_ms(place: WorkerInfo) -> float:
    assert place.folder is not None
    for slot in range(place.workers):
        metrics = Metrics(WorkerInfo(slot=slot, workers=place.workers, folder=place.folder))
        count(metrics)
    taken = []
    for _ in range(50):
        started = time.perf_counter()
        metrics.exposition("")
        taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
