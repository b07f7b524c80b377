"""Events are checked one by one, taken once, and counted for the arm that served them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.errors import Refusal
from service.experiments.assignment import Experiment, Running, parse
from service.http import problems
from service.http.event_schemas import EventsDecoder, Receipt, Rejection, checked, receipt_of
from service.ingest.events import Event, EventRecorder
from service.observability.metrics import Metrics
from service.store.feature_store import Outcome, StoreUnavailable
from service.store.memory_store import MemoryStore

NOW = 1_795_000_000.0
MAX_AGE_S = NOW  # back to 1970


class Door:
    """What POST /events does with a body: each event is checked, and the good ones are recorded."""

    def __init__(self, store: MemoryStore, running: Running, metrics: Metrics) -> None:
        self._decoder = EventsDecoder(max_age_s=MAX_AGE_S, now=lambda: NOW)
        self._recorder = EventRecorder(
            store=store, arm_of=lambda ts, unit: running.at(ts).assign(unit).name, metrics=metrics
        )

    async def record(self, values: Sequence[Any]) -> Receipt:
        return await self._receipt(*checked(values, now=NOW, max_age_s=MAX_AGE_S))

    async def record_body(self, body: bytes) -> Receipt:
        return await self._receipt(*self._decoder.decode(body))

    async def _receipt(self, events: Mapping[int, Event], rejected: Sequence[Rejection]) -> Receipt:
        return receipt_of(events, await self._recorder.record(list(events.values())), rejected)


@pytest.fixture
def experiment() -> Experiment:
    arms = [{"name": name, "model": name, "share": 50} for name in ("mian", "stec")]
    return parse({"experiment": "test", "salt": "s", "arms": arms}, source="test")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def events(store: MemoryStore, experiment: Experiment, metrics: Metrics) -> Door:
    return Door(store, Running(experiment), metrics)


def event(number: int = 1, **fields: Any) -> dict[str, Any]:
    return {"event_id": f"e{number}", "type": "click", "ts": NOW - 10, "user": "u1", "item": "ad7", **fields}


def counted(metrics: Metrics, kind: str, arm: str) -> float:
    return metrics.registry.get_sample_value(f"clickserve_{kind}s_total", {"arm": arm}) or 0.0


async def past(store: MemoryStore, user: str = "u1") -> list[tuple[str, float]]:
    fetched = await store.fetch(user, [], before=NOW * 2, limit=100)
    return [(e.item, e.ts) for e in fetched.behaviours]


async def reason(events: Door, sent: Any) -> str:
    receipt = await events.record([sent])
    assert (receipt.accepted, receipt.duplicates) == (0, 0)
    return receipt.rejected[0].reason


async def test_a_click_enters_the_past_and_an_impression_does_not(events: Door, store: MemoryStore):
    receipt = await events.record([event(1, type="impression"), event(2)])

    assert receipt == Receipt(accepted=2, duplicates=0, rejected=[])
    assert await past(store) == [("ad7", NOW - 10)]


@pytest.mark.parametrize("kind", ["impression", "click"])
async def test_an_event_sent_again_is_counted_once(events: Door, metrics: Metrics, experiment: Experiment, kind: str):
    receipt = await events.record([event(1, type=kind), event(2, type=kind), event(1, type=kind)])
    again = await events.record([event(2, type=kind)])

    assert (receipt.accepted, receipt.duplicates) == (2, 1)
    assert (again.accepted, again.duplicates) == (0, 1)
    assert counted(metrics, kind, experiment.assign("u1").name) == 2


async def test_events_count_for_the_arm_of_their_user(events: Door, metrics: Metrics, experiment: Experiment):
    users = [f"u{number}" for number in range(100)]
    of_mian = sum(experiment.assign(user).name == "mian" for user in users)

    await events.record([event(number, user=user) for number, user in enumerate(users)])

    assert 0 < of_mian < 100
    assert counted(metrics, "click", "mian") == of_mian
    assert counted(metrics, "click", "stec") == 100 - of_mian
    assert counted(metrics, "impression", "mian") == 0


async def test_after_a_change_of_shares_events_count_for_the_arm_that_served_at_their_time(
    store: MemoryStore, metrics: Metrics, experiment: Experiment
):
    now = NOW - 60
    running = Running(experiment, clock=lambda: now)
    events = Door(store, running, metrics)
    user = next(f"u{number}" for number in range(100) if experiment.assign(f"u{number}").name == "mian")
    running.replace(experiment.with_shares(shares={}, shadow={}, killed=["mian"]), [(now, experiment)])
    now = NOW

    of_times = (NOW - 61, NOW - 59, NOW - 2 * 86_400)  # before it, after it, and of a replay
    await events.record([event(number, user=user, ts=ts) for number, ts in enumerate(of_times)])

    assert (counted(metrics, "click", "mian"), counted(metrics, "click", "stec")) == (1, 2)


async def test_anonymous_events_count_for_the_arm_of_their_request(
    events: Door, metrics: Metrics, experiment: Experiment
):
    requests = [f"r{number}" for number in range(100)]
    of_mian = sum(experiment.assign(request).name == "mian" for request in requests)

    sent = [event(number, user=None, request_id=request) for number, request in enumerate(requests)]
    receipt = await events.record(sent)
    again = await events.record(sent)

    assert (receipt.accepted, again.duplicates) == (100, 100)
    assert counted(metrics, "click", "mian") == of_mian
    assert counted(metrics, "click", "stec") == 100 - of_mian


async def test_a_number_and_its_spelling_are_one_id(events: Door, store: MemoryStore):
    await events.record([event(1, user=42, item=7)])
    receipt = await events.record([event(1, user="42", item="7"), event(2, user=42.0), event(3, item=7.0)])

    assert receipt.duplicates == 1
    assert [r.index for r in receipt.rejected] == [1, 2]
    assert await past(store, "42") == [("7", NOW - 10)]


async def test_a_click_keeps_the_features_it_brings(events: Door, store: MemoryStore):
    await events.record([event(1, features={"price": 9.5, "tags": ["a", "b"]})])

    fetched = await store.fetch("u1", [], before=NOW, limit=1)

    assert fetched.behaviours[0].features == {"price": 9.5, "tags": ["a", "b"]}


async def test_good_events_are_taken_and_bad_ones_named_by_place(events: Door):
    receipt = await events.record([event(1), event(2, type="view"), event(3), "no event", {"event_id": 5}])

    assert receipt.accepted == 2
    assert [(r.index, r.event_id) for r in receipt.rejected] == [(1, "e2"), (3, None), (4, "5")]


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (event(type="view"), '/type: expected "click" or "impression", got "view"'),
        (event(ts="now"), '/ts: expected a number >= 0 and < 253402300800, got "now"'),
        (event(ts=-1), "/ts: "),
        (event(ts=NOW * 1000), "/ts: "),
        (event(ts=NOW + 301), "/ts: expected at most 300 s from now"),
        (event(event_id=""), "/event_id: "),
        (event(event_id=None), "event_id"),
        (event(item=""), "/item: "),
        (event(item=["ad7"]), "item"),
        (event(item=1.5), "/item: expected a string of 1 to 256 characters or an integer, got 1.5"),
        (event(item="x" * 257), "/item: "),
        (event(user="x" * 257), "/user: "),
        (event(user=True), "user"),
        (event(user=None), "request_id of an anonymous request"),
        (event(user=None, request_id=""), "/request_id: "),
        (event(position="top"), "position"),
        (event(features={"price": {"usd": 1}}), "/features/price: "),
        (event(features={"text": "x" * 10_000}), "features take"),
        (event(features=[1]), "features"),
        (event(colour="red"), "colour"),
        ({"event_id": "e1"}, '/type: expected "click" or "impression", got nothing'),
        ([], "the event: expected an object, got a list of 0"),
        (None, "the event: expected an object, got null"),
    ],
)
async def test_a_bad_event_is_rejected_with_its_reason(events: Door, store: MemoryStore, sent: Any, says: str):
    assert says in await reason(events, sent)
    assert await past(store) == []


async def test_a_clock_a_little_ahead_is_forgiven(events: Door):
    assert (await events.record([event(ts=NOW + 299)])).accepted == 1


TEXT = st.text(st.characters())  # halves of surrogate pairs too: JSON can name them
NUMBERS = st.integers() | st.floats() | st.builds(pow, st.just(10), st.sampled_from([30, 400, 4000]))
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)
EVENT = st.fixed_dictionaries({name: st.just(value) | JSON for name, value in event().items()}, optional={"x": JSON})


@given(sent=st.lists(EVENT | st.builds(lambda f, t: event(features={t: f}), JSON, TEXT) | JSON, max_size=5))
@example(sent=[event(user="\ud800")])
@example(sent=[event(ts=10**400)])
@example(sent=[event(user=10**400)])
@example(sent=[{**event(), "\ud800": 1}])
@example(sent=[event(features={"x": 10**400})])
async def test_nothing_a_client_sends_is_an_exception_but_a_problem(sent: list[Any]):
    arms = [{"name": "mian", "model": "mian", "share": 100}]
    experiment = parse({"experiment": "test", "salt": "s", "arms": arms}, source="test")
    events = Door(MemoryStore(), Running(experiment), Metrics())

    try:
        receipt = await events.record_body(json.dumps(sent).encode())
    except Refusal as refusal:  # NaN, infinity, half a surrogate pair: no JSON that could be taken in part
        document = json.loads(problems.body_of(refusal))
    else:
        document = None

    if document is not None:
        assert document["status"] == 422
        return

    assert receipt.accepted + receipt.duplicates + len(receipt.rejected) == len(sent)
    assert msgspec.json.encode(receipt)


class DownForClicks(MemoryStore):
    """Fails its first append after having stored the first event of it."""

    failures_left = 1

    async def append(self, events: Any) -> list[Outcome]:
        if self.failures_left:
            self.failures_left -= 1
            await super().append(events[:1])
            raise StoreUnavailable("down")
        return await super().append(events)


async def test_a_call_that_failed_half_way_is_made_again_and_loses_no_click(experiment: Experiment, metrics: Metrics):
    store = DownForClicks()
    events = Door(store, Running(experiment), metrics)
    sent = [event(1, type="impression"), event(2), event(3, item="ad8")]

    with pytest.raises(StoreUnavailable):
        await events.record(sent)
    again = await events.record(sent)

    assert (again.accepted, again.duplicates) == (2, 1)
    assert await past(store) == [("ad7", NOW - 10), ("ad8", NOW - 10)]
    assert metrics.registry.get_sample_value("clickserve_store_errors_total", {"op": "append"}) == 1
