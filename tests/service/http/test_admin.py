"""Who may change a running service, and what the shares then are."""

import asyncio
import logging
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import settings
from service.settings import Settings
from service.store.control_store import MemoryControlStore
from service.store.feature_store import StoreUnavailable
from tests.service import tiny
from tests.service.conftest import TWO_ARMS, Running, Start

pytestmark = pytest.mark.usefixtures("measured_once")

TOKEN = {"authorization": "Bearer s3cret"}
ALICE = {"authorization": "Bearer of-alice"}
SHADOWED = {**TWO_ARMS, "shadow": [{"name": "new", "model": "tiny", "share": 10}]}
AS_IN_THE_FILE = {"one": 50, "two": 50, "new": 10}
CHANGING = [("POST", "/models/one/load"), ("POST", "/models/one/rollback"), ("PUT", "/experiments/test")]
ROUTES = [*CHANGING, ("GET", "/experiments/test/audit")]


@pytest.fixture
async def service(start: Start) -> AsyncIterator[Running]:
    async with start(experiment=SHADOWED, admin_token="s3cret", admin_tokens={"alice": "of-alice"}) as running:
        yield running


async def put(service: Running, body: Any, experiment: str = "test", **headers: str) -> httpx.Response:
    return await service.client.put(f"/experiments/{experiment}", json=body, headers={**TOKEN, **headers})


async def get(service: Running) -> httpx.Response:
    return await service.client.get("/experiments/test")


def shares(described: dict[str, Any]) -> dict[str, float]:
    return {arm["name"]: arm["share"] for arm in (*described["arms"], *described["shadow"])}


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


async def test_no_token_is_ever_logged(service: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    await put(service, {"shares": {"one": 60, "two": 40}})
    await put(service, {"shares": {"none": 1}}, **ALICE)
    logged = [str(vars(record)) for record in caplog.records] + [
        repr(service.api._settings),
        str(service.api._settings),
    ]

    assert len(caplog.records) > 1
    assert not any("s3cret" in line or "of-alice" in line for line in logged)


def test_the_tokens_reach_the_workers_in_their_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLICKSERVE_ADMIN_TOKEN", "s3cret")
    monkeypatch.setenv("CLICKSERVE_ADMIN_TOKENS", '{"alice": "of-alice"}')

    handed_on = Settings(**settings.load().model_dump(mode="json"))
    monkeypatch.delenv("CLICKSERVE_ADMIN_TOKEN")
    monkeypatch.delenv("CLICKSERVE_ADMIN_TOKENS")
    without = Settings(**settings.load().model_dump(mode="json"))

    assert {name: token.get_secret_value() for name, token in handed_on.tokens_by_name.items()} == {
        "alice": "of-alice",
        "admin": "s3cret",
    }
    assert without.tokens_by_name == {}


async def test_new_shares_hold_for_the_next_request_and_for_its_events(service: Running) -> None:
    everyone = [f"user-{n}" for n in range(40)]

    answer = await put(service, {"shares": {"one": 100, "two": 0}})
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
    ("body", "after", "killed"),
    [
        ({"shares": {"one": 60, "two": 40}}, {"one": 60, "two": 40, "new": 10}, []),
        ({"shares": {"one": 50}}, AS_IN_THE_FILE, []),
        ({"shadow": {"new": 0.5}}, {"one": 50, "two": 50, "new": 0.5}, []),
        ({"kill": ["two"]}, AS_IN_THE_FILE, ["two"]),
        ({"kill": ["new", "two"]}, AS_IN_THE_FILE, ["new", "two"]),
        ({"kill": ["two"], "shares": {"one": 10, "two": 90}}, {"one": 10, "two": 90, "new": 10}, ["two"]),
        ({"unkill": ["two"]}, AS_IN_THE_FILE, []),
        ({}, AS_IN_THE_FILE, []),
    ],
)
async def test_an_arm_that_is_not_named_stays_as_it_is(
    body: Any, after: dict[str, float], killed: list[str], service: Running
) -> None:
    answer = await put(service, body)

    assert (answer.status_code, shares(answer.json()), answer.json()["killed"]) == (200, after, killed)


