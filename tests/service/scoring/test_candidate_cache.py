"""What is cached of items and clicks changes no answer: cached, not cached and merged by hand give the same tensors."""

import asyncio
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.features.arrays import Arrays
from models.features.column_encoding import EncodingError
from models.features.encoder import Encoder
from models.features.history import Event
from models.features.request import Request
from models.features.schema import Schema
from models.features.values import Row
from service.errors import InvalidValue
from service.http import schemas
from service.http.decoding import Decoder
from service.scoring.candidate_cache import MAX_KEY_BYTES, CandidateCache
from service.scoring.model_inputs import InputLookup, ModelInput, ModelInputBuilder
from service.scoring.request import MalformedFeatures, ScoringRequest
from service.scoring.scorer import NOTHING_FETCHED
from service.store.codec import Click, pack_row, unpack_row
from service.store.feature_store import Fetched, OnFetched, StoreUnavailable
from service.store.memory_store import MemoryStore
from tests.service import tiny

NOW = 1000.0


def item_graph(packed: Arrays) -> np.ndarray:
    """An item half from which ids and weights can be read back."""
    return np.concatenate([packed["item_ids"], packed["item_weights"]], axis=1).astype(np.float32)


ITEM_WIDTH = 8
PRICE = 5  # the column of the price's weight: ids are item_id, price, two genres


def builder(*, rows: int, fresh_s: float, schema: Schema = tiny.SCHEMA) -> ModelInputBuilder:
    inputs = [SimpleNamespace(name=name) for name in ("request_ids", "history_ids", "history_age", "items")]
    manifest = SimpleNamespace(item_width=ITEM_WIDTH, graphs={"model.onnx": SimpleNamespace(inputs=inputs)})
    artifact: Any = SimpleNamespace(encoder=Encoder(schema), manifest=manifest)
    return ModelInputBuilder(artifact, item_graph, item_rows=rows, fresh_s=fresh_s)


class Store(MemoryStore):
    """Counts what it is asked, and can be down."""

    is_down = False

    def __init__(self) -> None:
        super().__init__()
        self.queries: list[Sequence[str]] = []

    def fetch_soon(
        self,
        user: str | None,
        items: Sequence[str],
        on_fetched: OnFetched,
        *,
        before: float,
        limit: int,
        timeout_s: float | None = None,
    ) -> None:
        self.queries.append(list(items))
        if self.is_down:
            on_fetched(StoreUnavailable("down"))
        else:
            super().fetch_soon(user, items, on_fetched, before=before, limit=limit, timeout_s=timeout_s)


class Reader:
    """Reads requests as the scorer does, with what is cached in between."""

    def __init__(self, *, rows: int = 100, fresh_s: float = 10, schema: Schema = tiny.SCHEMA) -> None:
        self.store = Store()
        self.encoder = Encoder(schema)
        self.inputs = builder(rows=rows, fresh_s=fresh_s, schema=schema)
        self._decoder = Decoder(schemas.PredictRequest)

    def request(self, body: dict[str, Any]) -> ScoringRequest:
        return schemas.scoring_request(self._decoder.decode(json.dumps(body).encode()), now=NOW, max_candidates=100)

    def find(self, **body: Any) -> tuple[ScoringRequest, InputLookup]:
        request = self.request({"ts": NOW, **body})
        return request, self.inputs.find(request, with_ids=True)

    async def build(self, request: ScoringRequest, lookup: InputLookup) -> ModelInput:
        fetched: Fetched | None = NOTHING_FETCHED
        if not lookup.needs_store(request):
            return self.inputs.build(request, lookup, fetched)
        try:
            fetched = await self.store.fetch(request.user, lookup.items, before=NOW, limit=lookup.num_clicks)
        except StoreUnavailable:
            fetched = None
        return self.inputs.build(request, lookup, fetched)

    async def read(self, **body: Any) -> ModelInput:
        return await self.build(*self.find(**body))


async def by_hand(store: MemoryStore, body: dict[str, Any], encoder: Encoder) -> tuple[Arrays, bool]:
    """The merge written out value by value, and whether stored values had to be left out."""
    user = body["user"]["id"]
    past = list((await store.fetch(user, [], before=NOW, limit=tiny.T)).behaviours)
    sent = body["candidates"]
    if isinstance(sent, dict):
        rows = [{n: column[i] for n, column in sent.items() if n != "id"} for i in range(len(sent["id"]))]
        ids = sent["id"]
    else:
        rows, ids = [c.get("features") or {} for c in sent], [c["id"] for c in sent]
    invalid = False
    items: dict[str, list[Any]] = {"item_id": ids, "price": [], "genres": []}
    stored = map(unpack_row, (await store.fetch(None, ids, before=NOW, limit=0)).items)
    for own, known in zip(rows, stored, strict=True):
        for name, good in (("price", (int, float)), ("genres", list)):
            value = own.get(name)
            if value is None and known is not None and known.get(name) is not None:
                value = known[name]
                if not isinstance(value, good):
                    value, invalid = None, True
            items[name].append(value)
    clicked = [Event(item=e.item, ts=e.ts, features=e.features) for e in past]
    request = Request(user={"user_id": user}, context={}, ts=NOW, behaviours=clicked, items=items, num_items=len(ids))
    packed = encoder.layout.pack(encoder.encode(request))
    del packed["user_index"]
    return {**packed, "items": item_graph(packed)}, invalid


