"""Metrics in the files of several workers, compared with one registry in memory that counts for all of them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import values
from prometheus_client.parser import text_string_to_metric_families

from service.observability import multiprocess
from service.observability.metrics import Metrics
from service.worker import WorkerInfo

Join = Callable[[int], Metrics]


@pytest.fixture
def join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Join]:
    """The metrics of the worker in a slot: as of another process, but that they create no series after the next."""
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)  # so that it is put back
    files = []

    def joined(slot: int) -> Metrics:
        metrics = Metrics(place(tmp_path, slot))
        files.append(values.ValueClass.files)
        return metrics

    yield joined
    for file in [file for of_one in files for file in of_one.values()]:
        file._f.close()


def place(folder: Path, slot: int) -> WorkerInfo:
    return WorkerInfo(slot=slot, workers=2, folder=folder)


def told(metrics: Metrics) -> dict[str, float]:
    """Every sample of the service, by its name and labels."""
    text = metrics.exposition("")[0].decode()
    return {
        f"{sample.name} {sorted(sample.labels.items())}": round(sample.value, 9)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("clickserve_")
    }


def work(metrics: Metrics, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for arm in ("one", "two"):
        metrics.arm(arm).scored(rng.beta(1, 20, 50))
        for seconds in rng.exponential(0.01, 20):
            metrics.request_seconds("/predict", arm).observe(float(seconds))
            metrics.requests("/predict", "200", arm).inc()
            metrics.stages["infer"].observe(float(seconds))
    metrics.degraded("behaviours_unavailable").inc(seed)
    metrics.queue_candidates.inc(seed)


def test_every_worker_tells_the_totals_of_all(join: Join) -> None:
    alone = Metrics()
    for seed in (1, 2):
        work(alone, seed)

    first = join(0)
    work(first, 1)
    second = join(1)
    work(second, 2)

    empty = {name for name in told(alone) if "store_" in name}
    assert told(first) == told(second) == {name: n for name, n in told(alone).items() if name not in empty}
    assert told(first)["clickserve_queue_candidates []"] == 3


def test_who_takes_a_dead_workers_slot_counts_on_from_there(join: Join, tmp_path: Path) -> None:
    work(join(0), 1)
    work(join(1), 2)

    multiprocess.leave(place(tmp_path, 1))
    again = join(1)
    between = told(again)
    work(again, 3)

    assert between["clickserve_degraded_total [('reason', 'behaviours_unavailable')]"] == 3
    assert told(again)["clickserve_degraded_total [('reason', 'behaviours_unavailable')]"] == 6
    assert between["clickserve_queue_candidates []"] == 1  # the dead one's candidates wait no more


def test_more_series_than_a_file_first_holds_are_all_kept(join: Join) -> None:
    metrics = join(0)
    first = metrics.unknown_values("first")
    first.inc()
    for number in range(2000):
        metrics.unknown_values(f"field-{number}").inc(number)
    first.inc()

    values_told = told(join(1))

    assert values_told["clickserve_unknown_values_total [('field', 'first')]"] == 2
    for number in (0, 999, 1999):
        assert values_told[f"clickserve_unknown_values_total [('field', 'field-{number}')]"] == number


@pytest.mark.parametrize("shared", [False, True])
def test_a_swapped_model_shows_its_new_version_only_and_an_old_one_when_it_is_back(shared: bool, join: Join) -> None:
    metrics = join(0) if shared else Metrics()
    seen = []

    def swap(old: str, new: str) -> None:
        metrics.model_serves(arm="one", model="mian", version=new)
        metrics.model_stops(arm="one", model="mian", version=old)
        seen.append([name for name in told(metrics) if "model_info" in name])

    metrics.model_serves(arm="one", model="mian", version="1")
    swap("1", "2")
    swap("2", "1")

    named = "clickserve_model_info [('arm', 'one'), ('model', 'mian'), ('version', '{}')]"
    assert seen == [[named.format(2)], [named.format(1)]]


def test_a_version_shows_as_long_as_any_worker_serves_it(join: Join) -> None:
    first = join(0)
    first.model_serves(arm="one", model="mian", version="1")
    second = join(1)
    second.model_serves(arm="one", model="mian", version="1")
    second.model_serves(arm="one", model="mian", version="2")
    second.model_stops(arm="one", model="mian", version="1")

    assert sum("model_info" in name for name in told(second)) == 2
    first.model_stops(arm="one", model="mian", version="1")
    assert sum("model_info" in name for name in told(second)) == 1


def test_a_process_is_told_by_itself_and_no_more_when_it_has_left(join: Join, tmp_path: Path) -> None:
    metrics, _ = join(0), join(1)

    def workers() -> set[str]:
        text = metrics.exposition("")[0].decode()
        families = {f.name: f for f in text_string_to_metric_families(text)}
        return {sample.labels["worker"] for sample in families["process_resident_memory_bytes"].samples}

    both = workers()
    multiprocess.leave(place(tmp_path, 1))

    assert (both, workers()) == ({"0", "1"}, {"0"})
    assert (tmp_path / "metrics" / "0.pid").read_text() == str(os.getpid())
