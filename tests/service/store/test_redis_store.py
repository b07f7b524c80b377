"""What is particular to Redis: the round trips and the layout."""

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from service.store.codec import (
    EMPTY_HISTORY,
    Click,
    behaviours_key,
    item_key,
    mark_key,
    pack_click,
    unpack_history,
    unpack_row,
    user_key,
)
from service.store.feature_store import MARK_TTL_S, StoreUnavailable
from service.store.redis_store import RedisStore
from tests.service.stores import click, past


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[RedisStore]:
    async with aclosing(RedisStore.connect(redis_url, timeout_s=5.0)) as store:
        yield store


@pytest.fixture
def server(redis_url: str):
    with redis.Redis.from_url(redis_url) as client:
        yield client


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
        items = [unpack_row(packed) for packed in fetched.items]

    assert (fetched.user, list(fetched.behaviours), items) == (None, [], [None])
    assert (
        sorted(record.message for record in caplog.records) == ["unreadable behaviours"] + ["unreadable features"] * 2
    )


@pytest.mark.parametrize(
    "rubbish", [b"", b"\x01", b"rubbish", EMPTY_HISTORY + b"\x00" * 40, EMPTY_HISTORY + b"\xff" * 40]
)
async def test_a_past_that_cannot_be_read_begins_anew(store: RedisStore, server: redis.Redis, rubbish: bytes):
    server.set(behaviours_key("u1"), rubbish)

    assert await store.append([click(1), click(2)]) == [True, True]

    assert await past(store) == [1, 2]


async def test_a_key_of_another_kind_is_refused_and_not_overwritten(store: RedisStore, server: redis.Redis):
    server.rpush(behaviours_key("u1"), "somebody else's")

    with pytest.raises(StoreUnavailable, match="refused"):
        await store.append([click(1)])

    assert await past(store) == []
    assert server.lrange(behaviours_key("u1"), 0, -1) == [b"somebody else's"]
    assert not server.exists(mark_key("u1", "e1"))


def test_a_record_whose_two_sizes_differ_is_not_read():
    first, second = pack_click(click(1)), pack_click(click(2))

    whole = unpack_history(EMPTY_HISTORY + first + second, before=1e12, limit=10)
    broken = unpack_history(EMPTY_HISTORY + b"\x00\x00" + first[2:] + second, before=1e12, limit=10)

    assert [event.ts for event in whole] == [1, 2]
    assert list(broken) == []


@given(
    numbers=st.lists(st.integers(0, 10**6), max_size=4),
    at=st.integers(0, 300),
    byte=st.binary(max_size=3),
    removed=st.integers(0, 3),
)
def test_no_bytes_make_unpacking_fail(numbers: list[int], at: int, byte: bytes, removed: int):
    packed = EMPTY_HISTORY + b"".join(pack_click(click(number, brand="a")) for number in sorted(numbers))
    broken = packed[:at] + byte + packed[at + removed :]

    events = unpack_history(broken, before=1e300, limit=10)

    assert len(events) <= 10
    assert unpack_row(byte) is None or isinstance(unpack_row(byte), dict)


async def test_a_thousand_clicks_of_one_second_newest_first_do_not_keep_the_server_from_others(store: RedisStore):
    """One by one, each walking past all before it byte by byte, they took it half a minute."""
    items = ["x" * 250 + f"{number:06d}" for number in range(1000, 0, -1)]

    new = await store.append([Click(event_id=item, user="u1", item=item, ts=5.0) for item in items])

    assert all(new)
    assert (await store.fetch("u1", [], before=6.0, limit=200)).behaviours.items == items[199::-1]


async def test_stored_features_that_are_no_text_are_taken_for_absent(store: RedisStore, server: redis.Redis):
    server.set(item_key("ad1"), b"\x81\xa5brand\xa1\xff")
    server.set(user_key("u1"), b"\x81\xa6gender\xa1\xff")

    assert await store.append([click(1)]) == [True]
    assert (await store.fetch("u1", [], before=1.0, limit=1)).user is None
