"""What a client sees of /predict and /events: every bad input, and the laws of the good ones."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.service.conftest import Running, Start
from tests.service.tiny import T

GOOD: dict[str, Any] = {"user": {"id": "u1"}, "candidates": [{"id": "a1"}, {"id": "a2"}]}


def body(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def price(literal: str) -> bytes:
    """A request whose first candidate has that price, to the letter."""
    return b'{"candidates": [{"id": "a1", "features": {"price": %s}}]}' % literal.encode()


def prices(literal: str) -> bytes:
    return b'{"candidates": {"id": ["a1", "a2"], "price": [1, %s]}}' % literal.encode()


def feature(name: str, value: Any) -> bytes:
    return body(candidates=[{"id": "a1"}, {"id": "a2", "features": {name: value}}])


PRICE = "/candidates/0/features/price"
BAD: dict[str, tuple[bytes, int, str | None]] = {
    "an empty body": (b"", 400, None),
    "no JSON": (b"hello", 400, None),
    "cut-off JSON": (body()[:-9], 400, None),
    "no UTF-8": (b'{"user": {"id": "\xff"}}', 400, None),
    "UTF-16": (body().decode().encode("utf-16"), 400, None),
    "a list": (b"[]", 422, ""),
    "null": (b"null", 422, ""),
    "no candidates": (b'{"user": {"id": "u1"}}', 422, "/candidates"),
    "candidates that are text": (body(candidates="a1"), 422, "/candidates"),
    "candidates that are null": (body(candidates=None), 422, "/candidates"),
    "0 candidates": (body(candidates=[]), 422, "/candidates"),
    "0 candidates in columns": (body(candidates={"id": []}), 422, "/candidates"),
    "1001 candidates": (body(candidates=[{"id": "a1"}] * 1001), 422, "/candidates"),
    "1001 candidates in columns": (body(candidates={"id": ["a1"] * 1001}), 422, "/candidates"),
    "columns without id": (body(candidates={"price": [1]}), 422, "/candidates/id"),
    "columns of unequal length": (body(candidates={"id": ["a1", "a2"], "price": [1]}), 422, "/candidates/price"),
    "a column that is no list": (body(candidates={"id": ["a1"], "price": 1}), 422, "/candidates/price"),
    "a candidate without id": (body(candidates=[{"id": "a1"}, {}]), 422, "/candidates/1/id"),
    "an empty id": (body(candidates=[{"id": ""}]), 422, "/candidates/0/id"),
    "an empty id in columns": (body(candidates={"id": ["a1", ""]}), 422, "/candidates/id/1"),
    "an id that is no id": (body(candidates=[{"id": 1.5}]), 422, "/candidates/0/id"),
    "an id that is a truth value": (body(candidates={"id": [True]}), 422, "/candidates/id/0"),
    "an endless id": (body(candidates=[{"id": "a" * 257}]), 422, "/candidates/0/id"),
    "a lone surrogate": (b'{"candidates": [{"id": "\\ud800"}]}', 422, "/candidates/0/id"),
    "a surrogate in a list": (price('["\\udfff"]'), 422, f"{PRICE}/0"),
    "a surrogate in an unknown name": (b'{"candidates": [{"id": 1}], "\\ud800": 1}', 422, "/\\ud800"),
    "a surrogate in a feature's name": (
        b'{"candidates": [{"id": 1}], "context": {"\\ud800": 1}}',
        422,
        "/context/\\ud800",
    ),
    "NaN": (price("NaN"), 422, PRICE),
    "NaN in a column": (prices("NaN"), 422, "/candidates/price/1"),
    "infinity": (price("-Infinity"), 422, PRICE),
    "a number no double holds": (price("1e999"), 422, PRICE),
    "an integer no double holds": (price("1" + "0" * 320), 422, PRICE),
    "an endless integer": (price("1" * 5000), 422, PRICE),
    "text for a number": (feature("price", "9"), 422, "/candidates/1/features/price"),
    "text for a number in a column": (prices('"9"'), 422, "/candidates/price/1"),
    "one value for a list": (feature("genres", "x"), 422, "/candidates/1/features/genres"),
    "an object for a value": (body(context={"device": {"a": 1}}), 422, "/context/device"),
    "a list for a value": (body(user={"id": "u1", "features": {"gender": ["F"]}}), 422, "/user/features/gender"),
    "features that are a list": (body(user={"id": "u1", "features": []}), 422, "/user/features"),
    "a user that is text": (body(user="u1"), 422, "/user"),
    "an unknown field": (body(usr={"id": 1}), 422, "/usr"),
    "an unknown field with a slash": (body(**{"a/b~": 1}), 422, "/a~1b~0"),
    "an unknown field of a candidate": (body(candidates=[{"id": "a1", "price": 1}]), 422, "/candidates/0/price"),
    "a time that is text": (body(ts="now"), 422, "/ts"),
    "a negative time": (body(ts=-1), 422, "/ts"),
    "a time in milliseconds": (body(ts=1795000000250), 422, "/ts"),
    "no time left": (body(timeout_ms=0), 422, "/timeout_ms"),
    "a behaviour without time": (body(behaviours=[{"item": "a1"}]), 422, "/behaviours/0/ts"),
    "a behaviour's bad feature": (
        body(ts=9, behaviours=[{"item": "a1", "ts": 1, "features": {"genres": 1}}]),
        422,
        "/behaviours/0/features/genres",
    ),
    "an explanation": (body(explain=True), 422, "/explain"),
    "an empty request id": (body(request_id=""), 422, "/request_id"),
    "endless nesting": (b'{"context": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}", 422, ""),
    "2 MB and more": (body(context={"x": "a" * 2_200_000}), 413, None),
    "10 MB": (body(context={"x": "a" * 10_000_000}), 413, None),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_request_is_told_what_is_wrong_and_where(service: Running, name: str) -> None:
    content, status, pointer = BAD[name]

    answer = await service.client.post("/predict", content=content)

    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    if pointer is None:
        assert "errors" not in problem
    else:
        assert [e["pointer"] for e in problem["errors"]] == [pointer]
        assert set(problem["errors"][0]) == {"pointer", "expected", "got"}


async def test_all_bad_fields_are_told_at_once(service: Running) -> None:
    candidates = [{"id": "a1", "features": {"price": "x"}}, {"id": "a2"}, {"id": "a3", "features": {"price": True}}]

    shapes = await service.predict(user=7, ts="now", candidates=[{"id": None}, {"features": {}}])
    values = await service.predict(user={"features": {"gender": []}}, candidates=candidates)

    assert [e["pointer"] for e in shapes.json()["errors"]] == ["/user", "/ts", "/candidates/0/id", "/candidates/1/id"]
    wrong = ["/user/features/gender", "/candidates/0/features/price", "/candidates/2/features/price"]
    assert [e["pointer"] for e in values.json()["errors"]] == wrong


async def test_a_thousand_bad_candidates_are_told_in_a_hundred_errors(service: Running) -> None:
    shapes = await service.predict(candidates=[{}] * 1000)
    values = await service.predict(candidates={"id": list(range(1000)), "price": ["x"] * 1000})

    for answer in (shapes, values):
        assert answer.status_code == 422
        assert len(answer.json()["errors"]) == 100


async def test_an_endless_body_is_refused_as_soon_as_it_is_too_large(service: Running) -> None:
    sent, statuses = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal sent
        sent += 2**16
        assert sent < 3 * 2**20, "it reads on and on"
        return {"type": "http.request", "body": b"x" * 2**16, "more_body": True}

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b""}
    await service.app(scope, receive, send)

    assert statuses[0] == 413


async def test_a_body_that_does_not_come_is_not_waited_for(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.BODY_S", 0.01)
    statuses = []

    async def receive() -> dict[str, Any]:
        return await asyncio.Future()

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    scope = {"type": "http", "method": "POST", "path": "/events", "headers": [], "query_string": b""}
    await service.app(scope, receive, send)

    assert statuses[0] == 408


async def test_a_client_that_leaves_is_counted_and_disturbs_nobody(service: Running) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pytest.fail(f"nobody is there to read {message}")

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b""}
    await service.app(scope, receive, send)

    assert await service.metric('clickserve_requests_total{arm="none",route="/predict",status="499"}') == 1


async def test_a_wrong_path_and_a_wrong_method_are_problems_too(service: Running) -> None:
    path = await service.client.get("/predictions")
    method = await service.client.get("/predict")

    assert (path.status_code, path.headers["content-type"]) == (404, "application/problem+json")
    assert (method.status_code, method.headers["content-type"]) == (405, "application/problem+json")
    assert method.headers["allow"] == "POST"


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


EVENTS: dict[str, tuple[bytes, int]] = {
    "cut-off JSON": (b'[{"event_id"', 400),
    "an object": (b"{}", 422),
    "NaN": (b'[{"event_id": "e", "type": "click", "ts": NaN}]', 422),
    "1001 events": (b"[" + b",".join([b"{}"] * 1001) + b"]", 422),
    "10 MB": (b'["' + b"x" * 10_000_000 + b'"]', 413),
}


@pytest.mark.parametrize("name", EVENTS)
async def test_bad_events_are_refused_whole(service: Running, name: str) -> None:
    content, status = EVENTS[name]

    answer = await service.client.post("/events", content=content)

    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