def same(one: Arrays, other: Arrays) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def price(read: ModelInput, row: int = 0) -> float:
    return float(read.arrays["items"][row, PRICE])


ids = st.sampled_from(["a1", "a2", "a3", "a4", "new", "newer"])
prices = st.one_of(st.none(), st.integers(-3, 5), st.floats(-1e3, 1e3))
genres = st.one_of(st.none(), st.lists(st.sampled_from(["x", "y", "z", "?", 7, "", None]), max_size=4))
own_rows = st.fixed_dictionaries({}, optional={"price": prices, "genres": genres, "smell": st.just(1)})
stored_rows = st.dictionaries(
    ids,
    st.fixed_dictionaries({}, optional={"price": st.one_of(prices, st.just("cheap")), "genres": genres}),
    max_size=5,
)
lists = st.lists(
    st.fixed_dictionaries({"id": ids}, optional={"features": st.none() | own_rows}), min_size=1, max_size=7
)


@st.composite
def columns(draw: Any) -> dict[str, Any]:
    named = draw(st.lists(ids, min_size=1, max_size=7))
    made: dict[str, Any] = {"id": named}
    for name, values in (("price", prices), ("genres", genres)):
        if draw(st.booleans()):
            made[name] = draw(st.lists(values, min_size=len(named), max_size=len(named)))
    return made


@settings(max_examples=150, deadline=None)
@given(
    stored=stored_rows,
    asked=st.lists(st.one_of(lists, columns()), min_size=1, max_size=5),
    clicks=st.lists(st.tuples(ids, st.integers(1, 9), genres), max_size=5),
    rows=st.integers(1, 6),
    fresh_s=st.sampled_from([0.0, 1e-9, 10.0]),
)
def test_what_is_kept_changes_no_array(
    stored: dict[str, Row],
    asked: list[Any],
    clicks: list[tuple[str, int, Any]],
    rows: int,
    fresh_s: float,
) -> None:
    async def check() -> None:
        keeping, forgetting = Reader(rows=rows, fresh_s=fresh_s), Reader(rows=1, fresh_s=0)
        past = [
            Click(event_id=str(n), user="u1", item=item, ts=float(ts), features={"genres": own} if own else {})
            for n, (item, ts, own) in enumerate(clicks)
        ]
        for reader in (keeping, forgetting):
            await reader.store.append(past)
            await reader.store.put_items(stored)
        for candidates in [*asked, *asked]:
            body = {"user": {"id": "u1"}, "candidates": candidates}
            kept, fresh = await keeping.read(**body), await forgetting.read(**body)
            expected, invalid = await by_hand(keeping.store, body, keeping.encoder)
            same(kept.arrays, fresh.arrays)
            same(kept.arrays, expected)
            assert kept.degraded == fresh.degraded == (["stored_values_invalid"] if invalid else [])
            assert kept.num_unnamed == fresh.num_unnamed
            assert kept.unknown == fresh.unknown

    asyncio.run(check())


async def test_a_known_item_is_not_asked_for_again() -> None:
    reader = Reader()
    await reader.store.put_items({"a1": {"price": 2.0}})

    for _ in range(2):
        await reader.read(user={"id": "u1"}, candidates=[{"id": "a1"}, {"id": "a1"}, {"id": "new"}])
        await reader.read(user={"id": "u1"}, candidates={"id": ["new", "a1"]})

    assert reader.store.queries == [["a1", "new"], [], [], []]


async def test_a_row_that_the_client_sends_complete_is_never_asked_for() -> None:
    reader = Reader()
    complete = {"price": 1, "genres": []}

    await reader.read(candidates=[{"id": "a1", "features": complete}])
    await reader.read(candidates={"id": ["a2"], "price": [1], "genres": [["x"]]})
    await reader.read(candidates={"id": ["a2", "a3"], "price": [1, None], "genres": [["x"], []]})

    assert reader.store.queries == [["a2", "a3"]]


