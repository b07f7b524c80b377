"""What the engine's tests run instead of a model: its scores are known, its time is the test's."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np

from models.features.arrays import Arrays, concat
from service.deadline import Deadline
from service.observability.metrics import Metrics
from service.runtime.backend import BackendError
from service.runtime.batcher import Batcher, Runner
from service.runtime.latency_model import Cost


class Fake:
    """A candidate's score is its user's number plus its own; NaN for the item -1, and -2 cannot be run at all."""

    lanes = 1
    batch_wait_s = 0.0

    def __init__(self) -> None:
        self.runs: list[list[float]] = []  # the items of each
        self.hold = False  # until `go_on`
        self.entered, self.go_on = threading.Semaphore(0), threading.Semaphore(0)

    def run(self, arrays: Arrays) -> np.ndarray:
        self.runs.append(arrays["item.number"].tolist())
        self.entered.release()
        if self.hold:
            assert self.go_on.acquire(timeout=10)
        if -2 in arrays["item.number"]:
            raise BackendError("poison")
        scores = arrays["user.number"][arrays["user_index"]] + arrays["item.number"]
        return np.where(arrays["item.number"] == -1, np.nan, scores).astype(np.float32)

    def close(self) -> None: ...


def request(*items: float, user: float = 0.0) -> Arrays:
    return {
        "user.number": np.array([user]),
        "item.number": np.array(items, dtype=np.float64),
        "user_index": np.zeros(len(items), dtype=np.int64),
    }


def several(*requests: Arrays) -> Arrays:
    return concat(requests)


def in_time(seconds: float = 30.0) -> Deadline:
    return Deadline.after(seconds * 1000, since=time.monotonic())


def joining(piece: int = 1000) -> Cost:
    """Of a model of 1 ms a run and 1 us a candidate, where joining costs nothing."""
    return Cost(a=1e-3, b=1e-6, u=0.0, d=0.0, piece=piece)


def apart(piece: int = 1000) -> Cost:
    """The same, where joining never pays."""
    return Cost(a=1e-3, b=1e-6, u=2e-3, d=0.0, piece=piece)


class Clock:
    """A clock that only its owner moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(Fake):
    """Each run takes what `seconds(candidates, users)` says, on its clock."""

    def __init__(self, clock: Clock, seconds: Callable[[int, int], float]) -> None:
        super().__init__()
        self._clock, self._seconds = clock, seconds

    def run(self, arrays: Arrays) -> np.ndarray:
        self._clock.now += self._seconds(len(arrays["user_index"]), len(arrays["user.number"]))
        return super().run(arrays)


async def entered(backend: Fake) -> None:
    """Returns when the backend has begun one more run."""
    assert await asyncio.to_thread(backend.entered.acquire, timeout=10)


async def waiting(runner: Runner, candidates: int) -> None:
    """Returns when so many candidates are in the line."""
    async with asyncio.timeout(10):
        while runner.waiting != candidates:  # noqa: ASYNC110 - the line has no event for it
            await asyncio.sleep(0)


async def held_up(backend: Fake, batcher: Batcher) -> "asyncio.Task[Any]":
    """A request whose run is under way until the test lets it go: behind it the others wait together."""
    backend.hold = True
    first = asyncio.create_task(batcher.submit(request(0), in_time()))
    await entered(backend)
    backend.hold = False
    return first


def with_runner(scenario: Callable[[Runner], Coroutine[Any, Any, None]], *, threads: int = 1) -> None:
    """For laws: an event loop and a runner for each example."""

    async def run() -> None:
        runner = Runner(Metrics(), max_queued_candidates=10**6, threads=threads)
        try:
            await scenario(runner)
        finally:
            await runner.aclose()

    asyncio.run(run())
