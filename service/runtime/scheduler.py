"""Who is next: the line of requests before a process's models, counted in candidates and in seconds."""

import asyncio
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from models.features.arrays import Arrays
from service.errors import overloaded, predicted_late, shadow_dropped
from service.runtime.backend import Backend
from service.runtime.latency_model import Cost

Logits = NDArray[np.float32]

SHADOW_SHARE = 0.25  # of the line's limit: where more waits, no shadow request is let in


@dataclass(kw_only=True, eq=False, slots=True)
class Work:
    """One request in the line. All times are on the monotonic clock."""

    arrays: Arrays
    candidates: int
    users: int
    expires: float
    shadow: bool
    answer: "asyncio.Future[Logits]"
    queued: float = 0.0
    adds_s: float = 0.0  # to the line
    begun: int = 0  # candidates that went into runs so far
    scored: int = 0
    logits: Logits | None = None  # of a request in pieces, as far as it is scored

    @property
    def left(self) -> int:
        return self.candidates - self.begun


@dataclass(kw_only=True, eq=False, slots=True)
class Piece:
    """What of one request goes into one run: its candidates from `start` to before `stop`."""

    work: Work
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        return self.stop - self.start == self.work.candidates

    @property
    def arrays(self) -> Arrays:
        arrays = self.work.arrays
        if self.is_whole:
            return arrays
        part = slice(self.start, self.stop)
        return {n: a[part] if n.startswith("item.") or n == "user_index" else a for n, a in arrays.items()}


@dataclass(kw_only=True, eq=False)
class Queue:
    """One model's requests in the line, and what is known of its runs."""

    backend: Backend
    cost: Cost
    live: deque[Work] = field(default_factory=deque)
    shadow: deque[Work] = field(default_factory=deque)
    running: int = 0
    told: asyncio.Event = field(default_factory=asyncio.Event)  # after each run, once its callers have their answers

    def works(self, *, shadow: bool) -> deque[Work]:
        return self.shadow if shadow else self.live


@dataclass(kw_only=True, eq=False, slots=True)
class Batch:
    """One run: a piece of one request, or several whole requests."""

    queue: Queue
    pieces: Sequence[Piece]
    candidates: int
    users: int
    started: float
    expected_s: float


@dataclass(slots=True)
class _Waiting:
    candidates: int = 0
    seconds: float = 0.0

    def grows(self, candidates: int, seconds: float) -> None:
        self.candidates += candidates
        self.seconds = self.seconds + seconds if self.candidates else 0.0  # no rounding is left over


