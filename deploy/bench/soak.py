"""A soak: events are sent while Redis and workers are killed at random; each that was answered is there exactly once.

    python deploy/bench/soak.py --out OUT --store aof|cluster [--minutes N] [--work DIR]

A service of two workers takes calls of ten clicks, which are sent again until they are answered with 202. Every few
seconds something gets SIGKILL: a worker, which the supervisor replaces, or the store. `aof` is one server that appends
to its file and is started again in its folder; `cluster` is a primary of three with a replica, for users of its slots,
where a 202 waits for the replica (`event_durability: replica`); it comes back as a replica after the takeover. At the
end each user's stored clicks are compared with what was answered. OUT gets soak.md and soak.json. Exits 3 if a click is
lost or doubled.
"""

import argparse
import asyncio
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from checkouts import ROOT, export_workload
from processes import Server, service
from redis.crc import key_slot

from service.store import local_cluster, local_server
from service.store.keys import KeySpace
from service.store.redis_store import RedisStore

NUM_USERS = 300
NUM_SENDERS = 4
CLICKS_A_CALL = 10
KILL_EVERY_S = (2.0, 6.0)
FIRST_PRIMARY = range(5461)  # its slots
MORE_THAN_SENT = 10_000
Kill = Callable[[], str]


@dataclass
class Sent:
    """What the service has answered, by user: items, each of one click."""

    acknowledged: dict[str, set[str]] = field(default_factory=dict)
    attempted: dict[str, set[str]] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    calls: int = 0


class RestartedServer:
    """One server, started again in its folder when it was killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._start()

    def _start(self) -> None:
        self._server = self._stack.enter_context(local_server.start(self._folder, durable=True))
        self.url = self._server.url

    def kill(self) -> str:
        os.kill(self._server.pid, signal.SIGKILL)
        self._stack.close()
        self._start()
        return "redis"

    def close(self) -> None:
        self._stack.close()


@contextmanager
def cluster() -> Iterator[tuple[str, Kill]]:
    with local_cluster.start_cluster(num_replicas=1) as servers:
        pair = [servers.servers[0], servers.servers[-1]]

        def kill() -> str:
            primary = next(server for server in pair if server.ask("ROLE")[0] == b"master")
            replica = next(server for server in pair if server is not primary)
            primary.kill()
            local_cluster.wait_until(lambda: replica.ask("ROLE")[0] == b"master")
            servers.mend()
            return "primary of the cluster"

        yield servers.url, kill


async def send(server: Server, sent: Sent, sender: int, users: Sequence[str], until: float) -> None:
    draw = random.Random(sender)
    number = 0
    async with httpx.AsyncClient(base_url=server.url, timeout=10) as client:
        while time.monotonic() < until:
            number += 1
            clicks = [
                {
                    "event_id": f"{sender}-{number}-{n}",
                    "type": "click",
                    "ts": time.time(),
                    "user": draw.choice(users),
                    "item": f"{sender}{number:07d}{n}",
                }
                for n in range(CLICKS_A_CALL)
            ]
            for click in clicks:
                sent.attempted.setdefault(str(click["user"]), set()).add(str(click["item"]))
            if await _sent_until_taken(client, clicks, sent):
                for click in clicks:
                    sent.acknowledged.setdefault(str(click["user"]), set()).add(str(click["item"]))


async def _sent_until_taken(client: httpx.AsyncClient, clicks: list[dict[str, Any]], sent: Sent) -> bool:
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        sent.calls += 1
        try:
            answer = await client.post("/events", json=clicks)
        except httpx.HTTPError as err:
            sent.refused[type(err).__name__] += 1
        else:
            if answer.status_code == 202:
                receipt = answer.json()
                return bool(receipt["accepted"] + receipt["duplicates"] == len(clicks))
            sent.refused[str(answer.status_code)] += 1
        await asyncio.sleep(0.05)
    return False


async def kill_at_random(kill_store: Kill, server: Server, killed: Counter[str], until: float) -> None:
    draw = random.Random(2026)
    while (wait_s := draw.uniform(*KILL_EVERY_S)) + time.monotonic() < until - 5:
        await asyncio.sleep(wait_s)
        if draw.random() < 0.5:
            killed[await asyncio.to_thread(kill_store)] += 1
        else:
            worker = draw.choice(_children(server.pids[0]))
            os.kill(worker, signal.SIGKILL)
            killed["worker"] += 1


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def stored(url: str, users: Sequence[str]) -> dict[str, Counter[str]]:
    async with aclosing(RedisStore.connect(url, timeout_s=10)) as store:
        await store.check()
        pasts = {user: await store.fetch(user, [], before=math.inf, limit=MORE_THAN_SENT) for user in users}
    return {user: Counter(fetched.behaviours.items) for user, fetched in pasts.items()}


async def soak(url: str, kill_store: Kill, server: Server, users: Sequence[str], seconds: float) -> dict[str, Any]:
    sent, killed = Sent(), Counter[str]()
    until = time.monotonic() + seconds
    senders = [send(server, sent, sender, users, until) for sender in range(NUM_SENDERS)]
    await asyncio.gather(*senders, kill_at_random(kill_store, server, killed, until))
    there = await stored(url, users)
    lost = sum(len(items - there[user].keys()) for user, items in sent.acknowledged.items())
    doubled = sum(count - 1 for items in there.values() for count in items.values())
    strange = sum(len(items.keys() - sent.attempted.get(user, set())) for user, items in there.items())
    return {
        "seconds": seconds,
        "killed": dict(killed),
        "calls": sent.calls,
        "answered other than 202": dict(sent.refused),
        "clicks acknowledged": sum(map(len, sent.acknowledged.values())),
        "clicks stored": sum(items.total() for items in there.values()),
        "lost": lost,
        "doubled": doubled,
        "never sent": strange,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--store", choices=("aof", "cluster"), required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--work", type=Path, help="a folder that keeps the exported model for the next time")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    users = [f"user {number}" for number in range(NUM_USERS)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="clickserve-soak-")))
        export = export_workload(ROOT, options.work or folder, sizes=[100])
        if options.store == "aof":
            (folder / "store").mkdir()
            alone = stack.enter_context(closing(RestartedServer(folder / "store")))
            url, kill_store = alone.url, alone.kill
        else:
            url, kill_store = stack.enter_context(cluster())
            keys = KeySpace("cs")
            users = [user for user in users if key_slot(keys.behaviours(user).encode()) in FIRST_PRIMARY]
        server = stack.enter_context(
            service(
                export.facts["model"],
                export.artifacts,
                folder,
                url,
                cores=sorted(os.sched_getaffinity(0)),
                workers=2,
                CLICKSERVE_KEEP_BEHAVIOURS=str(MORE_THAN_SENT),
                CLICKSERVE_KEEP_BEHAVIOURS_BYTES=str(2**20),
                CLICKSERVE_EVENT_DURABILITY="memory" if options.store == "aof" else "replica",
            )
        )
        facts = asyncio.run(soak(url, kill_store, server, users, options.minutes * 60))
    text = "\n".join(f"- {name}: {value}" for name, value in facts.items()) + "\n"
    title = f"# A soak on {'one server' if options.store == 'aof' else 'a Cluster'}\n\n"
    (options.out / "soak.md").write_text(f"{title}Kills at random while clicks are sent.\n\n{text}")
    (options.out / "soak.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(text)
    return 3 if facts["lost"] or facts["doubled"] or facts["never sent"] else 0


if __name__ == "__main__":
    sys.exit(main())
