"""Pool of load generators, one process each, driven as one."""

import asyncio
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from types import TracebackType
from typing import Any, Self

import numpy as np
import uvloop
from loadtest.arrivals import poisson
from loadtest.connection import Address
from loadtest.errors import BenchError
from loadtest.generator import Generator, Plan
from loadtest.request_bodies import NUM_BODIES, RequestMix
from loadtest.results import Outcome, merge

START_S = 60.0  # for a generator to draw its bodies
LEAD_S = 0.1  # for them all to draw up their plans, so that they begin together
PLAN_S = 2e-6  # and for each request in one
_STOP = "stop"


@dataclass(frozen=True, kw_only=True)
class Load:
    """Parameters of a run. With `rate` None it is a closed loop over all the connections."""

    rate: float | None
    seconds: float
    connections: int


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """Ctrl-C during a run; `outcome` is what it came to until then."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome


class GeneratorPool:
    """As a context manager it starts the processes, draws their bodies and opens their connections."""

    def __init__(self, address: Address, mix: RequestMix, *, processes: int, connections: int, seed: int) -> None:
        self._stack = ExitStack()
        self._pipes: list[Pipe] = []
        self._connections = max(1, connections // processes)
        context = multiprocessing.get_context("spawn")
        for number in range(processes):
            pipe, theirs = context.Pipe()
            process = context.Process(
                target=_generate, args=(theirs, address, mix, self._connections, [seed, number]), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self._stack.callback(process.join)
            self._stack.callback(pipe.close)

    def __enter__(self) -> Self:
        try:
            for pipe in self._pipes:
                _await_ready(pipe)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(
        self,
        rate: float | None,
        seconds: float,
        *,
        connections: int | None = None,
        meanwhile: Callable[[float], None] | None = None,
    ) -> Outcome:
        """Requests at `rate` a second, or with None as many as the connections carry, for that long.

        `connections` may be fewer than there are. `meanwhile` is called with the start, a time of time.monotonic(),
        while they run. Raises Interrupted on Ctrl-C.
        """
        rate_each = None if rate is None else rate / len(self._pipes)
        start = time.monotonic() + LEAD_S + PLAN_S * seconds * (rate or 0)
        connections_each = self._connections if connections is None else max(1, connections // len(self._pipes))
        for pipe in self._pipes:
            pipe.send((Load(rate=rate_each, seconds=seconds, connections=connections_each), start))
        try:
            if meanwhile is not None:
                self._run_meanwhile(meanwhile, start)
            return self._collect()
        except KeyboardInterrupt:
            self._stop()
            raise Interrupted(self._collect()) from None

    def _run_meanwhile(self, meanwhile: Callable[[float], None], start: float) -> None:
        """Call it; when it fails, end the run and take its outcome out of the pipes, or the next run would read it."""
        try:
            meanwhile(start)
        except Exception:  # whatever it is, it goes on from here
            self._stop()
            self._collect()
            raise

    def _stop(self) -> None:
        for pipe in self._pipes:
            pipe.send(_STOP)

    def _collect(self) -> Outcome:
        for pipe in self._pipes:
            pipe.poll(None)  # all of them, before any is taken: an interruption in between loses none
        return merge([_received(pipe) for pipe in self._pipes])


def _await_ready(pipe: Pipe) -> None:
    if not pipe.poll(START_S):
        raise BenchError(f"a generator was not ready within {START_S:g} s")
    if (failure := _received(pipe)) is not None:
        raise BenchError(failure)


def _received(pipe: Pipe) -> Any:
    try:
        return pipe.recv()
    except (EOFError, OSError):
        raise BenchError("a generator's process ended; its error stands above") from None


def _generate(pipe: Pipe, address: Address, mix: RequestMix, connections: int, seed: list[int]) -> None:
    """A generator's process: sends None once ready (or why it is not), then serves runs until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process group; the parent decides
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(pipe, address, mix, connections, np.random.default_rng(seed)))


async def _serve(pipe: Pipe, address: Address, mix: RequestMix, connections: int, draw: np.random.Generator) -> None:
    bodies = mix.draw(NUM_BODIES, draw)
    generator = Generator(address, [body.content for body in bodies], [body.candidates for body in bodies])
    try:
        await generator.open(connections)
    except OSError as err:
        pipe.send(f"--url: no connection to {address.host}:{address.port}: {err.strerror or err}")
        return
    gc.collect()
    gc.disable()  # a collection takes milliseconds, and nothing here needs one
    pipe.send(None)
    loads: asyncio.Queue[tuple[Load, float] | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    loop.add_reader(pipe.fileno(), _listen, pipe, generator, loads)
    try:
        while (order := await loads.get()) is not None:
            load, start = order
            outcome = await generator.run(_plan(load, len(bodies), draw), start=start)
            os.set_blocking(pipe.fileno(), True)  # the event loop, which reads from it, made it otherwise
            pipe.send(outcome)
    finally:
        loop.remove_reader(pipe.fileno())
        generator.close()


def _listen(pipe: Pipe, generator: Generator, loads: "asyncio.Queue[tuple[Load, float] | None]") -> None:
    try:
        message = pipe.recv()
    except (EOFError, OSError):
        asyncio.get_running_loop().remove_reader(pipe.fileno())
        generator.stop()
        loads.put_nowait(None)
        return
    if message == _STOP:
        generator.stop()
    else:
        loads.put_nowait(message)


def _plan(load: Load, num_bodies: int, draw: np.random.Generator) -> Plan:
    due_s = None if load.rate is None else poisson(load.rate, load.seconds, draw).tolist()
    num = max(num_bodies, 0 if due_s is None else len(due_s))
    return Plan(
        due_s=due_s,
        bodies=draw.integers(num_bodies, size=num).tolist(),
        seconds=load.seconds,
        connections=load.connections,
    )
