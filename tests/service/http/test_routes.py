"""What a client sees of /predict and /events: odd requests that are scored, and the laws of the good ones."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.features.values import canonical
from service.ids import canonical_id
from tests.service.conftest import Running, Start
from tests.service.tiny import T

GOOD: dict[str, Any] = {"user": {"id": "u1"}, "candidates": [{"id": "a1"}, {"id": "a2"}]}


NULLS = dict.fromkeys(("user", "context", "behaviours", "ts", "timeout_ms", "explain", "request_id"))
AD = [{"id": "a1"}]
ODD: dict[str, dict[str, Any]] = {
    "an unknown user": {"user": {"id": "nobody"}, "candidates": AD},
    "no user": {"candidates": AD},
    "a user without id": {"user": {}, "candidates": AD},
    "an unknown item": {"user": {"id": "u1"}, "candidates": [{"id": "never seen"}]},
    "an unknown gender": {"user": {"id": "u1", "features": {"gender": "?"}}, "candidates": AD},
    "unknown genres": {"candidates": [{"id": "a1", "features": {"genres": ["?", 3, None]}}]},
    "unknown user features": {"user": {"id": "u1", "features": {"shoe": 42}}, "candidates": AD},
    "unknown context": {"context": {"moon": {"full": True}}, "candidates": AD},
    "unknown item features": {"candidates": [{"id": "a1", "features": {"smell": []}}]},
    "a value the clock gives": {"user": {"id": "u1"}, "context": {"hour": "noon"}, "candidates": AD},
    "nulls": {**NULLS, "candidates": [{"id": "a1", "features": None}]},
    "numbers for ids": {"user": {"id": 7}, "candidates": [{"id": -3}, {"id": 10**30}]},
    "numbers for words": {"user": {"features": {"gender": 1.5}}, "context": {"device": True}, "candidates": AD},
    "no explanation": {"user": {"id": "u1"}, "explain": False, "candidates": AD},
    "the time zero": {"ts": 0, "candidates": AD},
    "the last time": {"ts": 253402300799.9, "candidates": AD},
    "1000 candidates": {"candidates": [{"id": i} for i in range(1000)]},
    "behaviours in no order, one to come": {
        "ts": 9,
        "behaviours": [{"item": "a2", "ts": 3}, {"item": 1, "ts": 1}, {"item": "a1", "ts": 99}],
        "candidates": AD,
    },
}


@pytest.mark.parametrize("name", ODD)
async def test_an_odd_request_is_scored(service: Running, name: str) -> None:
    request = ODD[name]

    answer = await service.predict(**request)

    assert answer.status_code == 200, answer.text
    predictions = answer.json()["predictions"]
    assert [p["id"] for p in predictions] == [c["id"] for c in request["candidates"]]
    assert all(0 < p["ctr"] < 1 for p in predictions)
    assert answer.json()["degraded"] == []


async def test_the_answer_names_what_scored_it(service: Running) -> None:
    answer = await service.predict(request_id="r-1", user={"id": "u2"}, candidates=[{"id": "a1"}])

    told = answer.json()
    assert list(told) == ["request_id", "experiment", "arm", "model", "version", "predictions", "degraded"]
    assert (told["request_id"], told["experiment"], told["arm"], told["model"]) == ("r-1", "test", "two", "other")
    models = {m["arm"]: m for m in (await service.client.get("/models")).json()}
    assert told["version"] == models["two"]["version"]


async def test_a_request_without_id_is_given_one(service: Running) -> None:
    first, second = [(await service.predict(**GOOD)).json()["request_id"] for _ in range(2)]

    assert first
    assert first != second


async def test_an_anonymous_request_is_assigned_by_its_request_id(start: Start) -> None:
    async with start() as service:
        arms = {
            name: {(await service.predict(request_id=name, candidates=[{"id": "a1"}])).json()["arm"] for _ in range(5)}
            for name in map(str, range(20))
        }

    assert all(len(drawn) == 1 for drawn in arms.values())
    assert set().union(*arms.values()) == {"one", "two"}


ids = st.sampled_from(["a1", "a2", "a3", "new", 7, "7"])
features = st.fixed_dictionaries(
    {},
    optional={
        "price": st.one_of(st.none(), st.integers(-5, 5), st.floats(-1e6, 1e6)),
        "genres": st.one_of(st.none(), st.lists(st.sampled_from(["x", "y", "z", "?", 1, None]), max_size=4)),
        "smell": st.just("sweet"),
    },
)
candidates = st.lists(st.builds(lambda i, f: {"id": i, "features": f}, ids, features), min_size=1, max_size=8)
fixed = {"user": {"id": "u3"}, "ts": 1000.5, "context": {"device": "tv"}, "behaviours": [{"item": "a2", "ts": 5.0}]}
laws = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


async def ctr(service: Running, **request: Any) -> list[float]:
    answer = await service.predict(**{**fixed, **request})
    assert answer.status_code == 200, answer.text
    predictions = answer.json()["predictions"]
    return predictions["ctr"] if isinstance(predictions, dict) else [p["ctr"] for p in predictions]


@laws
@given(rows=candidates)
async def test_columns_and_rows_score_alike(service: Running, rows: list[dict[str, Any]]) -> None:
    names = {name for row in rows for name in row["features"]}
    columns = {name: [row["features"].get(name) for row in rows] for name in names}

    by_columns = await service.predict(**fixed, candidates={"id": [row["id"] for row in rows], **columns})

    assert by_columns.json()["predictions"] == {
        "id": [row["id"] for row in rows],
        "ctr": await ctr(service, candidates=rows),
    }


@laws
@given(rows=candidates)
async def test_a_candidate_scores_the_same_alone_and_in_any_company(
    service: Running, rows: list[dict[str, Any]]
) -> None:
    together = await ctr(service, candidates=rows)

    alone = [(await ctr(service, candidates=[row]))[0] for row in rows]
    backwards = await ctr(service, candidates=rows[::-1])

    assert together == pytest.approx(alone, abs=1e-6)
    assert together == pytest.approx(backwards[::-1], abs=1e-6)


async def test_the_same_candidate_twice_scores_the_same_twice(service: Running) -> None:
    first, _, second = await ctr(service, candidates=[{"id": "a1"}, {"id": "a2"}, {"id": "a1"}])

    assert first == second


async def test_a_click_counts_for_the_very_next_request_and_only_for_later_ones(service: Running) -> None:
    click = {"event_id": "e1", "type": "click", "ts": 500.0, "user": "u4", "item": "a3"}
    asked: dict[str, Any] = {"user": {"id": "u4"}, "behaviours": None, "candidates": [{"id": "a1"}]}
    before = await ctr(service, **asked, ts=501)

    receipt = await service.client.post("/events", json=[click, click, {"type": "click"}])
    after = await ctr(service, **asked, ts=501)
    at_the_same_time = await ctr(service, **asked, ts=500)

    assert receipt.status_code == 202
    told = receipt.json()
    assert (told["accepted"], told["duplicates"], [r["index"] for r in told["rejected"]]) == (1, 1, [2])
    assert after != before
    assert at_the_same_time == await ctr(service, **{**asked, "behaviours": []}, ts=500)


@pytest.mark.parametrize(("clicked", "asked"), [(42, "42"), ("42", 42), (-7, "-7"), (2**64, str(2**64))])
async def test_a_number_and_its_spelling_are_one_user_and_one_item(
    service: Running, clicked: str | int, asked: str | int
) -> None:
    await service.store.put_items({"3": {"price": 4.0, "genres": ["x"]}})
    click = {"event_id": 1, "type": "click", "ts": 5, "user": clicked, "item": 3}
    request: dict[str, Any] = {"user": {"id": asked}, "behaviours": None, "candidates": [{"id": "3"}]}
    before = await service.predict(**{**request, "ts": 5})

    await service.client.post("/events", json=[click])
    after = await service.predict(**{**request, "ts": 6, "candidates": [{"id": 3}, {"id": "3"}]})

    as_number, as_text = after.json()["predictions"]
    assert [as_number["id"], as_text["id"]] == [3, "3"]
    assert as_number["ctr"] == as_text["ctr"] != before.json()["predictions"][0]["ctr"]
    assert after.json()["arm"] == before.json()["arm"]


@given(number=st.integers())
def test_an_id_is_spelled_as_the_schema_spells_it(number: int) -> None:
    assert canonical_id(number) == canonical_id(str(number)) == canonical(number)


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/models", "/experiments", "/"])
async def test_what_can_be_read_can_be_probed(service: Running, path: str) -> None:
    read, probed = await service.client.get(path), await service.client.head(path)

    assert probed.status_code == read.status_code < 400


async def test_inline_behaviours_replace_the_stored_ones(service: Running) -> None:
    inline = [{"item": f"a{i}", "ts": float(i)} for i in (3, 1, 2, 4)]
    clicks = [{"event_id": f"x{b['item']}", "type": "click", "user": "u9", **b} for b in inline]
    asked: dict[str, Any] = {"user": {"id": "u9"}, "ts": 4.0, "candidates": [{"id": "a1"}]}
    given_inline = await ctr(service, **asked, behaviours=inline)
    none_given = await ctr(service, **asked, behaviours=[])

    await service.client.post("/events", json=clicks)

    assert await ctr(service, **asked, behaviours=None) == given_inline
    assert await ctr(service, **asked, behaviours=[]) == none_given
    assert given_inline != none_given
    assert len(inline) > T