async def test_a_killed_arm_answers_nobody_until_it_comes_back(service: Running) -> None:
    async def answering() -> set[str]:
        users = [f"user-{n}" for n in range(40)]
        answers = [await service.predict(user={"id": user}, candidates=[{"id": "a1"}]) for user in users]
        return {answer.json()["arm"] for answer in answers}

    await put(service, {"kill": ["two"]})
    killed = await answering()
    await put(service, {"shares": {"one": 40, "two": 60}})
    still_killed = await answering()
    back = await put(service, {"unkill": ["two"]})

    assert (killed, still_killed, await answering()) == ({"one"}, {"one"}, {"one", "two"})
    assert back.json()["killed"] == []


@pytest.mark.parametrize(
    ("body", "at", "expected", "got"),
    [
        ({"shares": {"none": 1}}, "/shares/none", "one of one, two", '"none"'),
        ({"shares": {"new": 1}}, "/shares/new", "one of one, two", '"new"'),
        ({"shadow": {"one": 1}}, "/shadow/one", "one of new", '"one"'),
        ({"shares": {"one": -1}}, "/shares/one", "a number >= 0 and <= 100", "-1"),
        ({"shares": {"one": "1"}}, "/shares/one", "a number >= 0 and <= 100", '"1"'),
        ({"shares": {"one": 1e308}}, "/shares/one", "a number >= 0 and <= 100", "1e+308"),
        (
            {"shares": {"one": 60}},
            "/shares",
            "shares in percent that sum to 100",
            "a sum of 110 (one 60, two 50)",
        ),
        (
            {"shares": {"one": 33.33, "two": 33.33}},
            "/shares",
            "shares in percent that sum to 100",
            "a sum of 66.66 (one 33.33, two 33.33)",
        ),
        ({"shadow": {"new": 100.5}}, "/shadow/new", "a number >= 0 and <= 100", "100.5"),
        ({"kill": ["one", "none"]}, "/kill/1", "one of new, one, two", '"none"'),
        ({"unkill": ["none"]}, "/unkill/0", "one of new, one, two", '"none"'),
        ({"kill": ["one"], "unkill": ["one"]}, "/unkill/0", "an arm that /kill does not name", '"one"'),
        ({"kill": ["one", "two"]}, "/kill", "an arm left that answers", None),
        ({"kill": ["one"], "shares": {"one": 100, "two": 0}}, "/kill", "an arm left that answers", None),
        ({"killed": []}, "/killed", "one of shares, shadow, kill, unkill", None),
        ([], "", "an object", None),
    ],
)
async def test_wrong_shares_are_refused_by_their_place_and_change_nothing(
    body: Any, at: str, expected: str, got: str | None, service: Running
) -> None:
    before = await get(service)

    refused = await put(service, body)

    assert refused.status_code == 422
    error = refused.json()["errors"][0]
    assert (error["pointer"], error["expected"]) == (at, expected)
    assert got is None or error["got"] == got
    assert (await get(service)).json() == before.json()


async def test_an_experiment_that_does_not_run_is_not_found(service: Running) -> None:
    answers = [
        await put(service, {}, experiment="other"),
        await service.client.get("/experiments/other"),
        await service.client.get("/experiments/other/audit", headers=TOKEN),
    ]

    assert {answer.status_code for answer in answers} == {404}
    assert {answer.json()["detail"] for answer in answers} == {'there is no experiment "other"; test runs'}


async def test_a_change_raises_the_version_and_one_of_nothing_does_not(service: Running) -> None:
    tags = [(await get(service)).headers["etag"]]
    for body in ({"kill": ["two"]}, {"kill": ["two"]}, {}, {"shares": {"one": 50}}, {"unkill": ["two"]}):
        tags.append((await put(service, body)).headers["etag"])

    ready = (await service.client.get("/readyz")).json()

    assert tags == ['"1"', '"2"', '"2"', '"2"', '"2"', '"3"']
    assert ready["control"]["version"] == 3
    assert {model["control_version"] for model in (await service.client.get("/models")).json()} == {3}
    assert await service.metric("clickserve_control_version") == 3


@pytest.mark.parametrize("tag", ['"1"', "1", "*", '"7", "1"'])
async def test_a_change_for_the_version_there_is_is_made(tag: str, service: Running) -> None:
    answer = await put(service, {"kill": ["two"]}, **{"if-match": tag})

    assert (answer.status_code, answer.headers["etag"]) == (200, '"2"')


@pytest.mark.parametrize(
    ("method", "path", "tag"),
    [*((*route, '"2"') for route in CHANGING), *((*CHANGING[-1], tag) for tag in ('W/"1"', "", "one", '"7", "8"'))],
)
async def test_a_change_for_another_version_is_refused_and_told_the_one_there_is(
    method: str, path: str, tag: str, service: Running
) -> None:
    refused = await service.client.request(method, path, json={}, headers={**TOKEN, "if-match": tag})

    assert (refused.status_code, refused.headers["etag"]) == (412, '"1"')
    assert "at version 1" in refused.json()["detail"]
    assert (await get(service)).headers["etag"] == '"1"'


