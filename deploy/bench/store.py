"""The behaviour store: a prediction's read against a bare GET, bytes of users and events, and events taken a second.

    python deploy/bench/store.py --out OUT [--rounds N] [--users N]

Against a server of its own, in one process on its event loop:

- read: what a prediction reads of a user of 30 clicks, with their features and without items, beside a bare GET of the
  same bytes on the same connection, in turns; and how long the value takes to decode.
- bytes: what the server's memory grows by for each user of 50 clicks, keys and Redis's own included, with none, three
  and eight features a click, and for each event of a day's.
- events: calls of 100 events, a tenth of them clicks, from the body's bytes to the answer's, as POST /events does.

OUT gets store.md and store.json.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import redis
from interleaved import ratio

from service.http.event_schemas import EventsDecoder, receipt_of
from service.ingest.events import EventRecorder
from service.observability.metrics import Metrics
from service.store import local_server
from service.store.codec import NO_WORDS, Click, Mark, unpack_history
from service.store.keys import KeySpace
from service.store.redis_connection import MultiplexedConnection, packed
from service.store.redis_store import RedisStore

KEYS = KeySpace("cs")
START = 1.79e9
FEATURES = ("category", "brand", "price", "color", "size", "device", "placement", "campaign")
VALUES_OF_A_FEATURE = 100
TARGETS = {0: 1.0, 3: 1.4, 8: 2.4}  # KB of a user of 50 clicks, by features of a click
HEADING = "# The behaviour store\n\nReads of a user, bytes of users and events, and events taken a second.\n\n"
Facts = dict[str, Any]


def clicks_of(user: str, count: int, num_features: int, draw: random.Random, *, item: str = "%d") -> list[Click]:
    values = {
        name: [round(1 + 1.99 * k, 2) if name == "price" else f"{name} {k}" for k in range(VALUES_OF_A_FEATURE)]
        for name in FEATURES[:num_features]
    }
    return [
        Click(
            event_id=f"{user} {n}",
            user=user,
            item=item % draw.randrange(10**6),
            ts=START + n * 3600 + draw.random(),
            features={name: draw.choice(of_feature) for name, of_feature in values.items()},
        )
        for n in range(count)
    ]


async def reads(url: str, rounds: int) -> Facts:
    draw = random.Random(2026)
    async with aclosing(RedisStore.connect(url, timeout_s=10)) as store:
        await store.append(clicks_of("u1", 30, 3, draw))
        await store.fetch("u1", [], before=3e9, limit=30)
        bare = MultiplexedConnection(url, timeout_s=10, on_outcome=lambda _: None)
        get = packed(b"GET", KEYS.behaviours("u1").encode())
        value: bytes = await bare.ask(get)
        took: dict[str, list[float]] = {"fetch": [], "get": []}
        for _ in range(1 + rounds):
            took["fetch"].append(await _each(lambda: store.fetch("u1", [], before=3e9, limit=30)))
            took["get"].append(await _each(lambda: bare.ask(get)))
        await bare.aclose()
        decoding = []
        for _ in range(rounds):
            started = time.perf_counter()
            for _ in range(1000):
                unpack_history(value, before=3e9, limit=30, words=NO_WORDS)  # features are unpacked when needed
            decoding.append((time.perf_counter() - started) * 1000)
    over_get = ratio(took["fetch"][1:], took["get"][1:])
    return {
        "bytes": len(value),
        "fetch_us": 1e6 * statistics.median(took["fetch"][1:]),
        "get_us": 1e6 * statistics.median(took["get"][1:]),
        "ratio": str(over_get),
        "decode_us": statistics.median(decoding),
    }


async def _each(call: Callable[[], Awaitable[object]], times: int = 2000) -> float:
    started = time.perf_counter()
    for _ in range(times):
        await call()
    return (time.perf_counter() - started) / times


async def bytes_of_users(num_users: int, num_features: int, item: str) -> float:
    """On a server of their own: memory that another case had freed is memory that this one would not grow by."""
    draw = random.Random(2026)
    with local_server.start() as server, redis.Redis.from_url(server.url) as client:
        async with aclosing(RedisStore.connect(server.url, timeout_s=10)) as store:
            await store.append(clicks_of("first", 1000, num_features, draw))  # the words of the deployment
            before = _settled_memory(client)
            for user in range(num_users):
                await store.append(clicks_of(f"user {user}", 50, num_features, draw, item=item))
            tags = list(client.scan_iter(match="*:e*", count=10_000))
            for start in range(0, len(tags), 1000):
                client.delete(*tags[start : start + 1000])
            return (_settled_memory(client) - before) / num_users


async def bytes_of_events(num_users: int, events_a_day: int) -> float:
    with local_server.start() as server, redis.Redis.from_url(server.url) as client:
        async with aclosing(RedisStore.connect(server.url, timeout_s=10)) as store:
            await store.append([Mark(type="impression", event_id="first", owner="first", ts=START)])
            before = _settled_memory(client)
            for user in range(num_users):
                await store.append(
                    [
                        Mark(type="impression", event_id=f"{n}", owner=f"user {user}", ts=START + n)
                        for n in range(events_a_day)
                    ]
                )
            return (_settled_memory(client) - before) / num_users / events_a_day


def _settled_memory(client: redis.Redis) -> int:
    time.sleep(0.5)  # what was deleted is freed in the background
    return int(client.info("memory")["used_memory"])


async def events_a_second(url: str, rounds: int, calls: int = 200) -> Facts:
    decoder, now = EventsDecoder(max_age_s=1e9), time.time()
    walls, processor = [], []
    async with aclosing(RedisStore.connect(url, timeout_s=10)) as store:
        recorder = EventRecorder(store=store, arm_of=lambda _ts, _unit: "arm", metrics=Metrics())
        for number in range(1 + rounds):
            bodies = [_body(number * calls + call, now) for call in range(calls)]
            started, busy = time.perf_counter(), time.process_time()
            for body in bodies:
                events, rejected = decoder.decode(body)
                outcomes = await recorder.record(list(events.values()))
                msgspec.json.encode(receipt_of(events, outcomes, rejected))
            walls.append((time.perf_counter() - started) / calls / 100)
            processor.append((time.process_time() - busy) / calls / 100)
    return {
        "a_second": 1 / statistics.median(walls[1:]),
        "slowest_round": 1 / max(walls[1:]),
        "processor_us": 1e6 * statistics.median(processor[1:]),
    }


def _body(call: int, now: float) -> bytes:
    return msgspec.json.encode(
        [
            {
                "event_id": f"{call} {n}",
                "type": "click" if n % 10 == 0 else "impression",
                "ts": now - 1000 + call * 0.01,
                "user": f"user {(call * 37 + n) % 5000}",
                "item": f"ad{n}",
                "features": {"coins": n % 7} if n % 3 == 0 else {},
            }
            for n in range(100)
        ]
    )


async def measure(rounds: int, num_users: int) -> Facts:
    with local_server.start() as server:
        read = await reads(server.url, rounds)
        events = await events_a_second(server.url, rounds)
    users = {
        form: {count: await bytes_of_users(num_users, count, item) for count in TARGETS}
        for form, item in (("numbers of up to six digits", "%d"), ("ad and such a number", "ad%d"))
    }
    tags = {count: await bytes_of_events(num_users // 4, count) for count in (5, 20, 50, 200)}
    return {"read": read, "events": events, "bytes_of_users": users, "bytes_of_events": tags}


def report(facts: Facts) -> str:
    read, events = facts["read"], facts["events"]
    reading = (
        f"A prediction's read of 30 clicks with three features ({read['bytes']} bytes) takes {read['fetch_us']:.0f} us,"
        f" a bare GET of them {read['get_us']:.0f} us, ratio {read['ratio']} (asked at most 1.5); of it decoding"
        f" {read['decode_us']:.0f} us (asked under 40)."
    )
    taking = (
        f"Calls of 100 events, one under way: {events['a_second']:,.0f} events/s (slowest round"
        f" {events['slowest_round']:,.0f}), {events['processor_us']:.0f} us of the worker's processor an event."
    )
    of_users = _table(
        "a user of 50 clicks, ids",
        [f"{count} features" for count in TARGETS],
        {form: [f"{size / 1000:.2f} KB" for size in sizes.values()] for form, sizes in facts["bytes_of_users"].items()}
        | {"asked at most": [f"{size} KB" for size in TARGETS.values()]},
    )
    sizes = facts["bytes_of_events"]
    of_events = _table(
        "events of one user and day",
        [str(count) for count in sizes],
        {"bytes an event (asked at most 12)": [f"{size:.1f}" for size in sizes.values()]},
    )
    return "\n".join([reading, "", taking, "", *of_users, "", *of_events, ""])


def _table(corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    head = [f"| {corner} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    return head + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for store.md and store.json")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--users", type=int, default=2000)
    options = parser.parse_args(arguments)
    facts = asyncio.run(measure(options.rounds, options.users))
    options.out.mkdir(parents=True, exist_ok=True)
    text = report(facts)
    (options.out / "store.md").write_text(HEADING + text)
    (options.out / "store.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
