"""Clicks as a table: their records are those that each click has by itself, and merging them is appending them."""

import random
from contextlib import aclosing
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.features.values import Row
from service.store.click_table import ClickTable, Column
from service.store.codec import EMPTY_HISTORY, NO_WORDS, Click, enriched, event_tag, order, pack_click
from service.store.feature_store import FeatureStore, Outcome
from service.store.keys import KeySpace
from service.store.memory_store import MemoryStore
from service.store.redis_store import Limits, RedisStore
from service.store.words import WordTable

KEYS = KeySpace("cs")
ITEMS = ["a", "ab", "é", "日", "7", "007", "256", "x" * 22, "x" * 23, "y" * 250]
ROWS: list[Row] = [{}, {"brand": "nike"}, {"brand": "b" * 300, "n": 1}, {"price": 9.5, "tags": ["a", 1], "x": None}]


def column(values: list[Any]) -> Column[Any]:
    distinct = {repr(value): value for value in values}
    names = list(distinct)
    positions = np.array([names.index(repr(value)) for value in values], np.int64)
    return Column(values=list(distinct.values()), positions=positions)


def table(clicks: list[Click]) -> ClickTable:
    distinct = {(c.user, *order(c)): c for c in clicks}
    clicks = [distinct[key] for key in sorted(distinct)]
    groups = [(user, len(list(group))) for user, group in groupby(clicks, key=lambda c: c.user)]
    return ClickTable(
        users=[user for user, _ in groups],
        ends=np.cumsum([size for _, size in groups], dtype=np.int64),
        items=column([c.item for c in clicks]),
        ts=np.array([round(c.ts * 1e4) for c in clicks], np.int64),
        tags=np.array([list(event_tag(c)[:3]) for c in clicks], np.uint8).reshape(-1, 3),
        features=column([c.features for c in clicks]),
    )


CLICKS = st.lists(
    st.builds(
        lambda number, user, item, ts, row: Click(event_id=f"e{number}", user=user, item=item, ts=ts, features=row),
        st.integers(0, 200),
        st.sampled_from(["u1", "u2", "ü3"]),
        st.sampled_from(ITEMS),
        st.sampled_from([0.0, 0.5, 1.0, 256.0, 1e9 + 1e-4, 1.7e9]),
        st.sampled_from(ROWS),
    ),
    unique_by=lambda c: c.event_id,
    max_size=40,
)


@settings(max_examples=50)
@given(clicks=CLICKS, stored=st.lists(st.sampled_from([None, *ROWS]), min_size=10, max_size=10), seed=st.integers(0, 9))
def test_the_records_of_a_table_are_those_of_its_clicks(clicks: list[Click], stored: list[Row | None], seed: int):
    words = WordTable()
    items = dict(zip(ITEMS, stored, strict=True))
    clicks = sorted((enriched(c, items[c.item]) for c in clicks), key=lambda c: (c.user, order(c)))
    for click in random.Random(seed).sample(clicks, len(clicks) // 2):
        words.add(words.new_words(click.rows))

    packed = table(clicks)
    rows = packed.rows([items[item] for item in packed.items.values])
    features = Column(values=[words.pack(each) for each in rows.values], positions=rows.positions)
    records = {each.user: each for each in packed.records(features)}

    alone = {user: [pack_click(c, words) for c in group] for user, group in groupby(clicks, key=lambda c: c.user)}
    assert {user: each.records for user, each in records.items()} == {u: b"".join(each) for u, each in alone.items()}
    assert [each.num_clicks for each in records.values()] == [len(each) for each in alone.values()]
    assert [each.last_size for each in records.values()] == [len(each[-1]) for each in alone.values()]


@settings(max_examples=30)
@given(clicks=CLICKS, limit=st.integers(1, 5))
def test_the_newest_clicks_of_a_table_are_the_last_ones_of_each_user(clicks: list[Click], limit: int):
    by_user: dict[str, list[Click]] = {}
    for click in sorted(clicks, key=order):
        by_user.setdefault(click.user, []).append(click)

    newest = table(clicks).newest(limit)

    expected = table([c for group in by_user.values() for c in group[-limit:]])
    assert (newest.users, newest.ends.tolist(), newest.ts.tolist(), newest.tags.tolist()) == (
        expected.users, expected.ends.tolist(), expected.ts.tolist(), expected.tags.tolist(),
    )  # fmt: skip
    assert [newest.items[n] for n in range(len(newest))] == [expected.items[n] for n in range(len(expected))]
    assert [newest.features[n] for n in range(len(newest))] == [expected.features[n] for n in range(len(expected))]


def pasts(server: redis.Redis) -> dict[Any, Any]:
    return {key: server.get(key) for key in server.scan_iter("*:b")}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    clicks=CLICKS,
    max_clicks=st.integers(1, 12),
    max_bytes=st.integers(400, 1200),
    seed=st.integers(0, 2**32),
    deleted_at=st.sampled_from([None, 1.0]),
)
async def test_merging_some_clicks_and_appending_others_ends_with_the_bytes_of_appending_all(
    session_redis, clicks: list[Click], max_clicks: int, max_bytes: int, seed: int, deleted_at: float | None
):
    draw = random.Random(seed)
    limits = Limits(max_clicks=max_clicks, max_bytes=max_bytes)
    values = []
    with redis.Redis.from_url(session_redis.url) as server:
        for share_merged in (0.0, 0.5, 1.0):
            server.flushall()
            async with aclosing(RedisStore.connect(session_redis.url, timeout_s=5.0, limits=limits)) as store:
                await store.put_items({"7": {"brand": "own", "color": "red"}})
                # All words first: features are spelled as they are known when a click comes.
                await store._add_words([enriched(c, {"brand": "own", "color": "red"}).rows for c in clicks])
                await store._add_words([c.rows for c in clicks])
                if deleted_at is not None:
                    await store.delete_user("u1", at=deleted_at)
                left = draw.sample(clicks, len(clicks))
                while left:
                    some, left = left[:7], left[draw.randint(1, 7) :]  # some of them twice
                    if draw.random() < share_merged:
                        await store.merge(table(some))
                    else:
                        await store.append(some)
                values.append(pasts(server))

    assert values[1:] == [values[0]] * 2


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest):
    if request.param == "memory":
        store: FeatureStore = MemoryStore(max_clicks=5)
    else:
        store = RedisStore.connect(request.getfixturevalue("redis_url"), timeout_s=5.0, limits=Limits(max_clicks=5))
    yield store
    await store.aclose()


