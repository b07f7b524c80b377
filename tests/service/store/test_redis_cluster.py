"""Commands to a Cluster of real servers, whose slots move while they are asked, and whose servers die and freeze."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

from service.store import redis_cluster
from service.store.faults import Fault
from service.store.local_cluster import LocalCluster, LocalServer
from service.store.redis_connection import ReplyError, packed
from service.store.redis_router import RedisRouter
from service.store.redis_topology import NUM_SLOTS, ClusterMap
from service.store.redis_url import Address
from tests.service.store.fake_server import Connection, FakeServer, listening, pretending
from tests.service.store.router_client import BUDGET_S, Client, opened

Eventually = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


def keys_of(cluster: LocalCluster, place: int) -> list[str]:
    """Some keys whose slots are the place's third of them."""
    keys = (f"k{number}" for number in range(10_000))
    return [key for key, _ in zip((k for k in keys if key_slot(k.encode()) // 5462 == place), range(20), strict=False)]


def calls(server: LocalServer, command: str) -> int:
    """How often the server was asked this."""
    return int(server.ask("INFO", "commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


async def test_each_key_goes_to_the_primary_of_its_slot_on_one_connection(cluster: LocalCluster):
    async with opened(cluster.url, timeout_s=5.0) as client:
        await client.router.check()
        keys = [key for place in range(3) for key in keys_of(cluster, place)]
        await asyncio.gather(*(client.set(key, key) for key in keys))
        assert await asyncio.gather(*(client.get(key) for key in keys)) == [key.encode() for key in keys]

        assert client.router.state.addresses == tuple(
            sorted(f"127.0.0.1:{server.port}" for server in cluster.primaries)
        )
        assert client.router.slot(b"user:{u1}:a") == client.router.slot(b"item:{u1}:b") == key_slot(b"u1")
    assert sum(server.ask("DBSIZE") for server in cluster.primaries) == len(keys)


async def test_a_map_that_is_out_of_date_costs_a_redirection_and_no_caller_anything(cluster: LocalCluster):
    async with opened(cluster.url, timeout_s=5.0) as client:
        await client.set("k", "v")
        cluster_map = client.router.topology
        assert isinstance(cluster_map, ClusterMap)
        slot = key_slot(b"k")
        right = cluster_map.primary(slot)
        wrong = next(address for address in cluster_map.primaries if address != right)
        for each in range(NUM_SLOTS):
            cluster_map.move(each, wrong)

        assert await client.get("k") == b"v"
        assert cluster_map.primary(slot) == right


async def test_while_a_slot_migrates_every_read_and_write_of_it_is_answered_and_none_is_lost(cluster: LocalCluster):
    source, target = cluster.primaries[0], cluster.primaries[1]
    ids = [server.ask("CLUSTER", "MYID").decode() for server in (source, target)]
    tag = next(number for number in range(1000) if _serves(source, key_slot(b"%d" % number)))
    slot = key_slot(b"%d" % tag)
    async with opened(cluster.url, timeout_s=5.0) as client:
        written = {f"{{{tag}}}{number}": 0 for number in range(50)}
        for key in written:
            await client.set(key, "0")
        has_moved = False

        async def write_and_read(key: str) -> None:
            while not has_moved:
                written[key] += 1
                await client.set(key, str(written[key]))
                assert await client.get(key) == str(written[key]).encode()

        load = asyncio.gather(*(write_and_read(key) for key in written))
        await asyncio.to_thread(target.ask, "CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
        await asyncio.to_thread(source.ask, "CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
        for key in written:
            await asyncio.to_thread(source.ask, "MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
        new = f"{{{tag}}}new"
        await client.set(new, "v")  # the target has it, and the other key is nowhere
        both = packed(b"MGET", new.encode(), f"{{{tag}}}none".encode())
        assert await client.router.ask(new.encode(), both) == [b"v", None]
        for server in (target, source):
            await asyncio.to_thread(server.ask, "CLUSTER", "SETSLOT", slot, "NODE", ids[1])
        has_moved = True
        await load

        assert calls(target, "asking") > 0
        assert min(written.values()) > 0
        for key, value in written.items():
            assert await client.get(key) == target.ask("GET", key) == str(value).encode()


def _serves(server: LocalServer, slot: int) -> bool:
    slots = server.ask("CLUSTER", "SLOTS")
    return any(first <= slot <= last and entry[1] == server.port for first, last, entry, *_ in slots)


async def test_a_failover_by_hand_is_followed_without_an_error(cluster: LocalCluster, eventually: Eventually):
    old = next(server for server in cluster.primaries if len(server.ask("ROLE")[2]) == 1)
    (replica,) = (server for server in cluster.servers if server not in cluster.primaries)
    key = next(key for place in range(3) for key in keys_of(cluster, place) if _serves(old, key_slot(key.encode())))
    async with opened(cluster.url, timeout_s=5.0) as client:
        await client.set(key, "0")
        replica.ask("CLUSTER", "FAILOVER")
        count = 0

        async def is_replaced() -> bool:
            nonlocal count
            count += 1
            await client.set(key, str(count))
            assert await client.get(key) == str(count).encode()
            return bool(replica.ask("ROLE")[0] == b"master")

        await eventually(is_replaced)
        await client.set(key, "last")
        assert replica.ask("GET", key) == b"last"


async def test_a_frozen_primary_costs_its_slots_some_budgets_and_the_others_nothing(
    cluster: LocalCluster, eventually: Eventually
):
    frozen = next(server for server in cluster.primaries if not server.ask("ROLE")[2])
    keys = [key for place in range(3) for key in keys_of(cluster, place)]
    dead = next(key for key in keys if _serves(frozen, key_slot(key.encode())))
    alive = [key for key in keys if not _serves(frozen, key_slot(key.encode()))]
    async with opened(cluster.url, timeout_s=0.05) as client:
        await client.router.check()
        await eventually(partial(_answers, client, keys))
        os.kill(frozen.pid, signal.SIGSTOP)
        try:
            for _ in range(redis_cluster.REST_AFTER):
                with pytest.raises(TimeoutError):
                    await client.get(dead)
            started = time.monotonic()
            for _ in range(100):
                with pytest.raises((TimeoutError, ConnectionError)):
                    await client.get(dead)
            hundred_s = time.monotonic() - started
            replies = await asyncio.gather(*(client.get(key) for key in alive))
        finally:
            os.kill(frozen.pid, signal.SIGCONT)

        assert replies == [None] * len(alive)
        assert hundred_s < 0.5  # one or two that try whether it is back
        assert not client.breaker.is_open
        await eventually(partial(_answers, client, keys))


async def test_a_killed_primary_costs_its_slots_until_its_replica_serves_and_the_others_nothing(
    cluster: LocalCluster, eventually: Eventually
):
    killed = next(server for server in cluster.primaries if len(server.ask("ROLE")[2]) == 1)
    keys = [key for place in range(3) for key in keys_of(cluster, place)]
    dead = [key for key in keys if _serves(killed, key_slot(key.encode()))]
    alive = [key for key in keys if key not in dead]
    async with opened(cluster.url) as client:
        await asyncio.gather(*(client.set(key, key) for key in keys))
        assert int(killed.ask("WAIT", 1, 5000)) == 1
        killed.kill()
        waits_s = []

        async def reads_all_again() -> bool:
            assert await asyncio.gather(*(client.get(key) for key in alive)) == [key.encode() for key in alive]
            started = time.monotonic()
            replies = await asyncio.gather(*(client.get(key) for key in dead), return_exceptions=True)
            waits_s.append(time.monotonic() - started)
            assert all(
                reply == key.encode() or isinstance(reply, ReplyError | OSError)
                for key, reply in zip(dead, replies, strict=True)
            )
            return not any(isinstance(reply, Exception) for reply in replies)

        assert not await reads_all_again()
        failure = client.router.state.last_failure
        assert failure is not None and failure.fault is Fault.CONNECTION
        await eventually(reads_all_again)

        assert max(waits_s) < BUDGET_S + 0.5
        assert not client.breaker.is_open
        for key in dead:
            await client.set(key, "again")


async def _answers(client: Client, keys: list[str]) -> bool:
    replies = await asyncio.gather(*(client.get(key) for key in keys), return_exceptions=True)
    return not any(isinstance(reply, Exception) for reply in replies)


# --- what a Cluster may say, said by one server that pretends to be all of it ---


def url_of(server: FakeServer) -> str:
    return f"redis+cluster://127.0.0.1:{server.port}"


@settings(max_examples=40)
@given(
    fates=st.lists(st.lists(st.sampled_from(["MOVED", "ASK", "TRYAGAIN", "LOADING", "lost"]), max_size=4), max_size=20),
    departures=st.sets(st.integers(0, 20)),
)
async def test_every_caller_gets_its_own_reply_once_wherever_the_cluster_sends_its_command(
    fates: list[list[str]], departures: set[int]
):
    """A command is redirected, put off or lost some times, by either of two servers, before it is answered."""
    remaining = {b"%d" % number: list(fate) for number, fate in enumerate(fates)}
    num_faults = sum(fate.count("lost") + fate.count("LOADING") for fate in fates)
    replies: dict[int, list[Any]] = {number: [] for number in range(len(fates))}
    all_replied = asyncio.Event()
    servers: list[FakeServer] = []

    def script(connection: Connection, command: list[bytes]) -> None:
        if command[0] == b"ASKING":
            connection.reply(b"+OK")
            return
        key = command[1]
        fate = remaining[key].pop(0) if remaining[key] else ""
        port = connection.transport.get_extra_info("sockname")[1]
        other = next(server.port for server in servers if server.port != port)
        if fate == "lost":
            connection.transport.abort()
        elif fate in {"MOVED", "ASK"}:
            connection.reply(b"-%b %d 127.0.0.1:%d" % (fate.encode(), key_slot(key), other))
        elif fate:
            connection.reply(f"-{fate} not now".encode())
        else:
            connection.reply(b"*1\r\n$%d\r\n%b" % (len(key), key))

    def on_reply(number: int, reply: Any) -> None:
        replies[number].append(reply)
        if all(replies.values()):
            all_replied.set()

    async with listening(pretending(script)) as one, listening(pretending(script)) as other:
        servers += [one, other]
        async with opened(url_of(one), timeout_s=10.0) as client:
            for number in range(len(fates)):
                timeout_s = 0.0 if number in departures else None
                command = packed(b"MGET", b"%d" % number)
                client.router.send(b"%d" % number, command, partial(on_reply, number), timeout_s=timeout_s)
            if fates:
                async with asyncio.timeout(20):
                    await all_replied.wait()

    for number, (reply,) in replies.items():
        assert (
            reply == [b"%d" % number]
            or (number in departures and isinstance(reply, TimeoutError | ConnectionError))
            or (num_faults >= redis_cluster.REST_AFTER and isinstance(reply, ReplyError | ConnectionError))
        )


@pytest.mark.parametrize(
    ("refusal", "fault"),
    [
        (b"-CLUSTERDOWN The cluster is down", Fault.CLUSTERDOWN),
        (b"-LOADING Valkey is loading the dataset in memory", Fault.LOADING),
        (b"-MASTERDOWN Link with MASTER is down", Fault.MASTERDOWN),
    ],
)
async def test_what_passes_is_waited_for_within_the_budget_and_told_by_its_cause(
    refusal: bytes, fault: Fault, eventually: Eventually
):
    num_refused = 0

    def refuse_twice(connection: Connection, command: list[bytes]) -> None:
        nonlocal num_refused
        num_refused += 1
        connection.reply(refusal if num_refused <= 2 else b"*1\r\n$1\r\nv")

    async with listening(pretending(refuse_twice)) as server, opened(url_of(server)) as client:
        assert await client.get() == b"v"
        assert num_refused == 3

        server.script = pretending(lambda connection, _: connection.reply(refusal))
        for _ in range(10):
            assert await client.fault(client.get()) is fault
        assert client.breaker.is_open
        server.script = pretending(lambda connection, _: connection.reply(b"*1\r\n$1\r\nv"))

        await eventually(client.closed)
        await eventually(client.reads)


async def test_a_slot_that_nobody_serves_costs_its_own_callers_a_budget_and_the_others_nothing():
    def refuse_one(connection: Connection, command: list[bytes]) -> None:
        is_lost = command[1] == b"lost"
        connection.reply(b"-CLUSTERDOWN Hash slot not served" if is_lost else b"*1\r\n$1\r\nv")

    async with listening(pretending(refuse_one)) as server, opened(url_of(server), timeout_s=0.02) as client:
        await client.router.check()
        for _ in range(10):
            assert await client.fault(client.get("lost")) is Fault.CLUSTERDOWN
        assert await client.get() == b"v"
        assert not client.breaker.is_open


async def test_keys_apart_during_a_migration_are_waited_for_and_refused_in_time():
    refusal = b"-TRYAGAIN Multiple keys request during rehashing of slot"
    script = packed(b"EVALSHA", b"sha", b"2", b"{k}1", b"{k}2")
    async with (
        listening(pretending(lambda connection, _: connection.reply(refusal))) as server,
        opened(url_of(server), timeout_s=0.05) as client,
    ):
        started = time.monotonic()
        with pytest.raises(ReplyError, match="TRYAGAIN"):
            await client.router.ask(b"{k}1", script)

        assert 0.05 <= time.monotonic() - started < 0.5
        assert len(server.connections[-1].commands) > 2


async def test_a_cluster_that_sends_commands_round_in_circles_is_refused_to_follow():
    def redirect(connection: Connection, command: list[bytes]) -> None:
        port = connection.transport.get_extra_info("sockname")[1]
        connection.reply(b"+OK" if command == [b"ASKING"] else b"-ASK 1 127.0.0.1:%d" % port)

    async with listening(pretending(redirect)) as server, opened(url_of(server), timeout_s=5.0) as client:
        with pytest.raises(ReplyError, match="ASK 1"):
            await client.get()

        commands = [command for connection in server.connections for command in connection.commands]
    assert commands.count([b"MGET", b"k"]) == 1 + redis_cluster.MAX_REDIRECTIONS
    assert commands.count([b"ASKING"]) == redis_cluster.MAX_REDIRECTIONS


@pytest.mark.parametrize(
    "reply", [b"-", b"-MOVED", b"-MOVED here", b"-ASK x y:z", b"-ASK 1 h:999999", b"-MOVED 1 h:70000", b"- ASK 1 h:1"]
)
async def test_a_refusal_that_cannot_be_read_is_handed_on(reply: bytes):
    async with (
        listening(pretending(lambda connection, _: connection.reply(reply))) as server,
        opened(url_of(server), timeout_s=5.0) as client,
    ):
        with pytest.raises(ReplyError) as refused:
            await client.get()

    assert str(refused.value).encode() == reply[1:]


async def test_an_address_without_a_host_is_that_of_the_server_which_gives_it():
    async with listening(pretending(lambda connection, _: connection.reply(b"*1\r\n$1\r\nv"))) as new:

        def moved(connection: Connection, command: list[bytes]) -> None:
            connection.reply(b"-MOVED %d :%d" % (key_slot(command[1]), new.port))

        async with listening(pretending(moved)) as old, opened(url_of(old), timeout_s=5.0) as client:
            assert await client.get() == b"v"


async def test_a_server_that_left_the_cluster_is_hung_up_on(eventually: Eventually):
    async with opened("redis+cluster://127.0.0.1:1") as client:
        sender: Any = client.router._sender
        sender._node(Address("127.0.0.1", 2))
        client.router.topology.move(0, Address("127.0.0.1", 3))  # type: ignore[union-attr]

        sender._node(Address("127.0.0.1", 3))

        assert list(sender._nodes) == [Address("127.0.0.1", 3)]


async def test_a_closed_router_answers_whoever_waits():
    replies: list[Any] = []
    async with listening(pretending(lambda *_: None)) as server:
        router = RedisRouter(url_of(server), timeout_s=5.0, on_outcome=lambda _: None)
        router.send(b"k", packed(b"MGET", b"k"), replies.append)  # the map is not known yet
        await router.check()
        router.send(b"k", packed(b"MGET", b"k"), replies.append)
        await server.receives(3)
        await router.aclose()
        router.send(b"k", packed(b"MGET", b"k"), replies.append)

    assert [type(reply) for reply in replies] == [ConnectionError] * 3
