"""Scheduler of the model threads: runs that are too long for the event loop, and all runs on a GPU, in order."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from models.features.arrays import Arrays
from models.features.packing import join, slice_candidates
from service.errors import DeadlinePassed, ModelFailed, NotOpen, Overloaded, Refusal, ShadowDropped, WouldBeLate
from service.runtime.backend import Backend, BackendError, Logits
from service.runtime.latency_model import LatencyModel

log = logging.getLogger(__name__)

SHADOW_SHARE = 0.25  # of the queue's limit: where more waits, no shadow run is let in
OVERDUE, OVERDUE_S = 10.0, 0.05  # a run is overdue after so many times its expected duration, and so much more
STOP_S = 10.0  # for the runs under way; a model that hangs is left to the end of the process

RunOutcome = Logits | Refusal
OnRun = Callable[[RunOutcome, "Run"], None]


@dataclass(kw_only=True, eq=False)
class ServedModel:
    """One model's graph as requests use it: its latency, and who uses it, so that it is closed after the last."""

    backend: Backend
    latency: LatencyModel
    leases: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def acquire(self) -> None:
        """`drain` waits for all who have acquired it: who has chosen a model may be some time before it runs."""
        self.leases += 1

    def release(self) -> None:
        self.leases -= 1
        if not self.leases:
            self._idle.set()

    @contextmanager
    def lease(self) -> Iterator[None]:
        self.acquire()
        try:
            yield
        finally:
            self.release()

    async def drain(self) -> None:
        """Returns when nobody uses it: its backend can be closed then."""
        while self.leases:
            self._idle.clear()
            await self._idle.wait()


@dataclass(kw_only=True, eq=False, slots=True)
class Run:
    """One request's run. All times are on the monotonic clock. `on_run` is called once, from the event loop."""

    model: ServedModel
    arrays: Arrays
    num_candidates: int
    expires_at: float
    timeout_ms: float
    is_shadow: bool
    on_run: OnRun
    queued_at: float = 0.0
    started_at: float = 0.0
    seconds: float = 0.0  # of the model: of a joined run its share by candidates
    is_done: bool = False
    timer: asyncio.TimerHandle | None = None
    loop: asyncio.AbstractEventLoop | None = None

    def resolve(self, outcome: RunOutcome) -> None:
        if not self.is_done:  # else it was late, or nobody waits for it any more
            self.is_done = True
            if self.timer is not None:
                self.timer.cancel()
            self.on_run(outcome, self)


