"""Counter, gauge and histogram as plain numbers in memory, and the family that has one for each set of label values.

They know no text format and no other process: `exposition.py` and `multiprocess.py` read them as lists of numbers.

There is no lock around an update. CPython, with its global lock, switches threads only at calls and jumps, of which
there is none between reading a number and writing it back; a test counts from several threads and loses nothing.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

OTHER = "other"  # the label value that stands for all a family does not know

MAX_SERIES = 2000  # of one family; whatever comes after is counted as OTHER
MAX_PENDING = 16  # arrays of a histogram that wait to be sorted into its buckets together

Labels = tuple[str, ...]
Kind = Literal["counter", "gauge", "histogram"]
Combine = Literal["sum", "max", "min"]  # what the workers' values of a series become


class Counter:
    """A number that only grows."""

    __slots__ = ("value",)
    kind: Kind = "counter"

    def __init__(self) -> None:
        self.value: float = 0

    def inc(self, amount: float = 1) -> None:
        self.value += amount

    def numbers(self) -> list[float]:
        return [self.value]

    def add(self, numbers: Sequence[float]) -> None:
        self.value += numbers[0]


class Gauge:
    """A number that goes up and down."""

    __slots__ = ("value",)
    kind: Kind = "gauge"

    def __init__(self) -> None:
        self.value: float = 0

    def set(self, value: float) -> None:
        self.value = value

    def inc(self, amount: float = 1) -> None:
        self.value += amount

    def dec(self, amount: float = 1) -> None:
        self.value -= amount

    def numbers(self) -> list[float]:
        return [self.value]

    def add(self, numbers: Sequence[float]) -> None:
        self.value += numbers[0]


class Histogram:
    """How many values fell up to each of `edges` and above the one before it, how many above the last, and their sum.

    Values are finite: there is no bucket for NaN.
    """

    __slots__ = ("_pending", "_sum", "counts", "edges")
    kind: Kind = "histogram"

    def __init__(self, edges: Sequence[float]) -> None:
        if not edges or not all(low < high for low, high in pairwise(edges)):
            raise ValueError(f"the edges of a histogram ascend, got {list(edges)}")
        self.edges = list(edges)
        self.counts = [0] * (len(edges) + 1)
        self._sum: float = 0.0
        self._pending: list[NDArray[np.floating]] = []

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.edges, value)] += 1
        self._sum += value

    def observe_n(self, value: float, times: int) -> None:
        """The same value so many times."""
        self.counts[bisect_left(self.edges, value)] += times
        self._sum += value * times

    def observe_many(self, values: NDArray[np.floating]) -> None:
        """Every value of an array, which must not change afterwards: it is counted with the next ones, or when read.

        Sorting a hundred values into buckets costs numpy as much for the calls as for the values.
        """
        self._pending.append(values)
        if len(self._pending) >= MAX_PENDING:
            self._count_pending()

    @property
    def sum(self) -> float:
        self._count_pending()
        return self._sum

    @property
    def count(self) -> int:
        self._count_pending()
        return sum(self.counts)

    def numbers(self) -> list[float]:
        """The sum, then the number of values in each bucket."""
        self._count_pending()
        return [self._sum, *self.counts]

    def add(self, numbers: Sequence[float]) -> None:
        total, *counts = numbers
        self._sum += total
        for bucket, count in enumerate(counts):
            self.counts[bucket] += int(count)

    def _count_pending(self) -> None:
        if not self._pending:
            return
        arrays, self._pending = self._pending, []
        values = np.concatenate(arrays, axis=None)
        counts = np.bincount(np.searchsorted(self.edges, values), minlength=len(self.counts)).tolist()
        for bucket, count in enumerate(counts):
            if count:
                self.counts[bucket] += count
        total = float(values.sum())  # not in the next line: threads could switch between its reading and writing
        self._sum += total


Instrument = TypeVar("Instrument", Counter, Gauge, Histogram)


class Family(Generic[Instrument]):
    """All series of one metric: one instrument for each combination of label values.

    `known` bounds labels whose values come from outside: any other value of theirs is counted as OTHER. `combine` is
    what becomes of several workers' values; those of counters and histograms are summed.
    """

    def __init__(
        self,
        name: str,
        help_text: str,
        make: Callable[[], Instrument],
        labels: Labels = (),
        *,
        combine: Combine = "sum",
    ) -> None:
        self.name = name
        self.help_text = help_text
        self.label_names = labels
        self.combine = combine
        self.children: dict[Labels, Instrument] = {}
        self.known: dict[str, frozenset[str]] = {}
        self._make: Callable[[], Instrument] = make
        template: Instrument = make()
        self.kind: Kind = template.kind
        self.edges: list[float] = template.edges if isinstance(template, Histogram) else []
        if combine != "sum" and self.kind != "gauge":
            raise ValueError(f"{name}: a {self.kind} of several workers is their sum, got {combine}")

    def bound(self, label: str, values: Iterable[str]) -> None:
        """From now on any other value of this label is counted as OTHER."""
        if label not in self.label_names:
            raise ValueError(f"{self.name}: expected a label of {self.label_names}, got {label}")
        self.known[label] = frozenset(values) | {OTHER}

    def labels(self, *values: str) -> Instrument:
        """The instrument of these label values, the same one at every call."""
        child = self.children.get(values)
        return self._child(values) if child is None else child

    def remove(self, *values: str) -> None:
        """The series ends. Only for gauges: a total that came back would start from zero."""
        self.children.pop(values, None)

    def snapshot(self) -> dict[Labels, list[float]]:
        """The numbers of every series at this moment."""
        return {values: child.numbers() for values, child in list(self.children.items())}

    def restore(self, snapshot: Mapping[Labels, Sequence[float]]) -> None:
        """Add the numbers of a snapshot to the series. Raises ValueError for one of other labels or buckets."""
        size = len(self._make().numbers())
        for values, numbers in snapshot.items():
            if len(values) != len(self.label_names) or len(numbers) != size:
                expected = f"{len(self.label_names)} labels and {size} numbers"
                raise ValueError(f"{self.name}: expected {expected}, got {values} with {len(numbers)} numbers")
            self.labels(*values).add(numbers)

    def _child(self, values: Labels) -> Instrument:
        if len(values) != len(self.label_names):
            raise ValueError(f"{self.name}: expected a value for each of {self.label_names}, got {values}")
        values = tuple(
            str(value) if value in self.known.get(label, (value,)) else OTHER  # of an enum only its value
            for label, value in zip(self.label_names, values, strict=True)
        )
        if values not in self.children and len(self.children) >= MAX_SERIES:
            values = (OTHER,) * len(values)
        return self.children.setdefault(values, self._make())


AnyFamily = Family[Counter] | Family[Gauge] | Family[Histogram]


class Families(list[AnyFamily]):
    """The metrics of a process, in the order they were made."""

    def counter(self, name: str, help_text: str, *labels: str) -> Family[Counter]:
        self.append(family := Family(name, help_text, Counter, labels))
        return family

    def gauge(self, name: str, help_text: str, *labels: str, combine: Combine) -> Family[Gauge]:
        self.append(family := Family(name, help_text, Gauge, labels, combine=combine))
        return family

    def histogram(self, name: str, help_text: str, *labels: str, edges: Sequence[float]) -> Family[Histogram]:
        self.append(family := Family(name, help_text, partial(Histogram, edges), labels))
        return family
