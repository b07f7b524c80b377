"""What a client is told of a bad request: each by its status, its pointer and a sentence, and none by a 500."""

import asyncio
import json
from typing import Any

import pytest

from tests.service.conftest import Running

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
    "a column of features": (body(candidates={"id": ["a1"], "features": [{}]}), 422, "/candidates/features"),
    "a candidate without id": (body(candidates=[{"id": "a1"}, {}]), 422, "/candidates/1/id"),
    "an empty id": (body(candidates=[{"id": ""}]), 422, "/candidates/0/id"),
    "an empty id in columns": (body(candidates={"id": ["a1", ""]}), 422, "/candidates/id/1"),
    "an id that is no id": (body(candidates=[{"id": 1.5}]), 422, "/candidates/0/id"),
    "an id that looks whole": (b'{"candidates": [{"id": 42.0}]}', 422, "/candidates/0/id"),
    "an id with an exponent, in columns": (b'{"candidates": {"id": [1e2]}}', 422, "/candidates/id/0"),
    "a user of an odd number": (b'{"user": {"id": 42.0}, "candidates": [{"id": 1}]}', 422, "/user/id"),
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
    "an explanation of too many": (body(explain=True, candidates=[{"id": 1}] * 21), 422, "/candidates"),
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


async def test_the_first_bad_field_is_told_and_all_values_that_a_model_cannot_take(service: Running) -> None:
    candidates = [{"id": "a1", "features": {"price": "x"}}, {"id": "a2"}, {"id": "a3", "features": {"price": True}}]

    shapes = await service.predict(user=7, ts="now", candidates=[{"id": None}, {"features": {}}])
    values = await service.predict(user={"features": {"gender": []}}, candidates=candidates)

    assert [e["pointer"] for e in shapes.json()["errors"]] == ["/user"]
    wrong = ["/user/features/gender", "/candidates/0/features/price", "/candidates/2/features/price"]
    assert [e["pointer"] for e in values.json()["errors"]] == wrong


async def test_a_thousand_bad_values_are_told_in_a_hundred_errors(service: Running) -> None:
    answer = await service.predict(candidates={"id": list(range(1000)), "price": ["x"] * 1000})

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


@pytest.mark.parametrize("path", ["/predict", "/events"])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
async def test_no_depth_of_nesting_is_a_500(service: Running, path: str, opening: str) -> None:
    closing = {"[": "]", '{"a":': "}"}[opening]
    statuses = set()

    # Python's own limit lies at a thousand, less what the caller has used of it, and each step below uses some more.
    for depth in range(300, 1000, 4):
        deep = opening * depth + "1" + closing * depth
        for sent in (
            f'{{"candidates": [{{"id": 1}}], "context": {{"device": {deep}}}}}',
            f'{{"candidates": 0, "context": {{"device": {deep}}}}}',
            f'[{{"event_id": 1, "features": {{"x": {deep}}}}}]',
            f'[{{"event_id": 1, "features": {{"x": {deep}}}}}, NaN]',
        ):
            statuses.add((await service.client.post(path, content=sent)).status_code)

    assert statuses <= {202, 422}


async def test_a_compressed_body_is_refused_by_its_name(service: Running) -> None:
    answer = await service.client.post("/predict", content=body(), headers={"content-encoding": "gzip"})
    plain = await service.client.post("/predict", content=body(), headers={"content-encoding": "identity"})

    assert (answer.status_code, answer.headers["content-type"]) == (415, "application/problem+json")
    assert "gzip" in answer.json()["detail"]
    assert plain.status_code == 200


async def test_a_body_that_does_not_come_is_not_waited_for(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.http.routes.BODY_S", 0.01)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return await asyncio.Future()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/events", "headers": [], "query_string": b""}
    await service.app(scope, receive, send)

    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]  # the rest of the body is no next request


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
