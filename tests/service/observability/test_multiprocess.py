"""Metrics of several workers, compared with one that counts for all of them; and workers that are killed."""

import asyncio
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from service.observability import multiprocess
from service.observability.instruments import Families
from service.observability.metrics import Metrics
from service.observability.multiprocess import Numbers, Series, merged
from service.worker import WorkerInfo

DEGRADED = "clickserve_degraded_total [('reason', 'behaviours_unavailable')]"
WORKERS = 2


def place(folder: Path, slot: int) -> WorkerInfo:
    return WorkerInfo(slot=slot, workers=WORKERS, folder=folder)


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample of the service, by its name and labels."""
    text = metrics.exposition("")[0].decode()
    return {
        f"{sample.name} {sorted(sample.labels.items())}": round(sample.value, 9)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("clickserve_")
    }


def count(metrics: Metrics, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for arm in ("one", "two"):
        metrics.arm(arm).scored(rng.beta(1, 20, 50))
        for seconds in rng.exponential(0.01, 20):
            metrics.request_seconds("/predict", arm).observe(float(seconds))
            metrics.requests("/predict", "200", arm).inc()
            metrics.stages["infer"].observe(float(seconds))
    metrics.degraded("behaviours_unavailable").inc(seed)
    metrics.queue_candidates.inc(seed)


def test_every_worker_shows_the_totals_of_all(tmp_path: Path) -> None:
    alone = Metrics()
    for seed in (1, 2):
        count(alone, seed)

    first, second = (Metrics(place(tmp_path, slot)) for slot in range(WORKERS))
    count(first, 1)
    count(second, 2)
    samples(first)  # whose numbers are in its file from here on

    assert samples(second) == samples(first) == samples(alone)
    assert samples(first)["clickserve_queue_candidates []"] == 3


def test_a_dead_workers_totals_are_counted_once_before_and_after_its_slot_is_taken(tmp_path: Path) -> None:
    first, second = (Metrics(place(tmp_path, slot)) for slot in range(WORKERS))
    count(first, 1)
    count(second, 2)
    seen = [samples(second)[DEGRADED]]

    multiprocess.leave(place(tmp_path, 1))
    seen.append(samples(first)[DEGRADED])
    assert samples(first)["clickserve_queue_candidates []"] == 1  # the dead one's candidates wait no more
    again = Metrics(place(tmp_path, 1))
    seen += [samples(first)[DEGRADED], samples(again)[DEGRADED]]
    count(again, 3)
    seen += [samples(again)[DEGRADED], samples(first)[DEGRADED]]

    # Before the second was scraped, nobody had seen what the first one counted.
    assert seen == [2, 3, 3, 3, 6, 6]


def test_a_file_that_is_no_snapshot_is_named(tmp_path: Path) -> None:
    first, _ = (Metrics(place(tmp_path, slot)) for slot in range(WORKERS))
    file = tmp_path / "metrics" / "1.numbers"
    file.write_bytes(file.read_bytes()[:-3])

    with pytest.raises(ValueError, match=f"{file}: expected the metrics of a worker, got"):
        first.exposition("")


def test_a_disk_that_is_full_is_logged_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics(place(tmp_path, 0))
    metrics.degraded("behaviours_unavailable").inc()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        shown = [samples(metrics)[DEGRADED] for _ in range(3)]

    assert shown == [1, 1, 1]
    assert [record.message for record in caplog.records] == ["metrics not written"]
    assert samples(Metrics(place(tmp_path, 1)))[DEGRADED] == 0
    samples(metrics)  # written again
    assert samples(Metrics(place(tmp_path, 1)))[DEGRADED] == 1


@pytest.mark.parametrize("shared", [False, True])
def test_a_swapped_model_shows_its_new_version_only_and_an_old_one_when_it_is_back(
    shared: bool, tmp_path: Path
) -> None:
    metrics = Metrics(place(tmp_path, 0) if shared else None)
    seen = []

    def swap(old: str, new: str) -> None:
        metrics.model_serves(arm="one", model="mian", version=new)
        metrics.model_stops(arm="one", model="mian", version=old)
        seen.append([name for name in samples(metrics) if "model_info" in name])

    metrics.model_serves(arm="one", model="mian", version="1")
    swap("1", "2")
    swap("2", "1")

    series = "clickserve_model_info [('arm', 'one'), ('model', 'mian'), ('version', '{}')]"
    assert seen == [[series.format(2)], [series.format(1)]]


def test_a_version_shows_as_long_as_any_worker_serves_it(tmp_path: Path) -> None:
    first, second = (Metrics(place(tmp_path, slot)) for slot in range(WORKERS))
    first.model_serves(arm="one", model="mian", version="1")
    second.model_serves(arm="one", model="mian", version="2")
    samples(first)

    assert sum("model_info" in name for name in samples(second)) == 2
    first.model_stops(arm="one", model="mian", version="1")
    samples(first)
    assert sum("model_info" in name for name in samples(second)) == 1


def test_the_control_version_is_that_of_the_worker_furthest_behind(tmp_path: Path) -> None:
    first, second = (Metrics(place(tmp_path, slot)) for slot in range(WORKERS))
    first.control_version.set(7)
    second.control_version.set(8)
    samples(first)

    assert samples(second)["clickserve_control_version []"] == 7
    multiprocess.leave(place(tmp_path, 0))
    assert samples(second)["clickserve_control_version []"] == 8


def test_a_process_is_shown_by_itself_and_no_more_when_it_has_left(tmp_path: Path) -> None:
    metrics, _ = Metrics(place(tmp_path, 0)), Metrics(place(tmp_path, 1))

    def workers() -> set[str]:
        text = metrics.exposition("")[0].decode()
        families = {f.name: f for f in text_string_to_metric_families(text)}
        return {sample.labels["worker"] for sample in families["process_resident_memory_bytes"].samples}

    both = workers()
    multiprocess.leave(place(tmp_path, 1))

    assert (both, workers()) == ({"0", "1"}, {"0"})
    assert multiprocess.worker_pid(tmp_path / "metrics", 0) == os.getpid()


async def test_numbers_are_written_by_themselves_while_it_is_open_and_once_more_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocess, "WRITE_EVERY_S", 0.001)
    metrics = Metrics(place(tmp_path, 0))

    def on_file() -> float:
        snapshot = multiprocess.read(tmp_path / "metrics", 0)
        assert snapshot is not None
        return snapshot.numbers["clickserve_degraded"]["behaviours_unavailable",][0]

    with metrics.shared():
        metrics.degraded("behaviours_unavailable").inc()
        async with asyncio.timeout(10):
            while on_file() < 1:  # noqa: ASYNC110 - what writes the file is under test, and has no event
                await asyncio.sleep(0)  # the timer's turn
        metrics.degraded("behaviours_unavailable").inc()

    assert on_file() == 2


def families() -> Families:
    made = Families()
    made.counter("clicks", "", "arm")
    made.gauge("waiting", "", combine="sum")
    made.gauge("version", "", combine="min")
    made.gauge("largest", "", combine="max")
    made.histogram("seconds", "", "op", edges=[1, 2])
    return made


FAMILIES = families()
amounts = st.floats(0, 1e9)


def series(*labels: str, size: int = 1) -> st.SearchStrategy[Series]:
    """Numbers of some of these label values; "" stands for a family without labels."""
    values = st.sampled_from([(label,) if label else () for label in labels])
    return st.dictionaries(values, st.lists(amounts, min_size=size, max_size=size))


snapshots = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "clicks": series("one", "two"),
            "waiting": series(""),
            "version": series(""),
            "largest": series(""),
            "seconds": series("fetch", "append", size=4),
        },
    ),
    max_size=5,
)


@given(snapshots=snapshots, data=st.data())
def test_snapshots_are_merged_alike_in_any_order(snapshots: Sequence[Numbers], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(snapshots))

    assert merged(shuffled, FAMILIES) == merged(snapshots, FAMILIES)


@given(snapshots=snapshots)
def test_merged_totals_are_the_sum_of_each_series(snapshots: Sequence[Numbers]) -> None:
    together = merged(snapshots, FAMILIES)

    for name in ("clicks", "seconds", "waiting"):
        for values in {values for snapshot in snapshots for values in snapshot.get(name, {})}:
            rows = [snapshot[name][values] for snapshot in snapshots if values in snapshot.get(name, {})]
            assert together[name][values] == pytest.approx(np.sum(rows, axis=0).tolist())


COUNTING_WORKER = textwrap.dedent("""
    import asyncio, sys
    from pathlib import Path
    from service.observability import multiprocess
    from service.observability.metrics import Metrics
    from service.worker import WorkerInfo

    async def main():
        multiprocess.WRITE_EVERY_S = 3600.0 if sys.argv[3] == "never" else 0.001
        metrics = Metrics(WorkerInfo(slot=int(sys.argv[2]), workers=2, folder=Path(sys.argv[1])))
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        with metrics.shared():
            while line := await reader.readline():
                match line.split():
                    case [b"count", times]:
                        for _ in range(int(times)):
                            metrics.degraded("behaviours_unavailable").inc()
                            metrics.stages["infer"].observe(0.001)
                        print("counted", flush=True)
                    case [b"scrape"]:
                        lines = metrics.exposition("")[0].decode().splitlines()
                        wanted = ('clickserve_degraded_total{reason="behaviours_unavailable"} ',
                                  'clickserve_stage_seconds_count{stage="infer"} ')
                        values = [line.split()[-1] for start in wanted for line in lines if line.startswith(start)]
                        print(*values, flush=True)

    asyncio.run(main())
