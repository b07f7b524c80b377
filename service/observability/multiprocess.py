"""Metrics of several workers as one: each keeps its numbers in a file, and the one that is scraped adds them up.

A worker writes a snapshot of its numbers to a file of its slot: every second, at every scrape that it answers, and
when it ends. What takes a dead worker's slot starts with the totals of that file, so that nobody has to fold them.

- A total never goes back. What a scrape shows of the scraped worker is in its file before the answer is sent, and a
  file only ever grows; the other workers' share is read from theirs, at most a second old.
- A worker that is killed loses what it counted since its last snapshot: at most a second's worth.
- A file is replaced, never written into: nobody reads half of one.
- A gauge counts while its worker lives, which its pid file says: `join` writes it, `leave` removes it.
"""

import asyncio
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from prometheus_client import Metric, ProcessCollector
from prometheus_client.registry import Collector

from service.observability.instruments import AnyFamily, Combine, Labels
from service.worker import WorkerInfo

log = logging.getLogger(__name__)

WRITE_EVERY_S = 1.0

COMBINE: dict[Combine, Callable[[Iterable[float]], float]] = {"sum": math.fsum, "max": max, "min": min}

Series = dict[Labels, list[float]]
Numbers = dict[str, Series]  # by the family's name


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of one worker at one moment. Its totals (counters, histograms) began with those of the slot."""

    pid: int
    numbers: Numbers


class WorkerFiles:
    """The file of this worker, and those of the others in the folder that they share."""

    def __init__(self, place: WorkerInfo, families: Sequence[AnyFamily]) -> None:
        self._folder = folder_of(place)
        self._slot = place.slot
        self._workers = place.workers
        self._families = families
        self._write_failed = False

    def join(self) -> None:
        """Take over the totals of who had the slot before, and count among the living."""
        self._folder.mkdir(exist_ok=True)
        before = read(self._folder, self._slot)
        if before is not None:
            for family in self._families:
                if family.kind != "gauge":
                    family.restore(before.numbers.get(family.name, {}))
        _replace(_file(self._folder, self._slot), msgspec.msgpack.encode(self._snapshot()))
        _replace(_pid_file(self._folder, self._slot), str(os.getpid()).encode())

    @contextmanager
    def kept_up_to_date(self) -> Iterator[None]:
        """Write every second, on the running event loop, and at the end."""
        self._timer = asyncio.get_running_loop().call_later(WRITE_EVERY_S, self._write_and_again)
        try:
            yield
        finally:
            self._timer.cancel()
            self.write()

    def write(self) -> Snapshot:
        """The numbers of this moment, as they now stand in the file. One that cannot be written is logged once."""
        snapshot = self._snapshot()
        try:
            _replace(_file(self._folder, self._slot), msgspec.msgpack.encode(snapshot))
            self._write_failed = False
        except OSError as err:  # a full disk must not stop the answers
            if not self._write_failed:
                log.error("metrics not written", extra={"folder": self._folder, "error": str(err)})  # noqa: TRY400
            self._write_failed = True
        return snapshot

    def numbers_of_all(self) -> Numbers:
        """Totals of all workers, dead ones included, and gauges of the living, by each family's rule."""
        snapshots = [self.write().numbers]
        for slot in range(self._workers):
            if slot == self._slot or (snapshot := read(self._folder, slot)) is None:
                continue
            is_alive = worker_pid(self._folder, slot) == snapshot.pid
            kinds = ("counter", "gauge", "histogram") if is_alive else ("counter", "histogram")
            snapshots.append({f.name: snapshot.numbers.get(f.name, {}) for f in self._families if f.kind in kinds})
        return merged(snapshots, self._families)

    def _write_and_again(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(WRITE_EVERY_S, self._write_and_again)
        self.write()

    def _snapshot(self) -> Snapshot:
        return Snapshot(pid=os.getpid(), numbers={family.name: family.snapshot() for family in self._families})


class WorkerProcesses(Collector):
    """`process_*` for each living worker by itself, under the label `worker`.

    Memory or CPU of all workers together would hide the one that leaks, and go back when one is replaced.
    """

    def __init__(self, place: WorkerInfo) -> None:
        self._folder = folder_of(place)
        self._workers = place.workers

    def describe(self) -> list[Metric]:
        return []  # the registry would read every process to know the names

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for slot in range(self._workers):
            pid = worker_pid(self._folder, slot)
            for metric in _process_metrics(pid) if pid else ():
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    family.add_sample(sample.name, {"worker": str(slot)}, sample.value)
        return families.values()


def leave(place: WorkerInfo) -> None:
    """After a worker's death: its gauges no longer count, while its totals wait for who takes the slot."""
    _pid_file(folder_of(place), place.slot).unlink(missing_ok=True)


def read(folder: Path, slot: int) -> Snapshot | None:
    """The newest snapshot of a slot, None where no worker has started in it yet. Raises ValueError for a bad file."""
    file = _file(folder, slot)
    try:
        return msgspec.msgpack.decode(file.read_bytes(), type=Snapshot)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as err:
        raise ValueError(f"{file}: expected the metrics of a worker, got {err}") from err


def worker_pid(folder: Path, slot: int) -> int:
    """0 where no worker lives in that slot."""
    try:
        return int(_pid_file(folder, slot).read_text())
    except FileNotFoundError:
        return 0


def merged(snapshots: Sequence[Numbers], families: Iterable[AnyFamily]) -> Numbers:
    """One set of numbers out of several: each series combined by its family's rule, in whatever order they come."""
    together: Numbers = {}
    for family in families:
        combine = COMBINE[family.combine]
        rows: dict[Labels, list[list[float]]] = {}
        for numbers in snapshots:
            for values, row in numbers.get(family.name, {}).items():
                rows.setdefault(values, []).append(row)
        together[family.name] = {
            values: [combine(column) for column in zip(*of_each, strict=True)] for values, of_each in rows.items()
        }
    return together


def folder_of(place: WorkerInfo) -> Path:
    assert place.folder is not None, "a process that serves alone has nobody to share with"
    return place.folder / "metrics"


def _process_metrics(pid: int) -> list[Metric]:
    return list(ProcessCollector(registry=None, pid=lambda: pid).collect())


def _file(folder: Path, slot: int) -> Path:
    return folder / f"{slot}.numbers"


def _pid_file(folder: Path, slot: int) -> Path:
    return folder / f"{slot}.pid"


def _replace(file: Path, content: bytes) -> None:
    draft = file.with_name(f"{file.name}.draft")
    draft.write_bytes(content)
    draft.replace(file)
