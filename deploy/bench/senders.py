"""Closed-loop HTTP senders: wrk where it is installed, else the load generator's own connections."""

import json
import shutil
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from loadtest.generator_pool import GeneratorPool
from loadtest.request_bodies import Body, RequestMix
from loadtest.results import OK, percentile_ms
from processes import Server

SCRIPT = Path(__file__).with_name("bodies.lua")


class SenderError(RuntimeError):
    """A burst in which not every request was answered with 200."""


@dataclass(frozen=True, kw_only=True)
class Burst:
    """Answers a second, and the latency seen by the sender."""

    per_s: float
    p50_ms: float | None = None  # None of a loop without HTTP


class Sender(Protocol):
    def burst(self, server: Server, bodies: Path, *, connections: int, seconds: float) -> Burst:
        """POST the bodies, one a line of the file, to /predict over and over. Raises SenderError."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def find_sender() -> Sender:
    binary = shutil.which("wrk")
    return PoolSender() if binary is None else WrkSender(binary)


class WrkSender:
    """wrk on one thread."""

    def __init__(self, binary: str) -> None:
        self._binary = binary

    def burst(self, server: Server, bodies: Path, *, connections: int, seconds: float) -> Burst:
        options = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "60s", "-s", str(SCRIPT)]
        command = [self._binary, *options, f"{server.url}/predict", "--", str(bodies)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            found = json.loads(done.stdout.rpartition("RESULT ")[2])
        except ValueError:
            raise SenderError(f"wrk: {(done.stderr or done.stdout).strip()[:300]}") from None
        if any(found["errors"].values()) or not found["requests"]:
            raise SenderError(f"{server.url}: of {found['requests']} requests failed, by kind: {found['errors']}")
        return Burst(per_s=1e6 * found["requests"] / found["duration_us"], p50_ms=found["p50_us"] / 1000)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class PoolSender:
    """One process of the load generator for each server and file of bodies, kept until the block ends."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._pools: dict[tuple[int, Path, int], GeneratorPool] = {}

    def burst(self, server: Server, bodies: Path, *, connections: int, seconds: float) -> Burst:
        key = (server.port, bodies, connections)
        if key not in self._pools:
            mix = RequestMix(replayed=_read_bodies(bodies))
            pool = GeneratorPool(server.address, mix, processes=1, connections=connections, seed=2026)
            self._pools[key] = self._stack.enter_context(pool)
        outcome = self._pools[key].run(None, seconds)
        failed = int((outcome.status != OK).sum())
        p50_ms = percentile_ms(outcome.latency_s, 0.5)
        if failed or p50_ms is None:
            raise SenderError(f"{server.url}: {failed} of {len(outcome.status)} requests failed")
        return Burst(per_s=len(outcome.status) / outcome.seconds, p50_ms=p50_ms)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _read_bodies(file: Path) -> tuple[Body, ...]:
    return tuple(Body(content=line, candidates=1) for line in file.read_bytes().splitlines())
