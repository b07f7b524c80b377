"""How requests reach their model: cut and joined into runs, on the one thread that all models of a process share."""

import asyncio
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise

import numpy as np

from models.features.arrays import Arrays, concat, num_users
from service.deadline import Deadline
from service.errors import Problem, model_failed, not_open, shadow_dropped, too_late
from service.observability.metrics import Metrics
from service.runtime.backend import Backend, BackendError
from service.runtime.latency_model import Cost
from service.runtime.scheduler import Batch, Line, Logits, Piece, Queue, Work

log = logging.getLogger(__name__)

STOP_S = 10.0  # for the runs under way; a model that hangs is left to the end of the process


class Runner:
    """The thread on which a process's models run, one run after the other: on one core each is fastest alone.

    A run gives the event loop its GIL, and its answers go back in one call. A GPU may want two `threads`.
    """

    def __init__(self, metrics: Metrics, *, max_queued_candidates: int, threads: int = 1) -> None:
        self._metrics = metrics
        self._line = Line(limit=max_queued_candidates, threads=threads)
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._serve, name=f"model-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def takes_shadow(self) -> bool:
        """Whether shadow work has a chance now; who asks first saves what comes before the model."""
        return self._line.takes_shadow

    @property
    def waiting(self) -> int:
        """Candidates in the line."""
        return self._line.candidates

    def put(self, queue: Queue, work: Work) -> None:
        """Raises Problem (503) where the line does not take it; see `Line.put`."""
        with self._changed:
            if self._closed:
                raise not_open()
            dropped = self._line.put(queue, work, time.monotonic())
            self._changed.notify()
        self._metrics.queue_candidates.set(self.waiting)
        for other in dropped:
            _tell([(other, shadow_dropped())])

    def doubt(self, queue: Queue) -> None:
        """See `Cost.doubt`."""
        with self._changed:
            queue.cost.doubt()

    def leave(self, queue: Queue, work: Work) -> None:
        """Nobody waits for this one any more."""
        with self._changed:
            self._line.leave(queue, work)
        self._metrics.queue_candidates.set(self.waiting)

    async def aclose(self) -> None:
        """Refuses new work, finishes what waits and ends the thread. A model that hangs is not waited for twice."""
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

    def _serve(self) -> None:
        while self._run_one():
            pass

    def _run_one(self) -> bool:
        """Waits for a batch and runs it. False once the runner is closed and the line is empty."""
        batch = self._next()
        if batch is None:
            return False
        outcomes = _scored(batch.queue.backend, batch.pieces)
        ended = time.monotonic()
        with self._changed:
            self._line.ended(batch)
            if all(isinstance(outcome, np.ndarray) for outcome in outcomes):
                batch.queue.cost.ran(batch.candidates, batch.users, ended - batch.started)
            answers = [
                (piece.work, answer)
                for piece, outcome in zip(batch.pieces, outcomes, strict=True)
                if (answer := self._whole(batch.queue, piece, outcome)) is not None
            ]
            self._changed.notify()  # another thread may have been waiting for this model
        try:
            batch.pieces[0].work.answer.get_loop().call_soon_threadsafe(_tell, answers, batch.queue.told)
        except RuntimeError:
            log.warning("answers nobody waits for", extra={"requests": len(answers)})  # the event loop has ended
        self._metrics.stages["infer"].observe(ended - batch.started)
        self._metrics.batch_candidates.observe(batch.candidates)
        return True

    def _next(self) -> Batch | None:
        with self._changed:
            while True:
                batch, again = self._line.take(now := time.monotonic())
                if batch is not None:
                    break
                if self._closed and self._line.is_empty:
                    return None
                self._changed.wait(None if again == float("inf") else again - now)
            if self.waiting:
                self._changed.notify()  # what is left may be for another thread, which was told of no more than this
        self._metrics.queue_candidates.set(self.waiting)
        for piece in batch.pieces:
            if piece.start == 0:
                self._metrics.stages["queue"].observe(batch.started - piece.work.queued)
        return batch

    def _whole(self, queue: Queue, piece: Piece, outcome: "Outcome") -> "Outcome":
        """What its caller is told, None while pieces are missing. The rest of a request that failed is not run."""
        work = piece.work
        if not isinstance(outcome, np.ndarray):
            self._line.leave(queue, work)
            return outcome
        if piece.is_whole:
            return outcome
        if work.logits is None:
            work.logits = np.empty(work.candidates, dtype=np.float32)
        work.logits[piece.start : piece.stop] = outcome
        work.scored += len(outcome)
        return work.logits if work.scored == work.candidates else None


