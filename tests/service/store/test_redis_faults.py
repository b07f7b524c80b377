"""Every way in which a Redis server and its connections can fail."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import redis

from service.store import local_server
from service.store.feature_store import Outcome, StoreUnavailable
from service.store.local_server import RedisServer
from service.store.redis_store import RedisStore
from tests.service.stores import answers, click, past

Eventually = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


def wire_of(store: RedisStore) -> Any:
    """The connection of the predictions, if it is open."""
    return store._reads.router._sender._connection._wire  # type: ignore[union-attr]


async def test_a_dead_server_is_said_to_be_unavailable_at_once():
    async with aclosing(RedisStore.connect("unix:///nowhere/redis.sock", timeout_s=0.05)) as store:
        started = time.monotonic()
        for call in (
            store.ping(),
            store.fetch("u1", [], before=1, limit=1),
            store.append([click(1)]),
            store.delete_user("u1", at=1.0),
            store.put_items({"a": {}}),
        ):
            with pytest.raises(StoreUnavailable, match="no answer from the store"):
                await call

        assert time.monotonic() - started < 1


async def test_an_event_loop_that_stood_still_is_no_silence_of_the_server(redis_url: str):
    async with aclosing(RedisStore.connect(redis_url, timeout_s=0.05)) as store:
        await store.put_users({"u1": {"age": 1}})
        await store.ping()
        wire = wire_of(store)
        fetches = [asyncio.create_task(store.fetch("u1", [], before=1, limit=1)) for _ in range(8)]
        await asyncio.sleep(0)  # they are sent

        time.sleep(0.1)  # noqa: ASYNC251 - as a long callback or a throttled process does
        answers = await asyncio.gather(*fetches)

        assert all(answer.user == {"age": 1} for answer in answers)
        assert wire is not None and wire_of(store) is wire
        assert not store._reads.breaker.is_open


async def test_a_server_far_away_is_connected_to_though_that_takes_longer_than_an_answer_may(
    redis_url: str, eventually: Eventually
):
    one_way_s = 0.08
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

        assert await answers(store)
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
        with local_server.start(Path(folder), durable=True) as first:
            store = await stack.enter_async_context(aclosing(RedisStore.connect(first.url, timeout_s=1.0)))
            await store.append([click(1), click(2)])
            os.kill(first.pid, signal.SIGKILL)
            await eventually(lambda: _not(answers(store)))
        with local_server.start(Path(folder), durable=True):
            await eventually(lambda: answers(store))

            assert await past(store) == [1, 2]
            assert await store.append([click(2), click(3)]) == [Outcome.KNOWN, Outcome.NEW]


async def test_a_restart_between_two_calls_goes_unnoticed():
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="clickserve-test-")))
        with local_server.start(folder, durable=True) as first:
            store = await stack.enter_async_context(aclosing(RedisStore.connect(first.url, timeout_s=1.0)))
            await asyncio.gather(*(store.append([click(number)]) for number in range(8)))

        with local_server.start(folder, durable=True):
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
                with pytest.raises(StoreUnavailable, match="the store refused: OOM"):
                    await store.append([click(2)])
            assert await past(store) == [1]
            server.config_set("maxmemory", "0")

        assert await store.append([click(2)]) == [Outcome.NEW]


async def test_a_server_that_turned_read_only_refuses_clicks_and_still_answers(own_redis: RedisServer):
    async with aclosing(RedisStore.connect(own_redis.url, timeout_s=5.0)) as store:
        await store.append([click(1)])
        with redis.Redis.from_url(own_redis.url) as server:
            server.replicaof("127.0.0.1", "1")

            with pytest.raises(StoreUnavailable, match="the store refused: READONLY"):
                await store.append([click(2)])
            assert await past(store) == [1]
            server.replicaof("NO", "ONE")

        assert await store.append([click(2)]) == [Outcome.NEW]


async def test_callers_that_give_up_never_mix_up_the_answers_of_others(redis_url: str):
    async with aclosing(RedisStore.connect(redis_url, timeout_s=5.0)) as store:
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
        wire = wire_of(store)
        assert wire is not None
        transport = wire.transport
        os.kill(own_redis.pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(20):  # no answer would come at all
                with pytest.raises(StoreUnavailable):
                    await store.fetch(None, [letter * 2**24 for letter in "abcd"], before=1.0, limit=1)
            assert transport.is_closing()
        finally:
            os.kill(own_redis.pid, signal.SIGCONT)
            transport.abort()  # which would otherwise send the rest first
            await asyncio.sleep(0)
        assert await answers(store)


async def test_what_is_sent_on_a_connection_that_was_just_lost_is_sent_on_another(redis_url: str):
    async with aclosing(RedisStore.connect(redis_url, timeout_s=5.0)) as store:
        await store.put_users({"u1": {"age": 1}})
        assert await answers(store)
        lost = wire_of(store)
        assert lost is not None
        lost.transport.abort()  # the loss itself is heard of a turn of the event loop later

        fetched = await asyncio.gather(*(store.fetch("u1", [], before=1, limit=1) for _ in range(8)))

        assert [answer.user for answer in fetched] == [{"age": 1}] * 8
        assert wire_of(store) not in (None, lost)
        assert not store._reads.breaker.is_open