""")


class Worker:
    """A process that counts, and answers scrapes, when it is asked to."""

    def __init__(self, folder: Path, slot: int, write: str) -> None:
        self._place = place(folder, slot)
        command = [sys.executable, "-c", COUNTING_WORKER, str(folder), str(slot), write]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def count(self, times: int) -> None:
        assert self._ask(f"count {times}") == "counted"

    def scrape(self) -> float:
        counter, observations = self._ask("scrape").split()
        assert counter == observations
        return float(counter)

    def kill(self) -> None:
        """As by the kernel; then what the supervisor does."""
        self._process.kill()
        self._end()
        multiprocess.leave(self._place)

    def stop(self) -> None:
        self._end()
        assert self._process.returncode == 0

    def _end(self) -> None:
        self._process.communicate()

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


@contextmanager
def ended(*workers: Worker) -> Iterator[None]:
    try:
        yield
    finally:
        for worker in workers:
            worker._process.kill()
            worker._process.communicate()


def test_no_total_goes_back_when_a_worker_is_killed_and_replaced(tmp_path: Path) -> None:
    first, second = (Worker(tmp_path, slot, "never") for slot in range(WORKERS))
    with ended(first, second):
        seen = [first.scrape(), second.scrape()]
        first.count(10)
        seen += [first.scrape(), second.scrape()]
        second.count(100)
        seen += [second.scrape(), first.scrape()]  # seen by the scraped one itself, and therefore on file
        second.count(1000)  # not seen by anybody, not written: lost with it
        second.kill()
        seen.append(first.scrape())
        third = Worker(tmp_path, 1, "never")
        with ended(third):
            seen += [third.scrape(), first.scrape()]
            third.count(10_000)
            seen += [third.scrape(), first.scrape()]
            third.stop()
        first.stop()

    assert seen == [0, 0, 10, 10, 110, 110, 110, 110, 110, 10_110, 10_110]


def test_what_a_killed_worker_wrote_in_time_is_kept_to_the_last_count(tmp_path: Path) -> None:
    first, second = (Worker(tmp_path, slot, "often") for slot in range(WORKERS))
    with ended(first, second):
        first.scrape()  # both have started
        second.count(100)
        seen = [first.scrape()]
        deadline = time.monotonic() + 30
        while seen[-1] < 100:  # its next snapshot is a thousandth of a second away
            assert time.monotonic() < deadline, "the second worker wrote nothing within thirty seconds"
            seen.append(first.scrape())
        second.kill()
        third = Worker(tmp_path, 1, "often")
        with ended(third):
            third.count(1)
            seen.append(third.scrape())
            seen.append(first.scrape())
            third.stop()
        first.stop()

    assert seen == sorted(seen)
    assert seen[-2:] == [101, 101]
