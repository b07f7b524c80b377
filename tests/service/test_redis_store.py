"""What is particular to Redis: the round trips, the layout, and every way in which a server can fail."""

import asyncio
import logging
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from service import redis_server
from service.breaker import Breaker
from service.features import (
    MARK_TTL_S,
    NO_PAST,
    Click,
    StoreUnavailable,
    behaviours_key,
    item_key,
    mark_key,
    pack_click,
    unpack_past,
    unpack_row,
    user_key,
)
from service.redis_server import RedisServer
from service.redis_store import RedisStore

Eventually = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


def click(number: int, *, user: str = "u1", item: str = "ad1", **features: str) -> Click:
    return Click(event_id=f"e{number}", user=user, item=item, ts=float(number), features=features)


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[RedisStore]:
    async with aclosing(RedisStore.connect(redis_url, timeout_s=5.0)) as store:
        yield store


@pytest.fixture
def server(redis_url: str):
    with redis.Redis.from_url(redis_url) as client:
        yield client


async def past(store: RedisStore, user: str = "u1") -> list[float]:
    return [event.ts for event in (await store.fetch(user, [], before=1e12, limit=1000)).behaviours]


async def answers(store: RedisStore) -> bool:
    try:
        await store.fetch("u1", ["ad1"], before=1e12, limit=1)
    except StoreUnavailable:
        return False
    return True


def calls(server: redis.Redis) -> dict[str, int]:
    own = ("info", "config|resetstat", "ping", "hello", "client|setinfo")
    stats = server.info("commandstats").items()
    named = {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats}
    return {name: count for name, count in named.items() if name not in own}


async def test_a_fetch_is_one_command(store: RedisStore, server: redis.Redis):
    await store.ping()
    server.config_resetstat()

    await store.fetch("u1", [f"ad{number}" for number in range(1000)], before=1e12, limit=30)

    assert calls(server) == {"mget": 1}


async def test_a_click_is_its_items_features_and_one_script(store: RedisStore, server: redis.Redis):
    await store.append([click(1, brand="a")])
    server.config_resetstat()

    await store.append([click(2, brand="a")])

    assert calls(server) == {"mget": 1, "script|exists": 1, "evalsha": 1, "get": 1, "set": 2}


async def test_pasts_and_marks_expire_and_features_stay(store: RedisStore, server: redis.Redis):
    await store.put_users({"u1": {"age": 1}})
    await store.append([click(1)])
    await store.mark([("u1", "e2")])

    assert 30 * 86_400 - 60 < server.ttl(behaviours_key("u1")) <= 30 * 86_400
    assert MARK_TTL_S - 60 < server.ttl(mark_key("u1", "e1")) <= MARK_TTL_S
    assert MARK_TTL_S - 60 < server.ttl(mark_key("u1", "e2")) <= MARK_TTL_S
    assert server.ttl(user_key("u1")) == -1


async def test_a_click_still_in_the_past_is_known_after_its_mark_expired(store: RedisStore, server: redis.Redis):
    await store.append([click(1), click(2)])
    server.delete(mark_key("u1", "e1"))

    assert await store.append([click(1)]) == [False]
    assert await past(store) == [1, 2]


@given(user=st.text(), event_id=st.text())
def test_the_keys_of_a_user_share_a_slot_of_a_cluster(user: str, event_id: str):
    keys = [user_key(user), behaviours_key(user), mark_key(user, event_id)]

    assert len({key_slot(key.encode()) for key in keys}) == 1
    assert len(set(keys)) == 3


async def test_a_server_that_forgot_the_script_gets_it_again(store: RedisStore, server: redis.Redis):
    await store.append([click(1)])
    server.script_flush()

    assert await store.append([click(2)]) == [True]
    assert await past(store) == [1, 2]


async def test_what_cannot_be_read_is_absent_and_logged(
    store: RedisStore, server: redis.Redis, caplog: pytest.LogCaptureFixture
):
    await store.append([click(1)])
    for key in (behaviours_key("u1"), user_key("u1"), item_key("ad1")):
        server.set(key, b"\xc1 rubbish")

    with caplog.at_level(logging.WARNING):
        fetched = await store.fetch("u1", ["ad1"], before=1e12, limit=5)

    assert (fetched.user, list(fetched.behaviours), fetched.items) == (None, [], [None])
    assert (
        sorted(record.message for record in caplog.records) == ["unreadable behaviours"] + ["unreadable features"] * 2
    )


