"""What is particular to Redis: the round trips and the layout."""

import logging
import random
from collections.abc import AsyncIterator
from contextlib import aclosing

import msgspec
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from service.store.codec import EMPTY_HISTORY, NO_WORDS, Click, Mark, pack_click, unpack_history, unpack_row
from service.store.feature_store import EVENT_TAGS_TTL_S, Outcome
from service.store.keys import KeySpace
from service.store.redis_store import Limits, RedisStore
from service.store.words import code_of
from tests.service.stores import click, past

KEYS = KeySpace("cs")
PAST = KEYS.behaviours("u1")


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


async def test_a_call_of_events_is_its_items_features_and_one_script(store: RedisStore, server: redis.Redis):
    await store.append([click(1, brand="nike")])
    server.config_resetstat()

    events: list[Click | Mark] = [
        click(2, brand="nike"),
        click(1, user="u2"),
        Mark(type="impression", event_id="i", owner="u3", ts=1.0),
    ]
    await store.append(events)

    outside = {"mget": 1, "hlen": 1, "evalsha": 1}
    inside = {"get": 5, "set": 5}  # three tag lists, one of them known, and two pasts
    assert calls(server) == outside | inside


async def test_everything_that_can_grow_expires(store: RedisStore, server: redis.Redis):
    await store.put_users({"u1": {"age": 1}})
    await store.put_items({"ad1": {"age": 1}})
    await store.append([click(1, brand="nike")])

    ttls = {key.decode(): server.ttl(key) for key in server.scan_iter()}

    day = 86_400
    assert 2 * day == EVENT_TAGS_TTL_S
    assert {key: ttl if ttl < 0 else round(ttl / day) for key, ttl in ttls.items()} == {
        PAST: 30,
        KEYS.event_tags("u1", 0): 2,
        KEYS.profile("u1"): 90,
        KEYS.item("ad1"): 90,
        # Bounded by themselves; words are needed as long as any past is there.
        KEYS.words: -1,
        KEYS.item_changes: -1,
    }


async def test_a_click_still_in_the_past_is_known_after_its_tag_expired(store: RedisStore, server: redis.Redis):
    await store.append([click(1), click(2)])
    server.delete(KEYS.event_tags("u1", 0))

    assert await store.append([click(1)]) == [Outcome.KNOWN]
    assert await past(store) == [1, 2]


@given(user=st.text(), day=st.integers(0, 10**6))
def test_the_keys_of_a_user_share_a_slot_of_a_cluster(user: str, day: int):
    keys = [KEYS.profile(user), KEYS.behaviours(user), KEYS.event_tags(user, day)]

    assert len({key_slot(key.encode()) for key in keys}) == 1
    assert len(set(keys)) == 3


async def test_deployments_on_one_server_do_not_see_each_other(redis_url: str, store: RedisStore):
    async with aclosing(RedisStore.connect(redis_url, timeout_s=5.0, prefix="other")) as other:
        await store.append([click(1)])

        assert await past(other) == []
        assert await other.append([click(1)]) == [Outcome.NEW]


async def test_a_server_that_forgot_the_script_gets_it_again(store: RedisStore, server: redis.Redis):
    await store.append([click(1)])
    server.script_flush()

    assert await store.append([click(2)]) == [Outcome.NEW]
    assert await past(store) == [1, 2]


async def test_what_cannot_be_read_is_absent_and_logged(
    store: RedisStore, server: redis.Redis, caplog: pytest.LogCaptureFixture
):
    await store.append([click(1)])
    for key in (PAST, KEYS.profile("u1"), KEYS.item("ad1")):
        server.set(key, b"\xc1 rubbish")

    with caplog.at_level(logging.WARNING):
        fetched = await store.fetch("u1", ["ad1"], before=1e12, limit=5)
        items = [unpack_row(packed) for packed in fetched.items]

    assert (fetched.user, list(fetched.behaviours), items) == (None, [], [None])
    assert (
        sorted(record.message for record in caplog.records) == ["unreadable behaviours"] + ["unreadable features"] * 2
    )


NEWER = b"\x03 a layout of later"
NOT_READABLE = [b"", b"\x01", b"rubbish", NEWER, EMPTY_HISTORY[:3] + b"\x01" + EMPTY_HISTORY[4:] + b"\x00" * 40]


@pytest.mark.parametrize("value", NOT_READABLE)
async def test_a_past_that_cannot_be_read_is_left_as_it_is_and_fails_no_other_user(
    store: RedisStore, server: redis.Redis, value: bytes
):
    server.set(PAST, value)

    outcomes = await store.append([click(1), click(1, user="u2"), click(2)])

    assert outcomes == [Outcome.UNREADABLE, Outcome.NEW, Outcome.UNREADABLE]
    assert server.get(PAST) == value
    assert await past(store) == []
    assert await past(store, "u2") == [1]
    server.delete(PAST)
    assert await store.append([click(1)]) == [Outcome.NEW]  # it was not taken, so it is not known


