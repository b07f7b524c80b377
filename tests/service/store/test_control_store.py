"""One contract for both control stores: compare and set, and the audit trail; and what is particular to Redis."""

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
import redis

from service.settings import SettingsError
from service.store.control_store import (
    MAX_AUDIT_ENTRIES,
    ControlDocument,
    ControlState,
    ControlStore,
    MemoryControlStore,
    PastShares,
)
from service.store.feature_store import StoreUnavailable
from service.store.keys import KeySpace
from service.store.local_server import RedisServer
from service.store.redis_control_store import RedisControlStore


def document(version: int = 1, *, one: float = 50, changed_by: str = "alice") -> ControlDocument:
    return ControlDocument(
        version=version,
        revision=secrets.token_hex(8),
        experiment="test",
        fingerprint="f",
        state=ControlState(
            shares={"one": one, "two": 100 - one}, shadow={"new": 10}, killed=["two"], models={"one": ["v2", "v1"]}
        ),
        past=[PastShares(until=1.5, shares={"one": 100, "two": 0}, killed=[])],
        changed_by=changed_by,
        changed_at=float(version),
    )


@pytest.fixture(params=["memory", "redis", "cluster"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[ControlStore]:
    if request.param == "memory":
        yield MemoryControlStore()
        return
    url = request.getfixturevalue("redis_url") if request.param == "redis" else request.getfixturevalue("cluster").url
    async with aclosing(RedisControlStore.connect(url, experiment="test", timeout_s=5)) as opened:
        yield opened


async def test_a_new_store_is_empty(store: ControlStore) -> None:
    assert await store.read() is None
    assert await store.revision() is None
    assert await store.audit() == []


async def test_what_is_written_is_read_as_it_was(store: ControlStore) -> None:
    first = document()

    written = await store.replace(first, expected=None)

    assert written
    assert await store.read() == first
    assert await store.revision() == first.revision


async def test_only_the_document_that_is_expected_is_replaced(store: ControlStore) -> None:
    first, second, third = document(1), document(2), document(3)
    await store.replace(first, expected=None)

    refused = [
        await store.replace(second, expected=None),
        await store.replace(second, expected=document(1)),  # of the same version, but another one
        await store.replace(second, expected=third),
    ]
    untouched = await store.read()
    written = await store.replace(second, expected=first)
    late = await store.replace(third, expected=first)

    assert (refused, untouched, written, late) == ([False] * 3, first, True, False)
    assert await store.read() == second


async def test_a_store_that_is_empty_has_no_document_to_be_replaced(store: ControlStore) -> None:
    assert not await store.replace(document(2), expected=document(1))
    assert await store.read() is None
    assert await store.audit() == []


async def test_of_writers_at_once_exactly_one_wins_each_version(store: ControlStore) -> None:
    current = document()
    await store.replace(current, expected=None)

    for version in range(2, 6):
        writers = [document(version, one=share) for share in range(8)]
        won = await asyncio.gather(*(store.replace(writer, expected=current) for writer in writers))
        assert won.count(True) == 1
        current = writers[won.index(True)]
        assert await store.read() == current

    assert [entry.version for entry in await store.audit()] == [5, 4, 3, 2, 1]


async def test_the_audit_trail_is_of_what_was_written_the_latest_first(store: ControlStore) -> None:
    first, second = document(1), document(2, one=60, changed_by="bob")
    await store.replace(first, expected=None)
    await store.replace(second, expected=first)
    await store.replace(document(3), expected=first)

    after, begun = await store.audit()

    assert (after.version, after.changed_by, after.changed_at) == (2, "bob", 2.0)
    assert (after.before, after.after) == (first.state, second.state)
    assert (begun.version, begun.before, begun.after) == (1, None, first.state)


async def test_the_audit_trail_is_bounded(store: ControlStore) -> None:
    current = None
    for version in range(1, MAX_AUDIT_ENTRIES + 6):
        after = document(version)
        await store.replace(after, expected=current)
        current = after

    trail = await store.audit()

    assert [entry.version for entry in trail] == list(range(MAX_AUDIT_ENTRIES + 5, 5, -1))


async def test_a_change_that_is_sent_again_has_been_made_once(store: ControlStore) -> None:
    first, second = document(1), document(2)
    await store.replace(first, expected=None)

    assert await store.replace(second, expected=first)
    assert await store.replace(second, expected=first)  # its reply was lost
    assert await store.read() == second
    assert [entry.version for entry in await store.audit()] == [2, 1]


@pytest.fixture
async def on_redis(redis_url: str) -> AsyncIterator[RedisControlStore]:
    async with aclosing(RedisControlStore.connect(redis_url, experiment="test", timeout_s=5)) as opened:
        yield opened


async def test_experiments_do_not_share_a_document(on_redis: RedisControlStore, redis_url: str) -> None:
    await on_redis.replace(document(), expected=None)

    async with aclosing(RedisControlStore.connect(redis_url, experiment="other", timeout_s=5)) as other:
        assert await other.read() is None
        assert await other.audit() == []


async def test_a_document_never_expires(on_redis: RedisControlStore, redis_url: str) -> None:
    await on_redis.replace(document(), expected=None)

    with redis.Redis.from_url(redis_url) as client:
        keys: Any = client.keys("*")
        assert sorted(keys) == [b"cs:control:{test}", b"cs:control:{test}:audit"]
        assert [client.ttl(key) for key in keys] == [-1, -1]


async def test_a_document_of_a_later_program_is_read_without_what_is_new(
    on_redis: RedisControlStore, redis_url: str
) -> None:
    later = {**msgspec.to_builtins(document()), "colour": "red", "revision": "r"}

    with redis.Redis.from_url(redis_url) as client:
        client.hset(KeySpace("cs").control("test"), mapping={"revision": "r", "document": msgspec.json.encode(later)})

    read = await on_redis.read()
    assert read is not None
    assert (read.version, read.revision) == (1, "r")


@pytest.mark.parametrize("packed", [b"{", b"{}", b"[]", b"\xff"])
async def test_a_document_that_cannot_be_read_is_as_good_as_no_answer(
    packed: bytes, on_redis: RedisControlStore, redis_url: str
) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.hset(KeySpace("cs").control("test"), mapping={"revision": "r", "document": packed})

    with pytest.raises(StoreUnavailable, match="no ControlDocument that can be read"):
        await on_redis.read()


async def test_a_server_that_is_frozen_or_gone_is_unavailable_and_then_there_again(own_redis: RedisServer) -> None:
    async with aclosing(RedisControlStore.connect(own_redis.url, experiment="test", timeout_s=0.1)) as opened:
        await opened.replace(document(), expected=None)
        os.kill(own_redis.pid, signal.SIGSTOP)
        for call in (opened.revision(), opened.read(), opened.audit(), opened.replace(document(), expected=None)):
            with pytest.raises(StoreUnavailable, match="no answer from the store"):
                await call
        os.kill(own_redis.pid, signal.SIGCONT)

        read = await opened.read()

    assert read is not None
    async with aclosing(RedisControlStore.connect("redis://127.0.0.1:1", experiment="test", timeout_s=1)) as nowhere:
        with pytest.raises(StoreUnavailable, match="no answer from the store"):
            await nowhere.read()


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(SettingsError, match="setting redis_url"):
        RedisControlStore.connect("localhost:6379", experiment="test", timeout_s=1)
