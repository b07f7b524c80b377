"""Static shapes: requests padded to a few fixed sizes, for a device that is fast where shapes and addresses stay."""

# U requests, C candidates

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.features.arrays import Arrays
from models.features.field import Input
from models.features.packing import num_requests
from service.runtime.backend import BackendError

USERS = (1, 4, 16)
CANDIDATES = (16, 32, 64, 128, 256, 512, 1024)
ALIGNMENT = 256  # bytes: what a device's own allocator gives, and its wide loads want
WARM_UPS = 3  # runs of a size when it is made: the first allocates, the second captures or compiles, the third replays


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one input lies in a buffer."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes


class Layout:
    """All inputs of U requests and C candidates in one buffer, so that one copy sends them."""

    def __init__(self, inputs: Sequence[Input], users: int, candidates: int) -> None:
        self.users, self.candidates = users, candidates
        slots, offset = [], 0
        for spec in inputs:
            shape, dtype = spec.shape(users=users, candidates=candidates), np.dtype(spec.dtype)
            slots.append(Slot(spec.name, dtype, shape, offset))
            offset += math.ceil(math.prod(shape) * dtype.itemsize / ALIGNMENT) * ALIGNMENT
        self.slots, self.num_bytes = tuple(slots), max(offset, 1)

    def views(self, buffer: NDArray[np.uint8]) -> Arrays:
        """The buffer as the inputs' arrays."""
        return {s.name: np.ndarray(s.shape, s.dtype, buffer=buffer, offset=s.offset) for s in self.slots}


class Bucket(Protocol):
    """One size of a graph, bound to its buffers; `run` sends `host` to the device and gives the logits [C]."""

    host: NDArray[np.uint8]

    def run(self) -> NDArray[np.float32]: ...


class CaptureLock:
    """Shared-exclusive lock: runs share it, the capture of a CUDA graph waits for them and has it alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._alone = False

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._alone = True  # from now on none begins
            self._changed.wait_for(lambda: not self._running)
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


# While a CUDA graph is captured, CUDA refuses other threads of the process what a run needs: copies and memory. A model
# that is loaded beside one that serves would fail its requests; so they wait, for the few milliseconds of one size.
CAPTURE_LOCK = CaptureLock()


class Buckets:
    """A graph at every size, each made and run here, so that no request waits for a size's first run.

    A request is padded up to the next size: with copies of its first candidate and its first user, which are of known
    ids and cost nothing more, and whose logits are cut off. What is larger than the largest size runs in parts.
    """

    def __init__(self, inputs: Sequence[Input], bind: Callable[[Layout], Bucket]) -> None:
        self._inputs = tuple(inputs)
        self._bound: dict[tuple[int, int], tuple[Bucket, Arrays]] = {}
        for size in product(USERS, CANDIDATES):
            layout = Layout(self._inputs, *size)
            with CAPTURE_LOCK.alone():
                bucket = bind(layout)
                for _ in range(WARM_UPS):
                    bucket.run()
            self._bound[size] = bucket, layout.views(bucket.host)

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        """The logits [C] of any number of requests and candidates. Raises BackendError; one call at a time."""
        logits = np.empty(len(arrays["user_index"]), dtype=np.float32)
        for rows, part in parts(arrays, self._inputs, users=USERS[-1], candidates=CANDIDATES[-1]):
            logits[rows] = self._run(part)
        return logits

    def _run(self, arrays: Arrays) -> NDArray[np.float32]:
        num_candidates = len(arrays["user_index"])
        size = _next(USERS, num_requests(arrays)), _next(CANDIDATES, num_candidates)
        bucket, views = self._bound[size]
        for tensor in self._inputs:
            view, values = views[tensor.name], arrays[tensor.name]
            if values.dtype != view.dtype or values.shape[1:] != view.shape[1:] or not 0 < len(values) <= len(view):
                raise BackendError(f"{tensor.name} is {values.dtype} {values.shape}, which does not fit {view.shape}")
            view[: len(values)] = values
            view[len(values) :] = values[0]
        with CAPTURE_LOCK.together():
            return bucket.run()[:num_candidates]


def parts(
    arrays: Arrays, inputs: Sequence[Input], *, users: int, candidates: int
) -> Iterator[tuple[NDArray[np.intp] | slice, Arrays]]:
    """The same requests in pieces of at most that many users and candidates, each with its rows of the whole."""
    user_index, num = arrays["user_index"], num_requests(arrays)
    if num <= users and 0 < len(user_index) <= candidates:
        yield slice(None), arrays
        return
    for first in range(0, num, users):
        rows = np.flatnonzero((user_index >= first) & (user_index < first + users))
        theirs = {i.name: arrays[i.name][first : first + users] for i in inputs if i.dims[0] == "U"}
        for start in range(0, len(rows), candidates):
            some = rows[start : start + candidates]
            items = {i.name: arrays[i.name][some] for i in inputs if i.dims[0] == "C"}
            yield some, {**theirs, **items, "user_index": user_index[some] - first}


def _next(sizes: Sequence[int], least: int) -> int:
    return next(size for size in sizes if size >= least)