class Batcher:
    """One loaded model for any number of requests at once; every limit is in candidates, as those take the time.

    A request larger than a run is cut, smaller ones are joined where that is faster. On a CPU nobody waits for
    company: runs are joined of what came while the thread was busy.
    """

    def __init__(self, backend: Backend, cost: Cost, runner: Runner) -> None:
        self._runner = runner
        self._queue = Queue(backend=backend, cost=cost)
        self._holders = 0

    async def submit(self, arrays: Arrays, deadline: Deadline, *, shadow: bool = False) -> Logits:
        """The candidates' logits [C], all finite.

        Raises Problem: 503 at once where the line is too long for it or for its deadline, 503 where the model fails,
        504 at the deadline. When the caller is cancelled the request is not run any more. Shadow work runs when no
        other waits, and is refused or dropped (503) before any other.
        """
        answer: asyncio.Future[Logits] = asyncio.get_running_loop().create_future()
        work = Work(
            arrays=arrays,
            candidates=len(arrays["user_index"]),
            users=num_users(arrays),
            expires=deadline.at,
            shadow=shadow,
            answer=answer,
        )
        with self.held():
            self._runner.put(self._queue, work)
            timer = answer.get_loop().call_later(max(deadline.left_s, 0), _expire, answer, deadline)
            try:
                return await answer
            finally:
                timer.cancel()
                if work.left:
                    self._runner.leave(self._queue, work)

    def expected_s(self, num_candidates: int) -> float:
        """What a request of one user takes of the model, on its own."""
        return self._queue.cost.request_s(num_candidates, 1)

    def doubt(self) -> None:
        """To be said of a request that was refused because its run alone is expected to take too long.

        Nothing would be learnt any more of a model that was slow for a while, as long as others keep the line busy.
        """
        self._runner.doubt(self._queue)

    @property
    def takes_shadow(self) -> bool:
        return self._runner.takes_shadow

    @contextmanager
    def held(self) -> Iterator[None]:
        """`drain` waits for all who hold it: who has chosen a model may be some time before it submits."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            self._queue.told.set()

    async def drain(self) -> None:
        """Returns when nobody holds it and none of its runs is under way: its backend can be closed then."""
        while self._holders or self._queue.running:
            self._queue.told.clear()
            await self._queue.told.wait()


Outcome = Logits | Problem | None  # None: there is nobody to tell


def _scored(backend: Backend, pieces: Sequence[Piece]) -> list[Outcome]:
    """One run, and what comes of it for each piece."""
    try:
        logits = _run(backend, [piece.arrays for piece in pieces])
    except Exception as err:  # noqa: BLE001 - whatever it is, it is these requests' failure and not the thread's
        if len(pieces) > 1:  # one of them may be what the model cannot take: the others do not pay for it
            return [outcome for piece in pieces for outcome in _scored_in_time(backend, piece)]
        failed = model_failed("the model could not be run")
        failed.__cause__ = err
        return [failed]
    ends = list(accumulate(piece.stop - piece.start for piece in pieces))
    parts = [logits[start:end] for start, end in pairwise([0, *ends])]
    return [part if np.isfinite(part).all() else _no_number() for part in parts]


def _run(backend: Backend, parts: Sequence[Arrays]) -> Logits:
    logits = backend.run(parts[0] if len(parts) == 1 else concat(parts))
    candidates = sum(len(part["user_index"]) for part in parts)
    if logits.shape != (candidates,):
        raise BackendError(f"scores of shape {logits.shape} came for {candidates} candidates")
    return logits


def _scored_in_time(backend: Backend, piece: Piece) -> list[Outcome]:
    return [None] if piece.work.expires <= time.monotonic() else _scored(backend, [piece])


def _no_number() -> Problem:
    return model_failed("the model gave a score that is no number")


def _tell(answers: Sequence[tuple[Work, Outcome]], told: asyncio.Event | None = None) -> None:
    for work, outcome in answers:
        if work.answer.done():  # late, or its caller left
            continue
        if isinstance(outcome, Problem):
            work.answer.set_exception(outcome)
        elif outcome is not None:
            work.answer.set_result(outcome)
    if told is not None:
        told.set()


def _expire(answer: "asyncio.Future[Logits]", deadline: Deadline) -> None:
    if not answer.done():
        answer.set_exception(too_late(deadline.timeout_ms))
