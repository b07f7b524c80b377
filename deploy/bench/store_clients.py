"""Cost of the request path's one store read, by client: the project's multiplexed connection and valkey-glide's.

    python deploy/bench/store_clients.py [--rounds 9] [--seconds 1] [--json FILE]

The read is one MGET of a user's profile and click history (30 clicks) and of 0 or 20 items, unpacked as the service
does. Every client is a process of its own with uvloop and takes its turn on one real server over loopback TCP, as
valkey-glide takes no socket file; `project, unix socket` is what the demo uses. `hiredis protocol` is the least that a
multiplexed connection in Python can do: no deadline, no reconnection. The clients have the last core, the server has
the first. The table has medians over the rounds: microseconds of processor time per call, of all the process's threads
and of the event loop's thread alone, calls/s, and the median latency; ratios are medians of those within a round.

valkey-glide is no dependency of the project: `pip install valkey-glide` first.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import hiredis
import redis
import uvloop

from models.features.values import Row
from service.store import local_server
from service.store.codec import Click, behaviours_key, item_key, unpack_past, unpack_row, user_key
from service.store.feature_store import Fetched
from service.store.redis_store import RedisStore

ROOT = Path(__file__).parents[2]
NUM_USERS = 500
NUM_ITEMS = 2_000
CLICKS = 30
NOW = 1_800_000_000.0
TIMEOUT_S = 5.0
CLIENTS = ("project", "project, unix socket", "valkey-glide", "hiredis protocol")
CONCURRENCY = (1, 8, 32)
ITEMS_READ = (0, 20)

Fetch = Callable[[str, Sequence[str]], Awaitable[Fetched]]
Burst = dict[str, float]
"""Of one turn: `cpu_us`, `loop_us`, `calls_per_s`, `p50_us`."""


async def fill(url: str) -> None:
    """Profiles of 7 values, clicks and items of 4, as in workload.py."""
    draw = random.Random(2026)

    def row(names: Sequence[str]) -> Row:
        return {name: f"{name}{draw.randrange(300)}" for name in names}

    store = RedisStore.connect(url, timeout_s=TIMEOUT_S)
    await store.put_items({f"i{n}": {**row(("brand", "category")), "price": 9.5} for n in range(NUM_ITEMS)})
    profile = ("age", "gender", "city", "job", "income", "system", "member")
    await store.put_users({f"u{n}": row(profile) for n in range(NUM_USERS)})
    for user in range(NUM_USERS):
        await store.append(
            [
                Click(event_id=f"{n}", user=f"u{user}", item=f"i{draw.randrange(NUM_ITEMS)}", ts=NOW - 3600 * n)
                for n in range(1, CLICKS + 1)
            ]
        )
    await store.aclose()


async def project_fetch(url: str) -> Fetch:
    store = RedisStore.connect(url, timeout_s=TIMEOUT_S)
    await store.ping()

    async def fetch(user: str, items: Sequence[str]) -> Fetched:
        return await store.fetch(user, items, before=NOW, limit=CLICKS)

    return fetch


async def glide_fetch(port: int) -> Fetch:
    """The same read and the same unpacking through valkey-glide."""
    from glide import GlideClient, GlideClientConfiguration, NodeAddress

    client = await GlideClient.create(
        GlideClientConfiguration([NodeAddress("127.0.0.1", port)], request_timeout=int(1000 * TIMEOUT_S))
    )

    async def fetch(user: str, items: Sequence[str]) -> Fetched:
        keys: list[str | bytes] = [item_key(item) for item in items]
        keys += [user_key(user), behaviours_key(user)]
        values = await client.mget(keys)
        profile, past = values[len(items) :]
        behaviours = unpack_past(past, before=NOW, limit=CLICKS)
        return Fetched(user=unpack_row(profile), behaviours=behaviours, items=values[: len(items)])

    return fetch


class HiredisProtocol(asyncio.Protocol):
    """Commands out as they come, replies back in their order."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader()
        self._pending: deque[asyncio.Future[Any]] = deque()
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def send(self, command: tuple[str | bytes, ...]) -> "asyncio.Future[Any]":
        reply = self._loop.create_future()
        self._pending.append(reply)
        self._transport.write(hiredis.pack_command(command))  # type: ignore[arg-type] # its stub forgets str
        return reply

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (answer := self._reader.gets()) is not False:
            self._pending.popleft().set_result(answer)


async def hiredis_fetch(port: int) -> Fetch:
    _, protocol = await asyncio.get_running_loop().create_connection(HiredisProtocol, "127.0.0.1", port)

    async def fetch(user: str, items: Sequence[str]) -> Fetched:
        values = await protocol.send(("MGET", *map(item_key, items), user_key(user), behaviours_key(user)))
        profile, past = values[len(items) :]
        behaviours = unpack_past(past, before=NOW, limit=CLICKS)
        return Fetched(user=unpack_row(profile), behaviours=behaviours, items=values[: len(items)])

    return fetch


