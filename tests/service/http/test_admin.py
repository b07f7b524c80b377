"""Who may change a running service, and what the shares then are."""

import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from service import settings
from service.settings import Settings
from tests.service.conftest import TWO_ARMS, Running, Start

pytestmark = pytest.mark.usefixtures("measured_once")

TOKEN = {"authorization": "Bearer s3cret"}
SHADOWED = {**TWO_ARMS, "shadow": [{"name": "new", "model": "tiny", "share": 10}]}
ROUTES = [("POST", "/models/one/load"), ("POST", "/models/one/rollback"), ("PUT", "/experiments/test")]


@pytest.fixture
async def service(start: Start) -> AsyncIterator[Running]:
    async with start(experiment=SHADOWED, admin_token="s3cret") as running:
        yield running


async def reshare(service: Running, body: Any, experiment: str = "test") -> httpx.Response:
    return await service.client.put(f"/experiments/{experiment}", json=body, headers=TOKEN)


def shares(told: dict[str, Any]) -> dict[str, float]:
    return {arm["name"]: arm["share"] for arm in (*told["arms"], *told["shadow"])}


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_without_a_token_set_nobody_may(method: str, path: str, start: Start) -> None:
    async with start() as service:
        refused = await service.client.request(method, path, json={}, headers=TOKEN)

    assert refused.status_code == 403
    assert "CLICKSERVE_ADMIN_TOKEN" in refused.json()["detail"]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Bearer s3cre", "Basic s3cret", "s3cret"]
)
async def test_without_the_token_nobody_may(given: str | None, method: str, path: str, service: Running) -> None:
    headers = {} if given is None else {"authorization": given}

    refused = await service.client.request(method, path, content=b"not read", headers=headers)

    assert refused.status_code == 401
    assert refused.headers["www-authenticate"].startswith("Bearer")
    assert refused.headers["content-type"] == "application/problem+json"


async def test_a_token_of_other_characters_is_just_wrong(service: Running) -> None:
    refused = await service.client.post("/models/one/load", headers={b"authorization": "Bearer \u00e9".encode()})

    assert refused.status_code == 401