async def test_a_row_whose_slot_another_takes_while_the_store_is_asked_stays_the_row() -> None:
    reader = Reader(rows=2)
    await reader.store.put_items({name: {"price": price} for name, price in (("a1", 1.0), ("a2", 2.0), ("a3", 3.0))})
    alone = (await reader.read(candidates=[{"id": "a1"}])).arrays

    request, lookup = reader.find(candidates=[{"id": "a1"}, {"id": "a3"}])
    complete = {"price": 9, "genres": ["x"]}
    await reader.read(candidates=[{"id": "a1", "features": complete}, {"id": "a2", "features": complete}])
    read = (await reader.build(request, lookup)).arrays

    np.testing.assert_array_equal(read["items"][0], alone["items"][0])


async def test_other_features_of_the_same_item_are_another_row() -> None:
    reader = Reader()
    await reader.store.put_items({"a1": {"price": 2.0}})

    prices = [
        price(await reader.read(candidates=[{"id": "a1", "features": features}]))
        for features in ({"price": 9}, None, {"price": 3}, {"price": 9}, {})
    ]

    assert prices[0] == prices[3] != prices[2]
    assert prices[1] == prices[4] not in (prices[0], prices[2])


def cache(now: Any) -> CandidateCache:
    return CandidateCache(Encoder(tiny.SCHEMA), item_graph, item_width=ITEM_WIDTH, capacity=10, fresh_s=10, now=now)


async def test_a_row_whose_time_is_over_is_read_again() -> None:
    now = 0.0
    items = cache(lambda: now)
    candidates = Reader().request({"candidates": [{"id": "a1"}]}).candidates

    def price_of(stored: Row | None) -> float:
        lookup = items.find(candidates, with_ids=False)
        assert lookup.missing_ids == ([] if stored is None else ["a1"])
        known = None if stored is None else {"a1": pack_row(stored)}
        return float(items.rows(candidates, lookup, known).arrays["items"][0, PRICE])

    first = price_of({"price": 1.0})
    now = 9.9
    assert price_of(None) == first
    now = 10.1
    second = price_of({"price": 4.0})

    assert second != first
    now = 20.0
    assert price_of(None) == second


async def test_a_row_that_the_store_still_has_is_kept_for_another_time_and_not_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    items = cache(lambda: now)
    candidates = Reader().request({"candidates": [{"id": "a1"}, {"id": "a2", "features": {"price": 7}}]}).candidates
    stored = {"a1": pack_row({"price": 1.0, "genres": ["x"]}), "a2": None}
    first = items.rows(candidates, items.find(candidates, with_ids=True), stored).arrays
    encoded: list[int] = []
    encode = Encoder.encode_items

    def counting(encoder: Encoder, columns: Any, num_rows: int) -> Arrays:
        encoded.append(num_rows)
        return encode(encoder, columns, num_rows)

    monkeypatch.setattr(Encoder, "encode_items", counting)

    now = 10.1
    lookup = items.find(candidates, with_ids=True)
    again = items.rows(candidates, lookup, stored).arrays
    now = 20.0
    assert lookup.missing_ids == ["a1", "a2"]
    assert items.find(candidates, with_ids=False).missing_ids == []
    assert encoded == []
    same(again, first)

    now = 20.2
    stored["a2"] = pack_row({"genres": ["y"]})
    items.rows(candidates, items.find(candidates, with_ids=False), stored)
    assert encoded == [1]


async def test_rows_of_a_changed_item_are_read_again_whatever_the_client_sent_with_it() -> None:
    now = 0.0
    items = cache(lambda: now)
    sent = [{"id": "a1"}, {"id": "a1", "features": {"price": 7}}, {"id": "a2"}]
    complete = {"id": "a1", "features": {"price": 1, "genres": ["x"]}}  # nothing of it is the store's to say
    candidates = Reader().request({"candidates": [*sent, complete]}).candidates
    stored = {"a1": pack_row({"price": 1.0}), "a2": pack_row({"price": 2.0})}
    items.rows(candidates, items.find(candidates, with_ids=False), stored)
    now = 1.0
    assert items.find(candidates, with_ids=False).missing.tolist() == []

    items.expire(["a1", "another"])

    assert items.find(candidates, with_ids=False).missing.tolist() == [0, 1]
    items.expire(None)
    assert items.find(candidates, with_ids=False).missing.tolist() == [0, 1, 2]


@pytest.mark.parametrize("changed", [["a1"], None], ids=["it", "any"])
@pytest.mark.parametrize("is_cached", [False, True])
async def test_a_row_that_changed_while_the_store_was_asked_is_not_kept(
    changed: list[str] | None, is_cached: bool
) -> None:
    now = 0.0
    items = cache(lambda: now)
    candidates = Reader().request({"candidates": [{"id": "a1"}]}).candidates
    before = {"a1": pack_row({"price": 1.0})}
    if is_cached:
        items.rows(candidates, items.find(candidates, with_ids=False), before)
        now = 10.1  # its time is over

    lookup = items.find(candidates, with_ids=False)
    items.expire(changed)
    items.rows(candidates, lookup, before)

    assert items.find(candidates, with_ids=False).missing_ids == ["a1"]


