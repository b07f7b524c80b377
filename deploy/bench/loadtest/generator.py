"""Open-loop load generator: sends every request when it is due, whether or not earlier ones were answered.

A closed loop waits for slow answers and so leaves out the very requests that would have suffered: coordinated omission.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from loadtest.connection import Address, Connection
from loadtest.results import NO_ANSWER, Outcome
from loadtest.timer import Timer
from numpy.typing import NDArray

OPENED_AT_ONCE = 16  # connections before a run; more are made when these are in use
DRAIN_S = 5.0  # for answers, once the last request is sent


@dataclass(frozen=True, kw_only=True)
class Plan:
    """When requests are due, in seconds from the start, and the index of each one's body, repeated from the start.

    Without times (None) it is a closed loop: every connection sends its next request as soon as it has its answer,
    which measures throughput and not latency.
    """

    due_s: Sequence[float] | None
    bodies: Sequence[int]
    seconds: float
    connections: int


class Generator:
    """One run at a time, within one event loop; connections stay open between runs."""

    def __init__(self, address: Address, bodies: Sequence[bytes], candidates: Sequence[int]) -> None:
        self._address = address
        self._requests = [address.request(body) for body in bodies]
        self._candidates = np.array(candidates, dtype=np.int32)
        self._connections: set[Connection] = set()
        self._idle: deque[Connection] = deque()  # the longest idle is next, so that those of every worker get a share
        self._opening: set[asyncio.Task[None]] = set()
        self._run: _Run | None = None

    async def open(self, connections: int) -> None:
        """Raises OSError where nobody listens."""
        for _ in range(min(connections, OPENED_AT_ONCE)):
            await Connection.open(self, self._address)

    async def run(self, plan: Plan, *, start: float) -> Outcome:
        """Run the plan from `start` on, a time of time.monotonic(), and wait for the answers."""
        run = self._run = _Run(plan, start)
        timer = run.timer = Timer(asyncio.get_running_loop(), self._send_due)
        used = time.process_time()
        try:
            timer.set(start)
            await run.sending_ended.wait()
            busy = (time.process_time() - used) / max(time.monotonic() - start, 1e-9)
            try:
                async with asyncio.timeout(DRAIN_S):
                    await run.settled.wait()
            except TimeoutError:
                for connection in [c for c in self._connections if c.number is not None]:
                    connection.abandon()
        finally:
            timer.close()
            self._run = None
        seconds = plan.seconds if run.cut_at is None else max(run.cut_at - start, 0)
        outcome = run.outcome(self._candidates, seconds=seconds, busy=busy)
        if plan.due_s is not None:
            return outcome
        return outcome.subset(
            ~(outcome.due_s + outcome.latency_s > seconds), seconds
        )  # without each connection's last, which ran over

    def stop(self) -> None:
        """End the run early: what is not yet due is no part of it."""
        if self._run is not None:
            self._run.cut_at = time.monotonic()
            self._run.end()

    def close(self) -> None:
        for opening in list(self._opening):
            opening.cancel()
        for connection in list(self._connections):
            connection.abandon()

    def _send_due(self) -> None:
        """Send what is due by now, then set the timer for the next."""
        run = self._run
        if run is None or run.sending_ended.is_set():
            return
        if run.plan.due_s is None:
            for _ in range(run.plan.connections):
                self._send_another(run)
        while run.next < run.num and (now := time.monotonic()) >= run.due[run.next]:
            run.lag[run.next] = now - run.due[run.next]
            run.waiting.append(run.next)
            run.next += 1
            self._send(run)
            if run.waiting and len(self._connections) >= run.plan.connections:
                run.num_connection_waits += 1
        if run.next < run.num:
            run.timer.set(run.due[run.next])
        else:
            left_s = run.start + run.plan.seconds - time.monotonic()
            asyncio.get_running_loop().call_later(max(left_s, 0), run.end)

    def _send_another(self, run: "_Run") -> None:
        """In a closed loop the next one is due now."""
        if not run.sending_ended.is_set():
            run.waiting.append(run.add(time.monotonic()))
            self._send(run)

    def _send(self, run: "_Run") -> None:
        while run.waiting and self._idle:
            number = run.waiting.popleft()
            self._idle.popleft().send(number, self._requests[run.plan.bodies[number % len(run.plan.bodies)]])
        if run.waiting and len(self._connections) + len(self._opening) < run.plan.connections:
            opening = asyncio.get_running_loop().create_task(self._open_another())
            self._opening.add(opening)
            opening.add_done_callback(self._opening.discard)

    async def _open_another(self) -> None:
        try:
            await Connection.open(self, self._address)
        except OSError:
            if self._run is not None and self._run.waiting:
                self._run.note(self._run.waiting.popleft(), NO_ANSWER, degraded=False)

    # --- callbacks of the connections ---

    def answered(self, number: int, status: int, *, degraded: bool) -> None:
        if self._run is not None:
            self._run.note(number, status, degraded=degraded)

    def free(self, connection: Connection) -> None:
        new = connection not in self._connections
        self._connections.add(connection)
        self._idle.append(connection)
        run = self._run
        if run is None:
            return
        if run.waiting:
            self._send(run)
        elif run.plan.due_s is None and not new:
            self._send_another(run)

    def lost(self, connection: Connection, number: int | None) -> None:
        if connection not in self._connections:
            return  # reported before
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        run = self._run
        if run is None:
            return
        if number is not None:
            run.note(number, NO_ANSWER, degraded=False)
        if run.plan.due_s is None:
            self._send_another(run)
        else:
            self._send(run)


class _Run:
    """State of a run: lists, as Python writes those faster than arrays."""

    def __init__(self, plan: Plan, start: float) -> None:
        self.plan = plan
        self.start = start
        self.due = [start + due_s for due_s in plan.due_s or ()]
        self.num = len(self.due)
        self.next = 0
        self.waiting: deque[int] = deque()  # due, and without a connection
        self.lag = [0.0] * self.num
        self.latency = [math.nan] * self.num
        self.status = [NO_ANSWER] * self.num
        self.degraded = [False] * self.num
        self.unsettled = self.num
        self.num_connection_waits = 0
        self.cut_at: float | None = None
        self.sending_ended, self.settled = asyncio.Event(), asyncio.Event()
        self.timer: Timer

    def add(self, due: float) -> int:
        """Add a request; returns its number."""
        self.due.append(due)
        self.lag.append(0.0)
        self.latency.append(math.nan)
        self.status.append(NO_ANSWER)
        self.degraded.append(False)
        self.num += 1
        self.next += 1
        self.unsettled += 1
        return self.num - 1

    def note(self, number: int, status: int, *, degraded: bool) -> None:
        if status != NO_ANSWER:
            self.latency[number] = time.monotonic() - self.due[number]
        self.status[number] = status
        self.degraded[number] = degraded
        self.unsettled -= 1
        if self.sending_ended.is_set() and not self.unsettled:
            self.settled.set()

    def end(self) -> None:
        if self.sending_ended.is_set():
            return
        self.unsettled -= self.num - self.next
        self.num = self.next
        self.sending_ended.set()
        if not self.unsettled:
            self.settled.set()

    def outcome(self, candidates: NDArray[np.int32], *, seconds: float, busy: float) -> Outcome:
        num = self.num
        return Outcome(
            due_s=np.array(self.due[:num]) - self.start,
            lag_s=np.array(self.lag[:num]),
            latency_s=np.array(self.latency[:num]),
            status=np.array(self.status[:num], dtype=np.int16),
            candidates=candidates[np.resize(np.asarray(self.plan.bodies, dtype=np.int64), num)],
            degraded=np.array(self.degraded[:num], dtype=np.bool_),
            seconds=seconds,
            busy=busy,
            num_connection_waits=self.num_connection_waits,
        )