async def test_the_token_is_never_told(service: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    await reshare(service, {"shares": {"one": 1}})
    await reshare(service, {"shares": {"none": 1}})
    told = [str(vars(record)) for record in caplog.records] + [repr(service.api._settings), str(service.api._settings)]

    assert len(caplog.records) > 1
    assert not any("s3cret" in line for line in told)


def test_the_token_reaches_the_workers_in_their_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLICKSERVE_ADMIN_TOKEN", "s3cret")

    told = Settings(**settings.load().model_dump(mode="json"))
    monkeypatch.delenv("CLICKSERVE_ADMIN_TOKEN")
    untold = Settings(**settings.load().model_dump(mode="json"))

    assert told.admin_token is not None
    assert told.admin_token.get_secret_value() == "s3cret"
    assert untold.admin_token is None


async def test_new_shares_hold_for_the_next_request_and_for_its_events(service: Running) -> None:
    everyone = [f"user-{n}" for n in range(40)]

    answer = await reshare(service, {"shares": {"one": 100, "two": 0}})
    arms = {(await service.predict(user={"id": u}, candidates=[{"id": "a1"}])).json()["arm"] for u in everyone}
    seen = [{"event_id": u, "type": "impression", "ts": 1.0, "user": u, "item": "a1"} for u in everyone]
    await service.client.post("/events", json=seen)

    assert answer.status_code == 200
    assert shares(answer.json()) == {"one": 100, "two": 0, "new": 10}
    assert [arm["propensity"] for arm in answer.json()["arms"]] == [1, 0]
    assert (await service.client.get("/experiments")).json() == [answer.json()]
    assert arms == {"one"}
    assert await service.metric('clickserve_impressions_total{arm="one"}') == 40


@pytest.mark.parametrize(
    ("body", "after"),
    [
        ({"shares": {"one": 60, "two": 40}}, {"one": 60, "two": 40, "new": 10}),
        ({"shares": {"one": 60}}, {"one": 60, "two": 50, "new": 10}),
        ({"shadow": {"new": 0.5}}, {"one": 50, "two": 50, "new": 0.5}),
        ({"kill": ["two"]}, {"one": 50, "two": 0, "new": 10}),
        ({"kill": ["new"]}, {"one": 50, "two": 50, "new": 0}),
        ({"kill": ["two"], "shares": {"one": 1, "two": 9}}, {"one": 1, "two": 0, "new": 10}),
        ({}, {"one": 50, "two": 50, "new": 10}),
    ],
)
async def test_who_is_not_named_keeps_its_share(body: Any, after: dict[str, float], service: Running) -> None:
    answer = await reshare(service, body)

    assert (answer.status_code, shares(answer.json())) == (200, after)


async def test_a_killed_arm_comes_back_with_a_share(service: Running) -> None:
    await reshare(service, {"kill": ["two"]})

    answer = await reshare(service, {"shares": {"two": 50}})

    assert shares(answer.json()) == {"one": 50, "two": 50, "new": 10}


@pytest.mark.parametrize(
    ("body", "at", "told"),
    [
        ({"shares": {"none": 1}}, "/shares/none", "one of one, two"),
        ({"shares": {"new": 1}}, "/shares/new", "one of one, two"),
        ({"shadow": {"one": 1}}, "/shadow/one", "one of new"),
        ({"shares": {"one": -1}}, "/shares/one", "a number >= 0 and <= 1000000000"),
        ({"shares": {"one": "1"}}, "/shares/one", "a number >= 0 and <= 1000000000"),
        ({"shares": {"one": 1e308, "two": 1e308}}, "/shares/one", "a number >= 0 and <= 1000000000"),
        ({"shadow": {"new": 100.5}}, "/shadow/new", "a number >= 0 and <= 100"),
        ({"kill": ["one", "none"]}, "/kill/1", "one of new, one, two"),
        ({"kill": ["one", "two"]}, "", "shares that fit together"),
        ({"killed": []}, "/killed", "one of shares, shadow, kill"),
        ([], "", "an object"),
    ],
)
async def test_wrong_shares_are_refused_by_their_place_and_change_nothing(
    body: Any, at: str, told: str, service: Running
) -> None:
    refused = await reshare(service, body)

    assert refused.status_code == 422
    assert (refused.json()["errors"][0]["pointer"], refused.json()["errors"][0]["expected"]) == (at, told)
    assert shares((await service.client.get("/experiments")).json()[0]) == {"one": 50, "two": 50, "new": 10}


async def test_an_experiment_that_does_not_run_is_not_found(service: Running) -> None:
    refused = await reshare(service, {}, experiment="other")

    assert (refused.status_code, refused.json()["detail"]) == (404, 'there is no experiment "other"; test runs')


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"version": 1}', b'{"v": "x"}'])
async def test_a_wrong_body_of_a_load_is_refused(body: bytes, service: Running) -> None:
    refused = await service.client.post("/models/one/load", content=body, headers=TOKEN)

    assert refused.status_code == (400 if body == b"{" else 422)


async def test_the_documents_tell_of_the_routes_and_their_token(service: Running) -> None:
    document = (await service.client.get("/openapi.json")).json()

    scheme = document["components"]["securitySchemes"]["token"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path, method in (("/models/{arm}/load", "post"), ("/experiments/{name}", "put")):
        assert document["paths"][path][method]["security"] == [{"token": []}]
        assert "requestBody" in document["paths"][path][method]


async def test_a_shadow_arm_is_loaded_and_told(service: Running) -> None:
    told = (await service.client.get("/models")).json()

    assert [(model["arm"], model["device"], model["previous"]) for model in told] == [
        (name, "cpu", []) for name in ("one", "two", "new")
    ]