@pytest.mark.parametrize("key", [PAST, KEYS.event_tags("u1", 0)])
async def test_a_key_of_another_kind_is_left_as_it_is_and_fails_no_other_user(
    store: RedisStore, server: redis.Redis, key: str
):
    server.rpush(key, "somebody else's")

    assert await store.append([click(1), click(1, user="u2")]) == [Outcome.UNREADABLE, Outcome.NEW]

    assert server.lrange(key, 0, -1) == [b"somebody else's"]
    assert await past(store) == []


async def test_the_bytes_of_a_past_do_not_depend_on_the_order_of_its_clicks(redis_url: str, server: redis.Redis):
    clicks = [click(number, item=f"ad{number % 3}", brand=f"brand {number % 5}") for number in range(40)]
    values = []
    for seed in range(5):
        server.flushall()
        random.Random(seed).shuffle(clicks)
        async with aclosing(RedisStore.connect(redis_url, timeout_s=5.0, limits=Limits(max_clicks=25))) as store:
            for start in range(0, 40, 7):
                await store.append(clicks[start : start + 7] + clicks[:2])
        values.append(server.get(PAST))

    assert values[0] is not None
    assert len(set(values)) == 1


async def test_another_worker_reads_the_words_of_a_click_in_the_very_next_fetch(redis_url: str, store: RedisStore):
    async with aclosing(RedisStore.connect(redis_url, timeout_s=5.0)) as other:
        await other.append([click(1, brand="nike", color="red")])

        fetched = await store.fetch("u1", [], before=9.0, limit=9)
        await other.append([click(2, brand="puma", size="large")])
        again = await store.fetch("u1", [], before=9.0, limit=9)

    assert [event.features for event in fetched.behaviours] == [{"brand": "nike", "color": "red"}]
    assert again.behaviours[1].features == {"brand": "puma", "size": "large"}


async def test_words_that_were_lost_come_back_with_the_next_click(store: RedisStore, server: redis.Redis):
    await store.append([click(1, brand="nike")])
    words = server.hgetall(KEYS.words)
    server.delete(KEYS.words)

    await store.append([click(2, brand="nike")])

    assert server.hgetall(KEYS.words) == words


async def test_a_value_whose_code_another_word_has_is_spelled_out(store: RedisStore, server: redis.Redis):
    word = msgspec.msgpack.encode("nike")
    server.hset(KEYS.words, code_of(word), msgspec.msgpack.encode("another"))

    await store.append([click(1, brand="nike")])

    assert (await store.fetch("u1", [], before=9.0, limit=9)).behaviours[0].features == {"brand": "nike"}
    assert b"nike" in (server.get(PAST) or b"")


@given(
    numbers=st.lists(st.integers(0, 10**6), max_size=4),
    at=st.integers(0, 300),
    byte=st.binary(max_size=3),
    removed=st.integers(0, 3),
)
def test_no_bytes_make_unpacking_fail(numbers: list[int], at: int, byte: bytes, removed: int):
    packed = EMPTY_HISTORY + b"".join(pack_click(click(number, brand="a"), NO_WORDS) for number in sorted(numbers))
    broken = packed[:at] + byte + packed[at + removed :]

    events = list(unpack_history(broken, before=1e300, limit=10, words=NO_WORDS))

    assert len(events) <= 10
    assert unpack_row(byte) is None or isinstance(unpack_row(byte), dict)


async def test_a_thousand_clicks_of_one_second_newest_first_do_not_keep_the_server_from_others(store: RedisStore):
    """One by one, each walking past all before it byte by byte, they took it half a minute."""
    items = ["x" * 250 + f"{number:06d}" for number in range(1000, 0, -1)]

    new = await store.append([Click(event_id=item, user="u1", item=item, ts=5.0) for item in items])

    assert all(new)
    assert (await store.fetch("u1", [], before=6.0, limit=200)).behaviours.items == items[99::-1]


async def test_stored_features_that_are_no_text_are_taken_for_absent(store: RedisStore, server: redis.Redis):
    server.set(KEYS.item("ad1"), b"\x81\xa5brand\xa1\xff")
    server.set(KEYS.profile("u1"), b"\x81\xa6gender\xa1\xff")

    assert await store.append([click(1)]) == [Outcome.NEW]
    assert (await store.fetch("u1", [], before=1.0, limit=1)).user is None
