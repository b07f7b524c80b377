"""Both stores keep the same promises: every test here runs against each."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from models.features.history import Event, history
from models.features.values import Row
from service.store.codec import MAX_FEATURES_BYTES, Click, EventType, Mark, order, pack_row, unpack_row
from service.store.feature_store import FeatureStore, Outcome
from service.store.memory_store import MemoryStore
from service.store.redis_store import Limits, RedisStore

NOW = 2e9


@pytest.fixture(params=["memory", "redis", "cluster"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[FeatureStore]:
    if request.param == "memory":
        store: FeatureStore = MemoryStore(max_clicks=10)
    else:
        on_cluster = request.param == "cluster"
        url = request.getfixturevalue("cluster").url if on_cluster else request.getfixturevalue("redis_url")
        store = RedisStore.connect(url, timeout_s=5.0, limits=Limits(max_clicks=10))
    yield store
    await store.aclose()


def click(number: int, *, user: str = "u1", item: str = "ad1", ts: float | None = None, **features) -> Click:
    """Numbers in the order of their times, by default."""
    return Click(event_id=f"e{number}", user=user, item=item, ts=float(number) if ts is None else ts, features=features)


def event_click(number: int, *, features: Row | None = None, context: Row | None = None) -> Click:
    return Click(
        event_id=f"e{number}", user="u1", item="ad1", ts=float(number), features=features or {}, context=context or {}
    )


async def past(store: FeatureStore, user: str = "u1", *, before: float = NOW, limit: int = 1000) -> list[Event]:
    return list((await store.fetch(user, [], before=before, limit=limit)).behaviours)


async def test_nothing_is_known_of_a_new_user_and_a_new_item(store: FeatureStore):
    fetched = await store.fetch("nobody", ["nothing"], before=NOW, limit=30)

    assert (fetched.user, list(fetched.behaviours), fetched.items) == (None, [], [None])


async def test_an_anonymous_request_has_items_and_no_past(store: FeatureStore):
    await store.put_items({"ad1": {"price": 9.5}})
    await store.append([click(1)])

    fetched = await store.fetch(None, ["ad1"], before=NOW, limit=30)

    assert (fetched.user, list(fetched.behaviours), fetched.items) == (None, [], [pack_row({"price": 9.5})])


async def test_features_come_back_as_they_were_put(store: FeatureStore):
    user: Row = {"gender": "F", "age": 25, "score": 0.1, "member": True, "tags": ["a", 1, 2.5], "empty": []}

    await store.put_users({"u1": user, "u2": {}})

    assert (await store.fetch("u1", [], before=NOW, limit=1)).user == user
    assert (await store.fetch("u2", [], before=NOW, limit=1)).user == {}


async def test_items_stand_in_the_order_asked_for_repeated_ones_too(store: FeatureStore):
    await store.put_items({"a": {"price": 1}, "b": {"price": 2}})

    fetched = await store.fetch("u1", ["b", "a", "x", "b"], before=NOW, limit=1)

    assert [unpack_row(packed) for packed in fetched.items] == [{"price": 2}, {"price": 1}, None, {"price": 2}]


async def test_later_features_replace_earlier_ones(store: FeatureStore):
    await store.put_items({"a": {"price": 1, "color": "red"}})

    await store.put_items({"a": {"price": 2}})

    assert (await store.fetch("u1", ["a"], before=NOW, limit=1)).items == [pack_row({"price": 2})]


async def test_a_click_is_seen_by_the_very_next_fetch(store: FeatureStore):
    for number in range(1, 6):
        await store.append([click(number)])

        assert (await past(store))[-1].ts == number


async def test_only_clicks_strictly_before_count_and_the_last_ones_of_those(store: FeatureStore):
    await store.append([click(number) for number in (1, 2, 3, 4)])

    assert [event.ts for event in await past(store, before=4, limit=2)] == [2, 3]
    assert await past(store, limit=0) == []
    assert await past(store, before=1) == []


async def test_a_click_of_the_very_moment_is_not_one_of_before(store: FeatureStore):
    moment = 1_795_000_000.123_44  # the store holds tenths of a millisecond: this is later than what it holds
    await store.append([click(1, ts=moment)])

    assert await past(store, before=moment) == []
    assert len(await past(store, before=moment + 1e-3)) == 1


async def test_users_do_not_see_each_other(store: FeatureStore):
    new = await store.append([click(1, user="u1"), click(1, user="u2", item="ad2"), click(2, user="u1")])

    assert new == [Outcome.NEW, Outcome.NEW, Outcome.NEW]
    assert [event.item for event in await past(store, "u1")] == ["ad1", "ad1"]
    assert [event.item for event in await past(store, "u2")] == ["ad2"]


async def test_a_repeated_event_is_told_and_changes_nothing(store: FeatureStore):
    assert await store.append([click(1), click(2), click(1)]) == [Outcome.NEW, Outcome.NEW, Outcome.KNOWN]

    assert await store.append([click(2), click(3), click(1)]) == [Outcome.KNOWN, Outcome.NEW, Outcome.KNOWN]

    assert [event.ts for event in await past(store)] == [1, 2, 3]


async def test_two_clicks_on_one_item_at_one_time_both_count(store: FeatureStore):
    await store.append([click(1, ts=5.0), click(2, ts=5.0)])

    assert [(event.item, event.ts) for event in await past(store)] == [("ad1", 5.0), ("ad1", 5.0)]


async def test_a_click_keeps_the_items_features_of_its_own_time(store: FeatureStore):
    await store.put_items({"ad1": {"brand": "old", "price": 1.5}})
    await store.append([click(1), click(2, brand="own", session="s1"), click(3, item="unknown")])

    await store.put_items({"ad1": {"brand": "new"}})

    assert [(event.item_features, event.features) for event in await past(store)] == [
        ({"brand": "old", "price": 1.5}, {}),
        ({"price": 1.5}, {"brand": "own", "session": "s1"}),
        ({}, {}),
    ]


async def test_a_click_keeps_what_its_event_brought_apart_from_what_its_item_calls_so(store: FeatureStore):
    brought: Row = {"coins": 12.5, "gadgets": ["bow", 7], "vip": True, "level": None}
    await store.put_items({"ad1": {"coins": 999, "device": "any"}})

    await store.append([event_click(1, features=brought), event_click(2, context={"device": "tv"}), click(3)])

    events = await past(store)
    assert [event.event_value("coins") for event in events] == [12.5, None, None]
    assert [event.event_value("device") for event in events] == [None, "tv", None]
    assert [event.item_value("device") for event in events] == ["any", "any", "any"]
    assert events[0].features == {"coins": 12.5, "gadgets": ["bow", 7], "vip": True}


async def test_a_clicks_own_features_and_its_items_may_each_be_as_large_as_a_row(store: FeatureStore):
    large = "x" * (MAX_FEATURES_BYTES - 100)
    await store.put_items({"ad1": {"text": large}})

    await store.append([click(1, own=large)])

    assert [(e.item_features, e.features) for e in await past(store)] == [({"text": large}, {"own": large})]


def mark(event_id: str, *, owner: str = "u1", kind: EventType = "impression", ts: float = 1.0) -> Mark:
    return Mark(type=kind, event_id=event_id, owner=owner, ts=ts)


async def test_an_event_is_known_by_its_owner_its_type_and_its_id(store: FeatureStore):
    marks = [mark("a"), mark("b"), mark("a"), mark("a", owner="u2"), mark("a", kind="click")]
    assert await store.append(marks) == [Outcome.NEW, Outcome.NEW, Outcome.KNOWN, Outcome.NEW, Outcome.NEW]

    assert await store.append([click(1), mark("e1"), mark("b")]) == [Outcome.NEW, Outcome.NEW, Outcome.KNOWN]
    assert await store.append([mark("e1", kind="click"), click(1)]) == [Outcome.KNOWN, Outcome.KNOWN]


async def test_a_deleted_user_leaves_nothing_and_clicks_of_before_stay_out(store: FeatureStore):
    await store.put_users({"u1": {"age": 1}, "u2": {"age": 2}})
    await store.append([click(1), click(2), click(1, user="u2")])

    await store.delete_user("u1", at=3.0)

    assert (await store.fetch("u1", [], before=NOW, limit=9)).user is None
    assert await past(store) == []
    assert await store.append([click(2), click(4), click(9, ts=2.9)]) == [Outcome.NEW, Outcome.NEW, Outcome.NEW]
    assert [event.ts for event in await past(store)] == [4]
    assert [event.ts for event in await past(store, "u2")] == [1]


async def test_the_items_that_changed_since_are_told(store: FeatureStore):
    await store.put_items({"before": {"price": 1}})
    start = await store.changed_items(None)
    await store.put_items({"ad1": {"price": 1}, "ad2": {}})
    await store.put_items({"ad1": {"price": 2}})

    changes = await store.changed_items(start.position)
    after = await store.changed_items(changes.position)

    assert start.items is not None and not start.items
    assert changes.items == ["ad1", "ad2", "ad1"]
    assert (list(after.items or ()), after.position) == ([], changes.position)


async def test_who_asks_after_too_many_changes_hears_that_any_may_have_changed(store: FeatureStore):
    start = await store.changed_items(None)
    for _ in range(600):
        await store.put_items({str(number): {} for number in range(20)})

    assert (await store.changed_items(start.position)).items is None


async def test_nothing_to_do_is_done(store: FeatureStore):
    await store.put_users({})
    await store.put_items({})

    assert await store.append([]) == []
    assert (await store.fetch(None, [], before=NOW, limit=5)).items == []


async def test_a_thousand_items_are_one_fetch(store: FeatureStore):
    await store.put_items({str(number): {"n": number} for number in range(1000)})

    fetched = await store.fetch("u1", [str(number) for number in range(1000)], before=NOW, limit=30)

    assert [unpack_row(packed) for packed in fetched.items] == [{"n": number} for number in range(1000)]


@pytest.mark.parametrize("odd", ["{", "}", "{u1}", "a:b", "é日本", "\x00", " ", "u1\n", "x" * 256, "'; DROP"])
async def test_ids_of_any_spelling_are_kept_apart(store: FeatureStore, odd: str):
    await store.put_users({odd: {"is": "odd"}, "u1": {"is": "plain"}})
    await store.put_items({odd: {"is": "odd"}})
    await store.append([click(1, user=odd, item=odd), click(1, user="u1")])

    fetched = await store.fetch(odd, [odd], before=NOW, limit=5)

    assert fetched.user == {"is": "odd"}
    assert [unpack_row(packed) for packed in fetched.items] == [{"is": "odd"}]
    assert [event.item for event in fetched.behaviours] == [odd]
    assert [event.item for event in await past(store, "u1")] == ["ad1"]


async def test_clicks_appended_at_once_are_all_kept(store: FeatureStore):
    await asyncio.gather(*(store.append([click(number)]) for number in range(1, 9)))

    assert [event.ts for event in await past(store)] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("ts", [float("nan"), float("inf"), -1.0])
def test_a_click_has_a_time(ts: float):
    with pytest.raises(ValueError, match="Unix seconds"):
        click(1, ts=ts)


# Few values, so that times and items often coincide and a difference in the last byte decides.
ITEMS = ["a", "aa", "ab", "b", "", "é", "\x00", "日", "7", "10", "007", "256", "x" * 30]
TIMES = [0.0, -0.0, 0.5, 1.0, 255.0, 256.0, 1e9, 1e9 + 1e-4, 1.7e9]
CLICKS = st.lists(
    st.builds(
        lambda number, item, ts, brand: click(number, item=item, ts=ts, n=number, brand=brand),
        st.integers(0, 10**6),
        st.sampled_from(ITEMS),
        st.sampled_from(TIMES),
        st.sampled_from(["nike", "b" * 300, 9.5]),
    ),
    unique_by=lambda c: c.event_id,
    max_size=30,
)


def arrivals(clicks: list[Click], seed: int) -> list[list[Click]]:
    """The clicks in some order, some of them again, in some grouping."""
    draw = random.Random(seed)
    arriving = clicks + draw.choices(clicks, k=len(clicks) // 2) if clicks else []
    draw.shuffle(arriving)
    groups = []
    while arriving:
        size = draw.randint(1, 7)
        groups.append(arriving[:size])
        arriving = arriving[size:]
    return groups


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(clicks=CLICKS, keep=st.integers(1, 12), seed=st.integers(0, 2**32))
@pytest.mark.parametrize("kind", ["memory", "redis"])
async def test_the_past_is_the_newest_clicks_whatever_the_order_repetition_and_grouping(
    kind: str, request: pytest.FixtureRequest, clicks: list[Click], keep: int, seed: int
):
    async with aclosing(emptied(kind, request, max_clicks=keep)) as store:
        for group in arrivals(clicks, seed):
            await store.append(group)
        stored = await past(store)

    # Written as the contract says it: sort the set of events, keep the newest.
    expected = sorted(clicks, key=lambda c: (c.ts, c.item))[-keep:]
    assert [(event.ts, event.item) for event in stored] == [(c.ts, c.item) for c in expected]
    by_number = {c.features["n"]: c for c in clicks}
    for event in stored:
        same = by_number[event.features["n"]]
        assert (same.ts, same.item, same.features) == (event.ts, event.item, event.features)
    assert stored == history(stored, before=NOW, limit=200)


def emptied(kind: str, request: pytest.FixtureRequest, **limits: int) -> MemoryStore | RedisStore:
    if kind == "memory":
        return MemoryStore(**limits)
    url = request.getfixturevalue("session_redis").url
    with Redis.from_url(url) as server:
        server.flushall()
    return RedisStore.connect(url, timeout_s=5.0, limits=Limits(**limits))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(clicks=CLICKS, max_clicks=st.integers(1, 12), max_bytes=st.integers(400, 1200), seed=st.integers(0, 2**32))
@pytest.mark.parametrize("kind", ["memory", "redis"])
async def test_a_past_bounded_in_bytes_does_not_depend_on_the_order_either(
    kind: str, request: pytest.FixtureRequest, clicks: list[Click], max_clicks: int, max_bytes: int, seed: int
):
    pasts = []
    for groups in (arrivals(clicks, seed), [[c] for c in sorted(clicks, key=order)]):
        async with aclosing(emptied(kind, request, max_clicks=max_clicks, max_bytes=max_bytes)) as store:
            for group in groups:
                await store.append(group)
            pasts.append(await past(store))

    assert pasts[0] == pasts[1]
    newest = sorted(clicks, key=order)[-max_clicks:][::-1]
    assert [(e.ts, e.item) for e in pasts[0][::-1]] == [(c.ts, c.item) for c in newest[: len(pasts[0])]]
    # Every one of these clicks fits alone; with a bound of n times the largest, n of them do.
    assert len(pasts[0]) >= min(len(newest), max_bytes // 400)


async def test_both_stores_break_ties_alike(redis_url: str):
    limits = Limits(max_clicks=5)
    stores: list[FeatureStore] = [
        MemoryStore(max_clicks=5),
        RedisStore.connect(redis_url, timeout_s=5.0, limits=limits),
    ]
    clicks = [click(number, ts=1.0, n=number) for number in range(20)]
    random.Random(1).shuffle(clicks)

    for store in stores:
        await store.append(clicks)
    memory, redis = [await past(store) for store in stores]
    for store in stores:
        await store.aclose()

    assert memory == redis