async def test_while_the_store_is_down_behaviours_that_lack_features_are_named() -> None:
    reader = Reader()
    reader.store.is_down = True
    complete = {"price": 1, "genres": ["x"]}
    asked: dict[str, Any] = {"candidates": [{"id": "a1", "features": complete}]}

    read = [
        (await reader.read(**asked, behaviours=behaviours)).degraded
        for behaviours in ([{"item": "a2", "ts": 5}], [{"item": "a2", "ts": 5, "features": complete}], [])
    ]

    assert read == [["item_features_unavailable"], [], []]


async def test_while_the_store_is_down_old_rows_stand_in_and_are_named() -> None:
    reader = Reader(fresh_s=1e-9)
    await reader.store.put_items({"a1": {"price": 2.0, "genres": ["x"]}})
    up = await reader.read(candidates=[{"id": "a1"}])
    reader.store.is_down = True

    old = await reader.read(candidates=[{"id": "a1"}])
    both = await reader.read(candidates=[{"id": "a1"}, {"id": "a2"}])
    never = await reader.read(candidates=[{"id": "a2"}])
    reader.store.is_down = False
    await reader.store.put_items({"a2": {"price": 4.0}})
    healed = await reader.read(candidates=[{"id": "a2"}])

    same(old.arrays, up.arrays)
    assert old.degraded == ["item_features_stale"]
    assert both.degraded == ["item_features_unavailable", "item_features_stale"]
    assert never.degraded == ["item_features_unavailable"]
    assert healed.degraded == []
    assert price(healed) != price(never)


async def test_rows_within_their_time_need_no_store() -> None:
    reader = Reader()
    await reader.read(candidates=[{"id": "a1"}])
    reader.store.is_down = True

    assert (await reader.read(candidates=[{"id": "a1"}])).degraded == []


async def test_a_bad_value_is_told_however_often_it_comes_and_beside_known_rows() -> None:
    reader = Reader()
    good = {"id": "a1", "features": {"price": 1}}
    await reader.read(candidates=[good])

    for _ in range(2):
        with pytest.raises(InvalidValue) as refused:
            await reader.read(candidates=[good, {"id": "a1", "features": {"price": "x"}}])
        assert [e.pointer for e in refused.value.errors] == ["/candidates/1/features/price"]
        with pytest.raises(MalformedFeatures):
            await reader.read(candidates=[good, {"id": "a1", "features": [1]}])
    assert (await reader.read(candidates=[good])).degraded == []


async def test_features_without_end_are_not_kept() -> None:
    reader = Reader()
    large = {"id": "a1", "features": {"smell": "x" * MAX_KEY_BYTES}}

    for _ in range(2):
        assert (await reader.read(candidates=[large])).num_unnamed == 1

    assert reader.store.queries == [["a1"], ["a1"]]


async def test_ids_without_end_are_not_kept() -> None:
    reader = Reader()

    for _ in range(2):
        await reader.read(candidates=[{"id": 10**MAX_KEY_BYTES}, {"id": "a1"}])

    assert reader.store.queries == [[str(10**MAX_KEY_BYTES), "a1"], [str(10**MAX_KEY_BYTES)]]


async def test_a_stored_click_that_cannot_be_encoded_is_named_every_time() -> None:
    reader = Reader()
    click = Click(event_id="1", user="u1", item="a3", ts=1.0, features={"genres": "x"})
    await reader.store.append([click])

    told = [(await reader.read(user={"id": "u1"}, candidates=[{"id": "a1"}])).degraded for _ in range(2)]

    assert told == [["stored_values_invalid"]] * 2


def test_features_are_left_unread_by_the_decoder_and_refused_with_their_place() -> None:
    decoder = Decoder(schemas.PredictRequest)
    body = b'{"candidates": [{"id": 1}, {"id": 2, "features": 7}]}'

    asked = decoder.decode(body)

    assert isinstance(asked.candidates, list)
    assert isinstance(asked.candidates[1].features, msgspec.Raw)
    refusal = decoder.refusal(body, "")
    assert isinstance(refusal, InvalidValue)
    assert [e.pointer for e in refusal.errors] == ["/candidates/1/features"]


def test_a_values_field_is_told_where_one_request_cannot_be_encoded() -> None:
    with pytest.raises(EncodingError, match="field gender, row 0: expected a string or a number"):
        Encoder(tiny.SCHEMA).encode_request({"gender": ["F"]}, {}, 0.0)
