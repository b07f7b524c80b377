"""Metrics of several workers as one: each counts in files of its own, and whichever is asked adds all of them up.

The files are prometheus_client's, and so is the adding up. Its own way to write them takes 1.7 times as long as
counting in memory, this one 1.08 times (`deploy/bench/counting.py`). A worker that takes a dead one's slot counts on in
its files: no total goes back, and no file is ever left over.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, values
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from service.worker import WorkerInfo

_FILE_BYTES = 1 << 16  # to begin with; the library doubles it when it is full


def join(place: WorkerInfo, *, hidden_at_zero: str) -> CollectorRegistry:
    """From now on every metric made in this process counts in its place's files. Returns what reads all workers'.

    Files keep every series they ever held; those of the gauge `hidden_at_zero` are shown while any worker sets them.
    """
    folder = _folder(place)
    folder.mkdir(exist_ok=True)
    values.ValueClass = value_class(folder, place.slot)
    _pid_file(folder, place.slot).write_text(str(os.getpid()))
    registry = CollectorRegistry()
    registry.register(_AllWorkers(folder, place.workers, hidden_at_zero=hidden_at_zero))
    return registry


def leave(place: WorkerInfo) -> None:
    """After a worker's death: its gauges no longer count, while its counters wait for who takes the slot."""
    folder = _folder(place)
    _pid_file(folder, place.slot).unlink(missing_ok=True)
    mark_process_dead(place.slot, str(folder))  # type: ignore[no-untyped-call] # the library does not annotate it


def value_class(folder: Path, slot: int) -> type:
    """What takes the place of prometheus_client's in-memory number: the same in memory, and one store into the file."""

    class SharedValue:
        files: ClassVar[dict[str, MmapedDict]] = {}  # open as long as the process

        def __init__(  # noqa: PLR0917 - the library's signature
            self,
            typ: str,
            metric_name: str,
            name: str,
            labelnames: Any,
            labelvalues: Any,
            help_text: str,
            multiprocess_mode: str = "",
            **_: Any,
        ) -> None:
            kind = f"{typ}_{multiprocess_mode}" if typ == "gauge" else typ
            if kind not in self.files:
                self.files[kind] = _opened(folder / f"{kind}_{slot}.db")
            file = self.files[kind]
            key = mmap_key(metric_name, name, labelnames, labelvalues, help_text)
            self._value: float = file.read_value(key)[0]  # type: ignore[no-untyped-call]
            # A file that grows is mapped anew; the view keeps the old mapping, which is of the same bytes.
            self._numbers = memoryview(file._m).cast("d")  # noqa: SLF001
            self._at = file._positions[key] // 8  # noqa: SLF001
            self._lock = Lock()

        def inc(self, amount: float) -> None:
            with self._lock:
                self._value += amount
                self._numbers[self._at] = self._value

        def set(self, value: float, timestamp: float | None = None) -> None:  # noqa: ARG002
            with self._lock:
                self._value = self._numbers[self._at] = value

        def get(self) -> float:
            return self._value

        def get_exemplar(self) -> None:
            return None

    return SharedValue


class _AllWorkers(Collector):
    """Counters and histograms summed, gauges by their mode; `process_*` for each worker by itself."""

    def __init__(self, folder: Path, workers: int, *, hidden_at_zero: str) -> None:
        self._folder = folder
        self._workers = workers
        self._hidden_at_zero = hidden_at_zero

    def describe(self) -> list[Metric]:
        return []  # the registry would read every file to know the names

    def collect(self) -> Iterator[Metric]:
        for metric in MultiProcessCollector(None, path=str(self._folder)).collect():  # type: ignore[no-untyped-call]
            if metric.name == self._hidden_at_zero:
                metric.samples = [sample for sample in metric.samples if sample.value]
            yield metric
        yield from self._processes()

    def _processes(self) -> Iterable[Metric]:
        """Memory or CPU of all workers together would hide the one that leaks, and go back when one is replaced."""
        families: dict[str, Metric] = {}
        for slot in range(self._workers):
            for metric in _process_metrics(_pid_file(self._folder, slot)):
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                for sample in metric.samples:
                    family.add_sample(sample.name, {"worker": str(slot)}, sample.value)
        return families.values()


def _process_metrics(pid_file: Path) -> list[Metric]:
    try:
        pid = int(pid_file.read_text())
    except (FileNotFoundError, ValueError):  # it is being replaced
        return []
    return list(ProcessCollector(registry=None, pid=lambda: pid).collect())


def _opened(path: Path) -> MmapedDict:
    if not path.exists():
        # Under its name once it can be read: the library's own first moment is an empty file, which it cannot read.
        begun = path.with_suffix(".new")
        begun.write_bytes(bytes(_FILE_BYTES))
        begun.rename(path)
    return MmapedDict(str(path))  # type: ignore[no-untyped-call]


def _folder(place: WorkerInfo) -> Path:
    assert place.folder is not None, "a process that serves alone has nobody to share with"
    return place.folder / "metrics"


def _pid_file(folder: Path, slot: int) -> Path:
    return folder / f"{slot}.pid"