class Scheduler:
    """First come, first served over all models, shadow runs last; a run larger than `max_candidates` is cut.

    Models that join (on a GPU) take what waits for them in one run. One thread on a CPU: on one core each run is
    fastest alone; a GPU wants two.
    """

    def __init__(self, *, max_queued_candidates: int, max_candidates: int, threads: int = 1) -> None:
        self._limit = max_queued_candidates
        self._max_candidates = max_candidates
        self._live: deque[Run] = deque()
        self._shadow: deque[Run] = deque()
        self._under_way: dict[int, tuple[float, float]] = {}  # by thread: when it began, how long it should take
        self._changed = threading.Condition()
        self._closed = False
        self.num_queued = 0  # candidates
        self._threads = [
            threading.Thread(target=self._serve, args=(n,), name=f"model-{n}", daemon=True) for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def takes_shadow(self) -> bool:
        """Whether shadow work has a chance now; who asks first saves what comes before the model."""
        return self.num_queued <= SHADOW_SHARE * self._limit

    @property
    def is_busy(self) -> bool:
        return bool(self._live or self._under_way)

    @property
    def is_overdue(self) -> bool:
        """Whether a run takes far longer than it should: a model that hangs must not meet the event loop."""
        now = time.monotonic()
        return any(_is_overdue(now - began, expected_s) for began, expected_s in list(self._under_way.values()))

    def submit(self, run: Run) -> None:
        """From the event loop. Raises Overloaded, WouldBeLate, ShadowDropped or NotOpen.

        One request that nobody waits before is never too large. Shadow runs that wait go first where there is no room.
        Behind a run that is overdue a request is refused at once if it cannot wait as long again.
        """
        dropped: list[Run] = []
        with self._changed:
            if self._closed:
                raise NotOpen
            if run.is_shadow and not self.takes_shadow:
                raise ShadowDropped
            if (stalled_s := self._stalled_s()) > run.expires_at - time.monotonic():
                raise WouldBeLate(stalled_s)
            while not run.is_shadow and self._shadow and self.num_queued + run.num_candidates > self._limit:
                dropped.append(self._take(self._shadow))
            if self._live and self.num_queued + run.num_candidates > self._limit:
                raise Overloaded(f"{self.num_queued} candidates are waiting already; try again")
            run.loop, run.queued_at = asyncio.get_running_loop(), time.monotonic()
            run.timer = run.loop.call_later(max(run.expires_at - run.queued_at, 0), self._expire, run)
            run.model.acquire()
            (self._shadow if run.is_shadow else self._live).append(run)
            self.num_queued += run.num_candidates
            self._changed.notify()
        for other in dropped:
            other.resolve(ShadowDropped())
            other.model.release()

    def cancel(self, run: Run) -> None:
        """Nobody waits for this one any more: it is not run, if it has not begun."""
        if not run.is_done:
            run.is_done = True
            if run.timer is not None:
                run.timer.cancel()
            self._discard(run)

    async def aclose(self) -> None:
        """Refuses new work, finishes what waits and ends the threads. A model that hangs is not waited for."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        until = time.monotonic() + STOP_S
        for thread in self._threads:
            await asyncio.to_thread(thread.join, max(until - time.monotonic(), 0))
            if thread.is_alive():
                log.error("a model still runs", extra={"waited_s": STOP_S})

    def _stalled_s(self) -> float:
        """How long the run has taken that all wait for, if it is overdue: the best guess of how long it will."""
        if len(self._under_way) < len(self._threads):
            return 0.0
        now = time.monotonic()
        taken = [(now - began, expected_s) for began, expected_s in self._under_way.values()]
        return min(seconds if _is_overdue(seconds, expected_s) else 0.0 for seconds, expected_s in taken)

    def _expire(self, run: Run) -> None:
        run.resolve(DeadlinePassed(run.timeout_ms))
        self._discard(run)

    def _discard(self, run: Run) -> None:
        """Takes a run out of its queue. One that is under way keeps its model until it is over."""
        queue = self._shadow if run.is_shadow else self._live
        with self._changed:
            if run not in queue:
                return
            queue.remove(run)
            self.num_queued -= run.num_candidates
        run.model.release()

    def _take(self, queue: deque[Run]) -> Run:
        run = queue.popleft()
        self.num_queued -= run.num_candidates
        return run

    def _serve(self, thread: int) -> None:
        while (batch := self._next_batch(thread)) is not None:
            outcomes = _outcomes(batch, max_candidates=self._max_candidates)
            ended = time.monotonic()
            with self._changed:
                began, _ = self._under_way.pop(thread)
                total = sum(run.num_candidates for run in batch)
                for run in batch:
                    run.seconds = (ended - began) * run.num_candidates / total
                self._changed.notify()  # another thread may have been waiting for this model's lane
            loop = batch[0].loop
            assert loop is not None
            try:
                loop.call_soon_threadsafe(_resolve, batch, outcomes)
            except RuntimeError:
                log.warning("answers nobody waits for", extra={"requests": len(batch)})  # the event loop has ended

    def _next_batch(self, thread: int) -> list[Run] | None:
        """Waits for work: one request, or several of a model that joins. None once closed and empty."""
        with self._changed:
            while True:
                for queue in (self._live, self._shadow):
                    if queue:
                        wait_s = self._wait_s(queue)
                        if wait_s <= 0:
                            return self._start(self._joined(queue), thread)
                        self._changed.wait(wait_s)
                        break
                else:
                    if self._closed:
                        return None
                    self._changed.wait()

    def _wait_s(self, queue: deque[Run]) -> float:
        """How long the first in the queue may still wait for company."""
        first = queue[0]
        backend = first.model.backend
        if self._closed or not backend.joins or not backend.batch_wait_s:
            return 0.0
        waiting = sum(run.num_candidates for run in queue if run.model is first.model)
        if waiting >= self._max_candidates:
            return 0.0
        return first.queued_at + backend.batch_wait_s - time.monotonic()

    def _joined(self, queue: deque[Run]) -> list[Run]:
        """The first in the queue and, where its model joins, those of the same model that fit into one run with it."""
        batch = [self._take(queue)]
        if not batch[0].model.backend.joins or len(queue) == 0:
            return batch
        total = batch[0].num_candidates
        for run in list(queue):
            fits = total + run.num_candidates <= self._max_candidates
            if run.model is batch[0].model and fits:
                queue.remove(run)
                self.num_queued -= run.num_candidates
                batch.append(run)
                total += run.num_candidates
        return batch

    def _start(self, batch: list[Run], thread: int) -> list[Run]:
        now = time.monotonic()
        expected_s = batch[0].model.latency.expected_s(sum(run.num_candidates for run in batch))
        self._under_way[thread] = (now, expected_s)
        for run in batch:
            run.started_at = now
        if self._live or self._shadow:
            self._changed.notify()  # what is left may be for another thread
        return batch


def _is_overdue(seconds: float, expected_s: float) -> bool:
    return seconds > OVERDUE * expected_s + OVERDUE_S


def run_once(backend: Backend, arrays: Arrays, num_candidates: int) -> RunOutcome:
    """One run, and what comes of it: finite logits, or the refusal that stands for a model that failed."""
    if backend.joins and "user_index" not in arrays:
        arrays = {**arrays, "user_index": np.zeros(num_candidates, dtype=np.int64)}
    try:
        logits = backend.run(arrays)
    except Exception as err:  # noqa: BLE001 - whatever it is, it is this request's failure and not the process's
        return _failure(err)
    if logits.shape != (num_candidates,):
        return _failure(BackendError(f"scores of shape {logits.shape} came for {num_candidates} candidates"))
    return logits


def _failure(cause: Exception) -> ModelFailed:
    failed = ModelFailed("the model could not be run")
    failed.__cause__ = cause
    return failed


def _outcomes(batch: list[Run], *, max_candidates: int) -> list[RunOutcome]:
    if len(batch) == 1:
        return [_run_in_chunks(batch[0], max_candidates)]
    arrays = join([run.arrays for run in batch])
    total = sum(run.num_candidates for run in batch)
    logits = run_once(batch[0].model.backend, arrays, total)
    if isinstance(logits, Refusal):  # one of them may be what the model cannot take: the others do not pay for it
        return [_run_in_chunks(run, max_candidates) for run in batch]
    ends = np.cumsum([0, *(run.num_candidates for run in batch)]).tolist()
    return [logits[start:end] for start, end in pairwise(ends)]


def _run_in_chunks(run: Run, max_candidates: int) -> RunOutcome:
    """A request by itself, in runs of at most so many candidates; nothing more is run for one that is too late."""
    chunks: list[Logits] = []
    for start in range(0, run.num_candidates, max_candidates):
        if run.is_done or run.expires_at <= time.monotonic():
            return DeadlinePassed(run.timeout_ms)
        stop = min(start + max_candidates, run.num_candidates)
        arrays = run.arrays if stop - start == run.num_candidates else slice_candidates(run.arrays, slice(start, stop))
        outcome = run_once(run.model.backend, arrays, stop - start)
        if isinstance(outcome, Refusal):
            return outcome
        chunks.append(outcome)
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)


def _resolve(batch: list[Run], outcomes: list[RunOutcome]) -> None:
    for run, outcome in zip(batch, outcomes, strict=True):
        run.resolve(outcome)
        run.model.release()
