"""A rejected event says what is wrong with it in one sentence; the others of the call are taken."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.http.event_schemas import checked

NOW = 1_795_000_000.0


def event(**fields: Any) -> dict[str, Any]:
    return {"event_id": "e1", "type": "click", "ts": NOW - 10, "user": "u1", "item": "ad7", **fields}


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (event(type="view"), '/type: expected "click" or "impression", got "view"'),
        (event(type=1), '/type: expected "click" or "impression", got 1'),
        (event(ts="now"), '/ts: expected a number >= 0 and < 253402300800, got "now"'),
        (event(ts=-1), "/ts: expected a number >= 0 and < 253402300800, got -1"),
        (event(ts=10**400), "/ts: expected a number >= 0 and < 253402300800, got 1000"),
        (event(ts=NOW - 31 * 86_400), "/ts: expected at most 30 days ago, as long as the store keeps clicks, got "),
        (event(ts=20261129), "/ts: expected at most 30 days ago"),
        (event(ts=float("nan")), "/ts: expected a number >= 0 and < 253402300800, got NaN"),
        (event(item=1.5), "/item: expected a string of 1 to 256 characters or an integer, got 1.5"),
        (event(user=""), '/user: expected a string of 1 to 256 characters or an integer, got ""'),
        (event(position="top"), '/position: expected an integer, got "top"'),
        (event(features={"size": 1, "price": {"usd": 1}}), "/features/price: expected "),
        (event(features={"size": [1], "tags": ["a", []]}), "/features/tags/1: expected "),
        (event(features={"coins": "x" * 9000}), "/features: features take 9010 bytes, more than 8192"),
        (event(context={"page": "x" * 9000}), "/context: features take 9009 bytes, more than 8192"),
        (event(features=[1]), "/features: expected an object, got a list of 1"),
        (event(colour="red"), "/colour: expected one of event_id, type, ts, item, user, request_id, position, "),
        (event(itm="x"), 'got an unknown field "itm" (did you mean item?)'),
        ({"event_id": "e1"}, '/type: expected "click" or "impression", got nothing'),
        ([], "the event: expected an object, got a list of 0"),
        (None, "the event: expected an object, got null"),
    ],
)
def test_a_rejected_event_says_what_is_wrong_and_where(sent: Any, says: str) -> None:
    taken, rejected = checked([event(), sent], now=NOW, max_age_s=30 * 86_400)

    assert list(taken) == [0]
    assert [rejection.index for rejection in rejected] == [1]
    assert says in rejected[0].reason


TEXT = st.text(st.characters())  # halves of surrogate pairs too: JSON can name them
NUMBERS = st.integers() | st.floats() | st.builds(pow, st.just(10), st.sampled_from([30, 400, 4000]))
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)
EVENTS = st.fixed_dictionaries({name: st.just(value) | JSON for name, value in event().items()}, optional={"x": JSON})


@given(sent=st.lists(EVENTS | st.builds(lambda name, value: event(features={name: value}), TEXT, JSON) | JSON))
def test_whatever_is_sent_every_event_is_taken_or_rejected(sent: list[Any]) -> None:
    taken, rejected = checked(sent, now=NOW, max_age_s=30 * 86_400)

    assert len(taken) + len(rejected) == len(sent)