@pytest.mark.parametrize("rubbish", [b"", b"\x01", b"rubbish", NO_PAST + b"\x00" * 40, NO_PAST + b"\xff" * 40])
async def test_a_past_that_cannot_be_read_begins_anew(store: RedisStore, server: redis.Redis, rubbish: bytes):
    server.set(behaviours_key("u1"), rubbish)

    assert await store.append([click(1), click(2)]) == [True, True]

    assert await past(store) == [1, 2]


def test_a_record_whose_two_sizes_differ_is_not_read():
    first, second = pack_click(click(1)), pack_click(click(2))

    whole = unpack_past(NO_PAST + first + second, before=1e12, limit=10)
    broken = unpack_past(NO_PAST + b"\x00\x00" + first[2:] + second, before=1e12, limit=10)

    assert [event.ts for event in whole] == [1, 2]
    assert list(broken) == []


@given(
    numbers=st.lists(st.integers(0, 10**6), max_size=4),
    at=st.integers(0, 300),
    byte=st.binary(max_size=3),
    removed=st.integers(0, 3),
)
def test_no_bytes_make_unpacking_fail(numbers: list[int], at: int, byte: bytes, removed: int):
    packed = NO_PAST + b"".join(pack_click(click(number, brand="a")) for number in sorted(numbers))
    broken = packed[:at] + byte + packed[at + removed :]

    events = unpack_past(broken, before=1e300, limit=10)

    assert len(events) <= 10
    assert unpack_row(byte) is None or isinstance(unpack_row(byte), dict)


async def test_only_a_closed_connection_is_retried_and_every_wait_is_bounded():
    async with aclosing(RedisStore.connect("redis://localhost:6379", timeout_s=0.02)) as store:
        connection = store._client.connection_pool.make_connection()

        assert (connection.socket_timeout, connection.socket_connect_timeout) == (0.02, 0.05)
        assert connection.retry.get_retries() == 1
        assert set(connection.retry._supported_errors) == {redis.exceptions.ConnectionError}


async def test_callers_beyond_the_connections_wait_a_bounded_time_and_do_not_trip_the_breaker(
    own_redis: RedisServer, eventually: Eventually
):
    async with aclosing(RedisStore.connect(own_redis.url, timeout_s=0.2, connections=1)) as store:
        await eventually(lambda: answers(store))
        os.kill(own_redis.pid, signal.SIGSTOP)

        told = await asyncio.gather(
            *(store.mark([("u1", f"e{number}")]) for number in range(20)), return_exceptions=True
        )
        os.kill(own_redis.pid, signal.SIGCONT)

        assert all(isinstance(each, StoreUnavailable) for each in told)
        assert sum("connections to the store are busy" in str(each) for each in told) >= 18
        assert not store._breaker.is_open


async def test_a_dead_server_is_said_to_be_unavailable_at_once():
    async with aclosing(RedisStore.connect("unix:///nowhere/redis.sock")) as store:
        started = time.monotonic()
        for call in (
            store.ping(),
            store.fetch("u1", [], before=1, limit=1),
            store.append([click(1)]),
            store.mark([("u1", "e1")]),
            store.put_items({"a": {}}),
        ):
            with pytest.raises(StoreUnavailable, match="no answer from the store"):
                await call

        assert time.monotonic() - started < 1


async def test_an_event_loop_that_stood_still_is_no_silence_of_the_server(redis_url: str):
    async with aclosing(RedisStore.connect(redis_url, timeout_s=0.05)) as store:
        await store.put_users({"u1": {"age": 1}})
        await store.ping()
        wire = store._wire._open
        fetches = [asyncio.create_task(store.fetch("u1", [], before=1, limit=1)) for _ in range(8)]
        await asyncio.sleep(0)  # they are sent

        time.sleep(0.1)  # noqa: ASYNC251 - as a long callback or a throttled process does
        answers = await asyncio.gather(*fetches)

        assert all(answer.user == {"age": 1} for answer in answers)
        assert store._wire._open is wire
        assert not store._breaker.is_open


