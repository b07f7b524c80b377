"""How evenly two workers share connections and requests, and how long a replaced worker goes without any.

    python deploy/bench/spread.py --config FILE [--connections 16,64,256] [--cap 4] [--draws 20]

FILE is the service's own configuration; two workers are started with it, on a port of their own. For each number of
kept connections:

- how many of them the first worker takes, over `draws` sets of new ones, beside what tossing a coin for each gives;
- with connections kept for ever, and for at most `cap` seconds: the second worker is killed under a steady 400 requests
  a second, and its share of them is told over two seconds, once its replacement has served for `cap` seconds.

The workers' shares are read from the files they count in. Markdown on stdout.
"""

import argparse
import asyncio
import json
import math
import os
import signal
import statistics
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from service.observability import multiprocess

RATE = 400.0  # requests a second, of all connections together
REQUEST = b"GET /healthz HTTP/1.1\r\nhost: spread\r\n\r\n"


class Workers:
    """Two workers of a running service."""

    def __init__(self, port: int, folder: Path) -> None:
        self.port = port
        self._metrics = folder / "metrics"

    async def answered(self) -> list[float]:
        """Requests so far, by worker."""
        await asyncio.sleep(2 * multiprocess.WRITE_EVERY_S)  # until what they have answered is in their files
        return [self._requests(slot) for slot in range(2)]

    def _requests(self, slot: int) -> float:
        snapshot = multiprocess.read(self._metrics, slot)
        return sum(n for (n,) in snapshot.numbers["clickserve_requests"].values()) if snapshot else 0.0

    def pid(self, slot: int) -> int:
        return multiprocess.worker_pid(self._metrics, slot)


@asynccontextmanager
async def serving(config: Path, cap_s: float) -> AsyncIterator[Workers]:
    settings = {"CLICKSERVE_MAX_CONNECTION_S": str(cap_s), "CLICKSERVE_DRAIN_S": "0", "CLICKSERVE_WORKERS": "2"}
    command = (sys.executable, "-m", "service", "serve", "--config", str(config), "--port", "0")
    process = await asyncio.create_subprocess_exec(*command, stderr=PIPE, env={**os.environ, **settings})
    assert process.stderr is not None
    told: dict[str, object] = {}
    while told.get("event") != "serving":
        line = (await process.stderr.readline()).decode()
        if not line.startswith("{"):
            sys.exit(line or "the service ended without a word")
        told = json.loads(line)
    reading = asyncio.create_task(process.stderr.read())  # or it would wait for a reader
    yield Workers(int(str(told["port"])), Path(str(told["folder"])))
    process.terminate()
    await process.wait()
    await reading


async def keep_asking(port: int, interval_s: float) -> None:
    """One client: a connection that it keeps for as long as it may, and then another."""
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = b""
            while b"connection: close" not in head:
                writer.write(REQUEST)
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(len(b'{"status":"alive"}'))
                await asyncio.sleep(interval_s)
            writer.close()
        except (OSError, asyncio.IncompleteReadError):  # its worker was killed
            continue


@asynccontextmanager
async def load(port: int, connections: int) -> AsyncIterator[None]:
    clients = [asyncio.create_task(keep_asking(port, connections / RATE)) for _ in range(connections)]
    yield
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)


async def drawn_shares(workers: Workers, connections: int, draws: int) -> list[float]:
    """The first worker's share of that many new connections, each of which asks once."""
    shares = []
    for _ in range(draws):
        before = await workers.answered()
        opened = [await asyncio.open_connection("127.0.0.1", workers.port) for _ in range(connections)]
        for reader, writer in opened:
            writer.write(REQUEST)
            await reader.readuntil(b"}")
            writer.close()
        first, second = (now - then for now, then in zip(await workers.answered(), before, strict=True))
        shares.append(first / (first + second))
    return shares


async def share_after_a_death(workers: Workers, connections: int, cap_s: float) -> float:
    """The second worker's share of the requests, `cap_s` after its replacement began to serve."""
    async with load(workers.port, connections):
        await asyncio.sleep(1)
        killed = workers.pid(1)
        os.kill(killed, signal.SIGKILL)
        while workers.pid(1) in (0, killed):  # noqa: ASYNC110 - it is another process's doing
            await asyncio.sleep(0.05)
        await asyncio.sleep(cap_s + 1)  # and the second that the new one takes from its name to its first connection
        before = await workers.answered()
        await asyncio.sleep(2)
        first, second = (now - then for now, then in zip(await workers.answered(), before, strict=True))
    return second / (first + second)


async def measure(config: Path, sizes: list[int], cap_s: float, draws: int) -> None:
    print(f"| connections | first worker's share, mean (least to most) | deviation (a coin's) | "
          f"share after its death: kept for ever | kept {cap_s:g} s |\n|---|---|---|---|---|")  # fmt: skip
    for size in sizes:
        after = []
        for cap in (0.0, cap_s):
            async with serving(config, cap) as workers:
                if cap == 0:
                    shares = await drawn_shares(workers, size, draws)
                after.append(await share_after_a_death(workers, size, cap_s))
        print(f"| {size} | {statistics.mean(shares):.1%} ({min(shares):.0%} to {max(shares):.0%}) | "
              f"{statistics.stdev(shares):.1%} ({0.5 / math.sqrt(size):.1%}) | "
              f"{after[0]:.0%} | {after[1]:.0%} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--connections", default="16,64,256")
    parser.add_argument("--cap", type=float, default=4.0)
    parser.add_argument("--draws", type=int, default=20)
    given = parser.parse_args()
    sizes = [int(size) for size in given.connections.split(",")]
    asyncio.run(measure(given.config, sizes, given.cap, given.draws))


if __name__ == "__main__":
    main()