def numbered(*numbers: int, user: str = "u1") -> list[Click]:
    return [Click(event_id=f"e{n}", user=user, item="ad1", ts=float(n)) for n in numbers]


async def times(store: FeatureStore, user: str = "u1") -> list[float]:
    return [event.ts for event in (await store.fetch(user, [], before=1e12, limit=1000)).behaviours]


async def test_of_each_user_those_count_that_are_new_and_stay(store: FeatureStore):
    assert await store.append(numbered(3, 4)) == [Outcome.NEW] * 2

    first = await store.merge(table(numbered(1, 3, 9) + numbered(*range(1, 20), user="u2")))
    again = await store.merge(table(numbered(1, 3, 9) + numbered(*range(1, 20), user="u2")))
    later = await store.merge(table(numbered(0, 2, 7, 8)))

    assert (first, again, later) == ([2, 5], [0, 0], [2])
    assert await times(store) == [3, 4, 7, 8, 9]
    assert await times(store, "u2") == [15, 16, 17, 18, 19]


async def test_an_event_whose_click_was_merged_is_known(store: FeatureStore):
    await store.merge(table(numbered(1, 2)))

    assert await store.append(numbered(2, 3)) == [Outcome.KNOWN, Outcome.NEW]
    assert await times(store) == [1, 2, 3]


async def test_merged_clicks_take_their_items_stored_features_but_for_those_they_bring(store: FeatureStore):
    await store.put_items({"ad1": {"brand": "stored", "color": "red"}})
    clicks = [*numbered(1), Click(event_id="b", user="u1", item="ad1", ts=2.0, features={"brand": "own", "n": None})]

    await store.merge(table(clicks))

    events = (await store.fetch("u1", [], before=9.0, limit=9)).behaviours
    assert [(dict(e.item_features), dict(e.features)) for e in events] == [
        ({"brand": "stored", "color": "red"}, {}),
        ({"color": "red"}, {"brand": "own"}),
    ]


async def test_a_table_without_clicks_is_merged(store: FeatureStore):
    assert await store.merge(table([])) == []


async def test_a_merge_leaves_no_event_tags_and_pasts_that_expire(redis_url: str):
    with redis.Redis.from_url(redis_url) as server:
        async with aclosing(RedisStore.connect(redis_url, timeout_s=5.0)) as store:
            await store.merge(table(numbered(1, 2) + numbered(1, user="u2")))

            assert sorted(server.keys()) == sorted(KEYS.behaviours(user).encode() for user in ("u1", "u2"))
            assert 29 * 86_400 < server.ttl(KEYS.behaviours("u1")) <= 30 * 86_400


@pytest.mark.parametrize(
    "value", [b"", b"\x03 of later", EMPTY_HISTORY[:3] + b"\x01" + EMPTY_HISTORY[4:] + b"\x00" * 40]
)
async def test_a_past_that_cannot_be_read_is_left_as_it_is_and_the_others_are_merged(redis_url: str, value: bytes):
    with redis.Redis.from_url(redis_url) as server:
        server.set(KEYS.behaviours("u1"), value)
        async with aclosing(RedisStore.connect(redis_url, timeout_s=5.0)) as store:
            assert await store.merge(table(numbered(1, 2) + numbered(1, user="u2"))) == [None, 1]

            assert server.get(KEYS.behaviours("u1")) == value
            assert await times(store, "u2") == [1]


async def test_a_word_that_many_clicks_share_counts_once_towards_its_features_bound():
    words = WordTable()
    rows: list[Row] = [{"brand": "nike", "n": n} for n in range(3000)]

    new = {code: word for row in rows for code, word in words.new_words(({}, row, {})).items()}
    more = words.new_words(({}, {"brand": "puma"}, {}))

    assert len(new) == 1
    assert len(more) == 1


def test_a_zero_and_a_negative_zero_are_packed_as_they_are():
    for value in (-0.0, 0.0, 1, True, 1.0):
        assert repr(NO_WORDS.unpack(NO_WORDS.pack(({}, {"x": value}, {})))[1]["x"]) == repr(value)