async def test_a_server_far_away_is_connected_to_though_that_takes_longer_than_an_answer_may(
    redis_url: str, eventually: Eventually
):
    one_way_s = 0.02
    carried: list[asyncio.Future[Any]] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            await asyncio.sleep(one_way_s)
            writer.write(data)
        writer.close()
        await writer.wait_closed()

    async def far(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(redis_url.removeprefix("unix://"))
        carried.append(asyncio.gather(carry(reader, back), carry(there, writer)))
        await carried[-1]

    proxy = await asyncio.start_server(far, "127.0.0.1", 0)
    port = proxy.sockets[0].getsockname()[1]
    async with aclosing(RedisStore.connect(f"redis://127.0.0.1:{port}/1", timeout_s=3 * one_way_s)) as store:
        await eventually(lambda: answers(store))

        assert all([await answers(store) for _ in range(3)])
    await asyncio.gather(*carried)
    proxy.close()


async def test_a_frozen_server_costs_five_short_waits_and_then_none_until_it_thaws(
    own_redis: RedisServer, eventually: Eventually
):
    async with aclosing(RedisStore.connect(own_redis.url, timeout_s=0.1)) as store:
        await eventually(lambda: answers(store))
        os.kill(own_redis.pid, signal.SIGSTOP)

        for _ in range(5):
            with pytest.raises(StoreUnavailable, match="no answer"):
                await store.fetch("u1", [], before=1, limit=1)
        started = time.monotonic()
        for _ in range(100):
            with pytest.raises(StoreUnavailable, match="stopped answering"):
                await store.fetch("u1", [], before=1, limit=1)
        hundred_s = time.monotonic() - started
        os.kill(own_redis.pid, signal.SIGCONT)

        assert hundred_s < 0.1
        await eventually(lambda: answers(store))


async def test_a_killed_server_comes_back_with_what_it_had(eventually: Eventually):
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="clickserve-test-"))
        with redis_server.start(Path(folder), durable=True) as first:
            store = await stack.enter_async_context(aclosing(RedisStore.connect(first.url, timeout_s=1.0)))
            await store.append([click(1), click(2)])
            os.kill(first.pid, signal.SIGKILL)
            await eventually(lambda: _not(answers(store)))
        with redis_server.start(Path(folder), durable=True):
            await eventually(lambda: answers(store))

            assert await past(store) == [1, 2]
            assert await store.append([click(2), click(3)]) == [False, True]


async def test_a_restart_between_two_calls_goes_unnoticed():
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="clickserve-test-")))
        with redis_server.start(folder, durable=True) as first:
            store = await stack.enter_async_context(aclosing(RedisStore.connect(first.url, timeout_s=1.0)))
            await asyncio.gather(*(store.append([click(number)]) for number in range(8)))  # a pool of connections

        with redis_server.start(folder, durable=True):
            pasts = await asyncio.gather(*(past(store) for _ in range(8)))

        assert pasts == [list(range(8))] * 8


async def _not(answer: Awaitable[bool]) -> bool:
    return not await answer


async def test_a_full_server_refuses_clicks_and_still_answers(own_redis: RedisServer):
    async with aclosing(RedisStore.connect(own_redis.url, timeout_s=5.0)) as store:
        await store.append([click(1)])
        with redis.Redis.from_url(own_redis.url) as server:
            server.config_set("maxmemory", "1")

            for _ in range(10):  # more than the breaker's patience with silence
                with pytest.raises(StoreUnavailable, match="OutOfMemory"):
                    await store.append([click(2)])
            assert await past(store) == [1]
            server.config_set("maxmemory", "0")

        assert await store.append([click(2)]) == [True]


async def test_a_server_that_turned_read_only_refuses_clicks_and_still_answers(own_redis: RedisServer):
    async with aclosing(RedisStore.connect(own_redis.url, timeout_s=5.0)) as store:
        await store.append([click(1)])
        with redis.Redis.from_url(own_redis.url) as server:
            server.replicaof("127.0.0.1", "1")

            with pytest.raises(StoreUnavailable, match="ReadOnly"):
                await store.append([click(2)])
            assert not any(c.is_connected for c in store._client.connection_pool._available_connections)
            assert await past(store) == [1]
            server.replicaof("NO", "ONE")

        assert await store.append([click(2)]) == [True]