async def connect(client: str, url: str, port: int) -> Fetch:
    match client:
        case "valkey-glide":
            return await glide_fetch(port)
        case "hiredis protocol":
            return await hiredis_fetch(port)
        case _:
            return await project_fetch(url)


async def burst(fetch: Fetch, *, concurrency: int, num_items: int, seconds: float) -> Burst:
    """A closed loop of that many callers."""
    latencies: list[float] = []
    clock = time.perf_counter
    started, used, used_here = clock(), time.process_time(), time.thread_time()
    until = started + seconds

    async def call(number: int) -> None:
        draw = random.Random(number)
        while (began := clock()) < until:
            first = draw.randrange(NUM_ITEMS - num_items)
            await fetch(f"u{draw.randrange(NUM_USERS)}", [f"i{first + n}" for n in range(num_items)])
            latencies.append(clock() - began)

    await asyncio.gather(*(call(number) for number in range(concurrency)))
    took, calls = clock() - started, len(latencies)
    return {
        "cpu_us": 1e6 * (time.process_time() - used) / calls,
        "loop_us": 1e6 * (time.thread_time() - used_here) / calls,
        "calls_per_s": calls / took,
        "p50_us": 1e6 * statistics.median(latencies),
    }


async def serve_bursts(client: str, url: str, port: int) -> None:
    """One client's process: checks one read, says so, then a burst for each line of stdin."""
    fetch = await connect(client, url, port)
    first = await fetch("u7", ["i1", "i2"])
    if first.user is None or len(first.behaviours) != CLICKS or None in first.items:
        sys.exit(f"{client} read {first!r:.300}")
    print(json.dumps({"ready": client}), flush=True)
    for line in sys.stdin:
        print(json.dumps(await burst(fetch, **json.loads(line))), flush=True)


class ClientProcess:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def burst(self, *, concurrency: int, num_items: int, seconds: float) -> Burst:
        assert self._process.stdin is not None
        order = {"concurrency": concurrency, "num_items": num_items, "seconds": seconds}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer: Burst = self.read_line()
        return answer

    def read_line(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("a client's process ended; its message stands above")
        return json.loads(line)


@contextmanager
def client_process(client: str, url: str, port: int, core: int) -> Iterator[ClientProcess]:
    command = [sys.executable, __file__, "--client", client, "--url", url, "--port", str(port), "--core", str(core)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        started = ClientProcess(process)
        started.read_line()
        try:
            yield started
        finally:
            process.kill()


def measure(*, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each client, number of items and concurrency."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])  # the server inherits it
    with ExitStack() as stack:
        server = stack.enter_context(local_server.start())
        port = _listen_on_tcp(server.url)
        asyncio.run(fill(server.url))
        tcp = f"redis://127.0.0.1:{port}"
        clients = {
            name: stack.enter_context(client_process(name, server.url if "unix" in name else tcp, port, cores[-1]))
            for name in CLIENTS
        }
        rows: list[dict[str, Any]] = []
        for num_items in ITEMS_READ:
            for concurrency in CONCURRENCY:
                bursts: dict[str, list[Burst]] = {name: [] for name in CLIENTS}
                for number in range(rounds + 1):
                    for name in random.sample(CLIENTS, len(CLIENTS)):
                        found = clients[name].burst(concurrency=concurrency, num_items=num_items, seconds=seconds)
                        if number:  # the first round warms up
                            bursts[name].append(found)
                rows += _rows(bursts, num_items, concurrency)
    return rows


def _rows(bursts: dict[str, list[Burst]], num_items: int, concurrency: int) -> Iterator[dict[str, Any]]:
    for name, found in bursts.items():
        ratios = [b["cpu_us"] / base["cpu_us"] for b, base in zip(found, bursts["project"], strict=True)]
        yield {
            "items": num_items,
            "concurrency": concurrency,
            "client": name,
            **{key: statistics.median(b[key] for b in found) for key in found[0]},
            "cpu_ratio": statistics.median(ratios),
            "cpu_ratios": ratios,
        }


def _listen_on_tcp(url: str) -> int:
    """Makes the server listen on a free loopback port as well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    with redis.Redis.from_url(url) as admin:
        admin.config_set("bind", "127.0.0.1")
        admin.config_set("port", port)
    return port


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    titles = ("items", "concurrency", "client", "CPU us/call", "event loop's thread", "CPU / project's",
              "calls/s", "p50 us")  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [str(row["items"]), str(row["concurrency"]), row["client"], f"{row['cpu_us']:.0f}"]
        cells += [f"{row['loop_us']:.0f}", f"{row['cpu_ratio']:.2f}", f"{row['calls_per_s']:,.0f}"]
        cells.append(f"{row['p50_us']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one turn")
    parser.add_argument("--json", type=Path, metavar="FILE")
    for name in ("--client", "--url", "--port", "--core"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.client is not None:
        os.sched_setaffinity(0, [int(options.core)])
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve_bursts(options.client, options.url, int(options.port)))
        return 0
    rows = measure(rounds=options.rounds, seconds=options.seconds)
    print(markdown(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