async def test_of_changes_for_one_version_at_once_exactly_one_is_made(service: Running) -> None:
    bodies = [{"shares": {"one": share, "two": 100 - share}} for share in range(8)]

    answers = await asyncio.gather(*(put(service, body, **{"if-match": '"1"'}) for body in bodies))

    assert sorted(answer.status_code for answer in answers) == [200] + [412] * 7
    won = next(answer for answer in answers if answer.status_code == 200)
    assert (await get(service)).json() == won.json()


async def test_changes_at_once_that_name_no_version_are_all_made(service: Running) -> None:
    bodies = [{"kill": ["two"]}, {"kill": ["new"]}, {"shadow": {"new": 3}}]

    answers = await asyncio.gather(*(put(service, body) for body in bodies))
    after = (await get(service)).json()

    assert [answer.status_code for answer in answers] == [200] * 3
    assert (after["version"], after["killed"], shares(after)["new"]) == (4, ["new", "two"], 3)


async def test_the_audit_trail_names_who_changed_what_the_latest_first(start: Start, tmp_path: Path) -> None:
    first = tiny.write(tmp_path, "tiny", seed=1).name
    tiny.write(tmp_path, "other", seed=2)
    async with start(artifacts_dir=tmp_path, admin_token="s3cret", admin_tokens={"alice": "of-alice"}) as service:
        second = tiny.write(tmp_path, "tiny", seed=3).name

        await put(service, {"shares": {"one": 60, "two": 40}})
        await put(service, {"kill": ["two"]}, **ALICE)
        await service.client.post("/models/one/load", json={"version": second}, headers=ALICE)
        audit = (await service.client.get("/experiments/test/audit", headers=ALICE)).json()
        changed_by = (await get(service)).json()["changed_by"]

    assert [(entry["version"], entry["changed_by"]) for entry in audit] == [
        (4, "alice"),
        (3, "alice"),
        (2, "admin"),
        (1, "experiment file"),
    ]
    assert all(newer["before"] == older["after"] for newer, older in pairwise(audit))
    assert audit[-1]["before"] is None
    assert (audit[2]["before"]["shares"], audit[2]["after"]["shares"]) == (
        {"one": 50, "two": 50},
        {"one": 60, "two": 40},
    )
    assert (audit[1]["before"]["killed"], audit[1]["after"]["killed"]) == ([], ["two"])
    assert audit[0]["after"]["models"]["one"] == [second, first]
    assert [entry["changed_at"] for entry in audit] == sorted((entry["changed_at"] for entry in audit), reverse=True)
    assert changed_by == "alice"


async def test_while_the_store_is_down_a_change_is_refused_and_the_service_goes_on(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def down(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("no answer")

    for method in ("read", "revision", "replace", "audit"):
        monkeypatch.setattr(MemoryControlStore, method, down)
    refused = [await service.client.request(method, path, json={}, headers=TOKEN) for method, path in ROUTES]
    await service.parts.control.poll()
    scored = await service.predict(candidates=[{"id": "a1"}])
    ready = await service.client.get("/readyz")

    assert [(answer.status_code, answer.headers["retry-after"]) for answer in refused] == [(503, "1")] * 4
    assert (scored.status_code, ready.status_code) == (200, 200)
    assert ready.json()["control"]["store"] == "no answer"
    assert shares((await get(service)).json()) == AS_IN_THE_FILE


async def test_without_redis_a_folder_for_the_state_is_what_outlives_a_restart(start: Start, tmp_path: Path) -> None:
    for state_dir, killed in ((None, []), (tmp_path, ["two"])):
        async with start(admin_token="s3cret", state_dir=state_dir) as service:
            await put(service, {"kill": ["two"]})
        async with start(admin_token="s3cret", state_dir=state_dir) as service:
            assert (await get(service)).json()["killed"] == killed


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
    assert "security" not in document["paths"]["/experiments/{name}"]["get"]


async def test_a_shadow_arm_is_loaded_and_described(service: Running) -> None:
    models = (await service.client.get("/models")).json()

    assert [(model["arm"], model["device"], model["previous"]) for model in models] == [
        (name, "cpu", []) for name in ("one", "two", "new")
    ]