async def test_a_key_of_another_kind_is_refused_and_not_overwritten(store: RedisStore, server: redis.Redis):
    server.rpush(behaviours_key("u1"), "somebody else's")

    with pytest.raises(StoreUnavailable, match="refused"):
        await store.append([click(1)])

    assert await past(store) == []
    assert server.lrange(behaviours_key("u1"), 0, -1) == [b"somebody else's"]
    assert not server.exists(mark_key("u1", "e1"))


async def test_callers_that_give_up_never_mix_up_the_answers_of_others(redis_url: str):
    async with aclosing(RedisStore.connect(redis_url, timeout_s=5.0, connections=4)) as store:
        await store.put_users({str(number): {"id": number} for number in range(100)})
        chance = random.Random(1)

        async def asks(number: int) -> Any:
            fetched = await store.fetch(str(number), [], before=1, limit=1)
            assert fetched.user is not None
            return number, fetched.user["id"]

        for _ in range(50):
            tasks = [asyncio.create_task(asks(number)) for number in chance.sample(range(100), 20)]
            for _ in range(chance.randint(0, 12)):
                await asyncio.sleep(0)
            for task in chance.sample(tasks, 10):
                task.cancel()
            done: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)

            assert sum(isinstance(answer, asyncio.CancelledError) for answer in done) <= 10
            assert all(isinstance(answer, asyncio.CancelledError) or answer[0] == answer[1] for answer in done)


async def test_a_frozen_server_that_takes_no_more_bytes_costs_no_more_than_the_wait_for_an_answer(
    own_redis: RedisServer,
):
    """What its socket cannot hold stays with the sender, who must not wait until it can."""
    async with aclosing(RedisStore.connect(own_redis.url, timeout_s=0.05)) as store:
        assert await answers(store)
        opened: Any = store._wire._open
        transport = opened._connection._writer.transport
        os.kill(own_redis.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            async with asyncio.timeout(5):
                with pytest.raises(StoreUnavailable):
                    await store.fetch(None, [letter * 2**24 for letter in "abcd"], before=1.0, limit=1)
            assert time.monotonic() - began < 1
            assert transport.is_closing()
        finally:
            os.kill(own_redis.pid, signal.SIGCONT)
            transport.abort()  # which would otherwise send the rest first
            await asyncio.sleep(0)
        assert await answers(store)


async def test_what_is_sent_on_a_connection_that_was_just_lost_fails_at_once_and_is_sent_on_another(redis_url: str):
    async with aclosing(RedisStore.connect(redis_url, timeout_s=5.0)) as store:
        assert await answers(store)
        wire = store._wire
        lost = wire._open
        assert lost is not None
        await lost.aclose()

        with pytest.raises(redis.ConnectionError):
            await lost.ask([b"*1\r\n$4\r\nPING\r\n"], 0.5)
        assert not lost._connection.is_connected
        assert await answers(store)


async def test_a_breaker_opens_on_failures_in_a_row_only(eventually: Eventually):
    healthy = asyncio.Event()
    probes = 0

    async def probe() -> None:
        nonlocal probes
        probes += 1
        if not healthy.is_set():
            raise StoreUnavailable("still down")

    breaker = Breaker(probe, threshold=3, every_s=0)

    for tell in (breaker.failed, breaker.failed, breaker.succeeded, breaker.failed, breaker.failed):
        tell()
    assert not breaker.is_open
    breaker.failed()
    assert breaker.is_open
    await eventually(lambda: _is(lambda: probes > 3))
    assert breaker.is_open
    healthy.set()
    await eventually(lambda: _is(lambda: not breaker.is_open))
    breaker.failed()
    assert not breaker.is_open


async def test_a_breaker_closed_for_good_probes_no_more():
    async def probe() -> None:
        raise StoreUnavailable("down")

    breaker = Breaker(probe, threshold=1, every_s=0)
    breaker.failed()

    await breaker.aclose()

    assert len(asyncio.all_tasks()) == 1


async def _is(condition: Callable[[], bool]) -> bool:
    return condition()