class Line:
    """First come, first served over all models, but for what is joined to a request of its model; shadow work last.

    Holds no lock: it is for one thread at a time.
    """

    def __init__(self, *, limit: int, threads: int = 1) -> None:
        self._limit = limit
        self._threads = threads
        self._queues: list[Queue] = []
        self._live, self._shadow = _Waiting(), _Waiting()
        self._running: list[Batch] = []

    @property
    def candidates(self) -> int:
        return self._live.candidates + self._shadow.candidates

    @property
    def is_empty(self) -> bool:
        return not self._queues

    @property
    def takes_shadow(self) -> bool:
        return self.candidates <= SHADOW_SHARE * self._limit

    def put(self, queue: Queue, work: Work, now: float) -> list[Work]:
        """Lets a request in at the end; returns the shadow requests that had to go for it.

        Raises Problem (503) where there is no room, or where it would be scored too late and so for nothing. One
        request before which nobody waits is never too large.
        """
        waiting = self._live.candidates
        if work.shadow:
            if not self.takes_shadow:
                raise shadow_dropped()
        elif waiting and waiting + work.candidates > self._limit:
            raise overloaded(waiting)
        ahead_s = self.ahead_s(now, shadow=work.shadow)
        alone_s = queue.cost.request_s(work.candidates, work.users)
        # With nothing before it, it is let in all the same: only runs can show that a model is faster than was thought.
        if ahead_s and now + ahead_s + queue.backend.batch_wait_s + alone_s > work.expires:
            raise predicted_late(ahead_s)
        works = queue.works(shadow=work.shadow)
        work.queued = now
        work.adds_s = min(alone_s, queue.cost.joined_s(work.candidates, work.users)) if works else alone_s
        if queue not in self._queues:
            self._queues.append(queue)
        works.append(work)
        self._waiting(work).grows(work.candidates, work.adds_s)
        return list(self._make_room())

    def ahead_s(self, now: float, *, shadow: bool = False) -> float:
        """How long a request that comes now has to wait.

        A run that takes longer than was expected is expected to take as long again: behind one that hangs, the wait
        grows by itself.
        """
        running = sum(abs(batch.started + batch.expected_s - now) for batch in self._running)
        waiting = self._live.seconds + (self._shadow.seconds if shadow else 0.0)
        return (running + waiting) / self._threads

    def leave(self, queue: Queue, work: Work) -> None:
        """Takes out what is still in the line of a request that nobody waits for any more."""
        if work.left:
            works = queue.works(shadow=work.shadow)
            if work in works:
                works.remove(work)
                self._waiting(work).grows(-work.left, -work.adds_s)

    def take(self, now: float) -> tuple[Batch | None, float]:
        """The next run, or None and when to ask again (inf: not before something comes). Drops what has expired."""
        again = math.inf
        for shadow in (False, True):
            for queue in self._queues:
                works = queue.works(shadow=shadow)
                while works and works[0].expires <= now:
                    self.leave(queue, works[0])
            waiting = [queue for queue in self._queues if queue.works(shadow=shadow)]
            for queue in sorted(waiting, key=lambda queue: queue.works(shadow=shadow)[0].queued):
                works = queue.works(shadow=shadow)
                ready_at = _ready_at(queue, works)
                if ready_at <= now:
                    return self._begin(queue, works, now), now
                again = min(again, ready_at)
        self._queues = [queue for queue in self._queues if queue.live or queue.shadow]  # an old model's can go
        return None, again

    def ended(self, batch: Batch) -> None:
        """To be said of every batch that was taken."""
        self._running.remove(batch)
        batch.queue.running -= 1

    def _begin(self, queue: Queue, works: deque[Work], now: float) -> Batch:
        if works[0].candidates > queue.cost.piece:
            pieces = [_next_piece(queue, works[0])]
        else:
            pieces = [Piece(work=work, start=0, stop=work.candidates) for work in _joined(queue.cost, works, now)]
        for piece in pieces:
            work, size = piece.work, piece.stop - piece.start
            seconds = work.adds_s * size / work.left
            work.begun, work.adds_s = piece.stop, work.adds_s - seconds
            self._waiting(work).grows(-size, -seconds)
            if not work.left:
                works.popleft()
        candidates, users = sum(p.stop - p.start for p in pieces), sum(p.work.users for p in pieces)
        expected_s = queue.cost.run_s(candidates, users)
        batch = Batch(
            queue=queue, pieces=pieces, candidates=candidates, users=users, started=now, expected_s=expected_s
        )
        self._running.append(batch)
        queue.running += 1
        return batch

    def _make_room(self) -> Iterator[Work]:
        """Shadow work goes, the oldest of a model first, until the line is within its limit."""
        for queue in self._queues:
            while queue.shadow and self.candidates > self._limit:
                dropped = queue.shadow[0]
                self.leave(queue, dropped)
                yield dropped

    def _waiting(self, work: Work) -> _Waiting:
        return self._shadow if work.shadow else self._live


def _ready_at(queue: Queue, works: deque[Work]) -> float:
    """Where a run costs much and grows little, as on a GPU, a request waits a moment for company; on a CPU it does not.

    inf while the model has all the runs under way that it can.
    """
    if queue.running >= queue.backend.lanes:
        return math.inf
    wait_s = queue.backend.batch_wait_s
    return works[0].queued + (wait_s if sum(work.left for work in works) < queue.cost.piece else 0.0)


def _next_piece(queue: Queue, work: Work) -> Piece:
    """One of about equal ones."""
    size = -(-work.left // queue.cost.runs(work.left))
    return Piece(work=work, start=work.begun, stop=work.begun + size)


def _joined(cost: Cost, works: deque[Work], now: float) -> list[Work]:
    """The first request, and those behind it for as long as each costs less in this run than in one of its own.

    Nobody is made late by it. Whether it pays is a matter of size, since a graph takes its general form for several
    users: MIAN takes for four users with 10 candidates each 0.7 times as long together as apart, for eight 0.6 times,
    for two with 100 each 1.1 times (MovieLens-1M, ONNX Runtime, one core).
    """
    first = works[0]
    joined, candidates, users, expires = [first], first.candidates, first.users, first.expires
    took = cost.run_s(candidates, users)
    for work in islice(works, 1, None):
        together = cost.run_s(candidates + work.candidates, users + work.users)
        pays = together < took + cost.run_s(work.candidates, work.users)
        expires = min(expires, work.expires)
        fits = candidates + work.candidates <= cost.piece and now + together <= expires
        if not (pays and fits and work.arrays.keys() == first.arrays.keys()):
            break
        joined.append(work)
        candidates, users, took = candidates + work.candidates, users + work.users, together
    return joined
