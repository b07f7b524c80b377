"""The scorer against the model in numpy: what is joined, what is absent, and what goes wrong on the way."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from models.features.encoder import Encoder
from models.features.history import Event
from models.features.request import Request
from service.deadline import Deadline
from service.store.codec import Click
from tests.service import tiny
from tests.service.conftest import Running, Start
from tests.service.stores import BrokenStore, SlowStore


def expected(*, seed: int = 1, **request: Any) -> list[float]:
    """The model's probabilities of one raw request, by numpy."""
    columns = request["items"]
    whole = {"user": {}, "context": {}, "behaviours": (), "num_items": len(columns["item_id"]), **request}
    logits = tiny.score(Encoder(tiny.SCHEMA).encode(Request(**whole)), seed=seed)
    return [float(p) for p in tiny.CALIBRATION(logits)]


async def ctr(service: Running, **request: Any) -> list[float]:
    answer = await service.predict(**request)
    assert answer.status_code == 200, answer.text
    assert answer.json()["degraded"] == []
    return [p["ctr"] for p in answer.json()["predictions"]]


async def test_the_answer_is_the_calibrated_score_of_the_encoded_request(service: Running) -> None:
    scored = await ctr(
        service,
        ts=1000.0,
        user={"id": "u1", "features": {"gender": "M"}},
        context={"device": "mobile", "hour": 23},
        behaviours=[{"item": "a3", "ts": 2.0, "features": {"genres": ["z"]}}, {"item": "a1", "ts": 1.0}],
        candidates=[{"id": "a1", "features": {"price": 9.5, "genres": ["x", "y"]}}, {"id": "new"}],
    )

    assert scored == pytest.approx(
        expected(
            ts=1000.0,
            user={"user_id": "u1", "gender": "M"},
            context={"device": "mobile"},
            behaviours=(Event(item="a1", ts=1.0, features={}), Event(item="a3", ts=2.0, features={"genres": ["z"]})),
            items={"item_id": ["a1", "new"], "price": [9.5, None], "genres": [["x", "y"], None]},
        ),
        abs=1e-6,
    )


async def test_each_arm_scores_with_its_own_model(service: Running) -> None:
    one = await ctr(service, ts=0, user={"id": "u1"}, candidates=[{"id": "a1"}])
    two = await ctr(service, ts=0, user={"id": "u2"}, candidates=[{"id": "a1"}])

    assert one == pytest.approx(expected(seed=1, ts=0.0, user={"user_id": "u1"}, items={"item_id": ["a1"]}), abs=1e-6)
    assert two == pytest.approx(expected(seed=2, ts=0.0, user={"user_id": "u2"}, items={"item_id": ["a1"]}), abs=1e-6)


async def test_given_features_win_over_stored_ones_field_by_field(service: Running) -> None:
    await service.store.put_users({"u1": {"gender": "M"}})
    await service.store.put_items(
        {"a1": {"price": 7.0, "genres": ["x"]}, "a2": {"price": 8.0}, "a3": {"genres": ["z"]}}
    )

    scored = await ctr(
        service,
        ts=100.0,
        user={"id": "u1"},
        behaviours=[{"item": "a3", "ts": 1.0}, {"item": "a1", "ts": 2.0, "features": {"genres": ["y"]}}],
        candidates=[{"id": "a1", "features": {"price": 1.5}}, {"id": "a2", "features": {"price": None}}],
    )

    assert scored == pytest.approx(
        expected(
            ts=100.0,
            user={"user_id": "u1", "gender": "M"},
            behaviours=(
                Event(item="a3", ts=1.0, features={"genres": ["z"]}),
                Event(item="a1", ts=2.0, features={"genres": ["y"]}),
            ),
            items={"item_id": ["a1", "a2"], "price": [1.5, 8.0], "genres": [["x"], None]},
        ),
        abs=1e-6,
    )


async def test_a_given_user_feature_wins_over_the_stored_one(service: Running) -> None:
    await service.store.put_users({"u1": {"gender": "M"}})

    scored = await ctr(service, ts=0, user={"id": "u1", "features": {"gender": "F"}}, candidates=[{"id": "a1"}])

    given = expected(ts=0.0, user={"user_id": "u1", "gender": "F"}, items={"item_id": ["a1"]})
    assert scored == pytest.approx(given, abs=1e-6)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> BrokenStore:
    store = BrokenStore()
    monkeypatch.setattr("service.app.MemoryStore", lambda **_: store)
    return store


async def test_a_slow_store_costs_a_request_its_past_and_not_its_answer(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SlowStore()
    monkeypatch.setattr("service.app.MemoryStore", lambda **_: store)

    async with start() as service:
        slow = await service.predict(user={"id": "u1"}, candidates=[{"id": "a1"}], timeout_ms=400)
        store.released.set()
        quick = await service.predict(user={"id": "u1"}, candidates=[{"id": "a1"}], timeout_ms=4000)

    assert (slow.status_code, quick.status_code) == (200, 200)
    assert "behaviours_unavailable" in slow.json()["degraded"]
    assert quick.json()["degraded"] == []


async def test_a_request_that_reads_the_store_during_a_swap_is_scored_by_the_model_it_read_for(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = SlowStore()
    monkeypatch.setattr("service.app.MemoryStore", lambda **_: store)
    old, new = (tiny.write(tmp_path, seed=seed).name for seed in (1, 2))
    one = {"name": "one", "model": "tiny", "version": old, "share": 100}

    async with start(
        artifacts_dir=tmp_path, experiment={"experiment": "test", "salt": "s", "arms": [one]}, keep_versions=0
    ) as service:
        registry = service.parts.registry
        loaded = await asyncio.to_thread(registry.read, "one", new)
        request = asyncio.create_task(service.predict(user={"id": "u1"}, candidates=[{"id": "a1"}]))
        await store.was_asked.wait()
        registry.flip("one", loaded)
        for _ in range(10):
            await asyncio.sleep(0)  # what would close the old model has its turn
        store.released.set()
        answer = await request
        await registry.settled()
        after = await service.predict(user={"id": "u1"}, candidates=[{"id": "a1"}])

    assert (answer.status_code, answer.json()["version"]) == (200, old)
    assert (after.status_code, after.json()["version"]) == (200, new)


async def test_without_its_store_a_request_is_scored_with_what_it_brings(broken: BrokenStore, start: Start) -> None:
    async with start() as service:
        answer = await service.predict(
            ts=100.0, user={"id": "u1"}, candidates=[{"id": "a1", "features": {"price": 3, "genres": []}}]
        )

        assert answer.status_code == 200
        assert answer.json()["degraded"] == ["behaviours_unavailable", "user_features_unavailable"]
        alone = expected(ts=100.0, user={"user_id": "u1"}, items={"item_id": ["a1"], "price": [3]})
        assert [p["ctr"] for p in answer.json()["predictions"]] == pytest.approx(alone, abs=1e-6)
        assert await service.metric('clickserve_degraded_total{reason="behaviours_unavailable"}') == 1
        assert await service.metric('clickserve_store_errors_total{op="fetch"}') == 1


MISSING: dict[str, tuple[dict[str, Any], list[str]]] = {
    "everything": (
        {"user": {"id": "u1"}, "candidates": [{"id": "a1"}]},
        ["behaviours_unavailable", "item_features_unavailable", "user_features_unavailable"],
    ),
    "items": ({"candidates": [{"id": "a1"}]}, ["item_features_unavailable"]),
    "a gap in a column": (
        {"candidates": {"id": ["a1", "a2"], "price": [1, None], "genres": [[], []]}},
        ["item_features_unavailable"],
    ),
    "nothing": (
        {
            "user": {"id": "u1", "features": {"gender": "F"}},
            "behaviours": [],
            "candidates": {"id": ["a1"], "price": [1], "genres": [["x"]]},
        },
        [],
    ),
}


@pytest.mark.parametrize("name", MISSING)
async def test_degraded_names_what_the_store_would_have_given(name: str, broken: BrokenStore, start: Start) -> None:
    request, reasons = MISSING[name]

    async with start() as service:
        answer = await service.predict(**request)

    assert answer.json()["degraded"] == reasons


async def test_events_are_refused_while_the_store_is_down_and_taken_after(broken: BrokenStore, start: Start) -> None:
    click = {"event_id": "e1", "type": "click", "ts": 5.0, "user": "u1", "item": "a3"}

    async with start() as service:
        down = await service.client.post("/events", json=[click])
        broken.is_down = False
        up = await service.client.post("/events", json=[click])

    assert (down.status_code, down.headers["retry-after"]) == (503, "1")
    assert down.headers["content-type"] == "application/problem+json"
    assert up.json()["accepted"] == 1


async def test_a_bad_stored_value_is_taken_for_absent_and_named(service: Running) -> None:
    await service.store.put_users({"u1": {"gender": ["F"]}})
    await service.store.put_items({"a1": {"price": "cheap", "genres": ["x"]}, "a2": {"price": 2.0}})
    await service.store.append([Click(event_id="e", user="u1", item="a3", ts=1.0, features={"genres": "x"})])

    answer = await service.predict(ts=100.0, user={"id": "u1"}, candidates=[{"id": "a1"}, {"id": "a2"}])

    assert answer.status_code == 200
    assert answer.json()["degraded"] == ["stored_values_invalid"]
    without = expected(
        ts=100.0,
        user={"user_id": "u1"},
        behaviours=(Event(item="a3", ts=1.0, features={}),),
        items={"item_id": ["a1", "a2"], "price": [None, 2.0], "genres": [["x"], None]},
    )
    assert [p["ctr"] for p in answer.json()["predictions"]] == pytest.approx(without, abs=1e-6)


async def test_a_client_is_not_told_of_stored_values(service: Running) -> None:
    await service.store.put_items({"a1": {"price": "cheap"}})

    answer = await service.predict(candidates=[{"id": "a1"}, {"id": "a2", "features": {"price": "dear"}}])

    assert [e["pointer"] for e in answer.json()["errors"]] == ["/candidates/1/features/price"]


async def test_a_deadline_that_has_passed_is_a_504(service: Running) -> None:
    answer = await service.predict(candidates=[{"id": "a1"}], timeout_ms=0.000001)

    assert answer.status_code == 504
    assert answer.headers["content-type"] == "application/problem+json"
    assert await service.metric('clickserve_rejected_total{reason="deadline"}') == 1


async def test_a_score_that_is_no_number_is_never_sent(start: Start, tmp_path: Path) -> None:
    tiny.write(tmp_path, files=tiny.graphs(1, poisoned="a4"))
    alone = {"experiment": "test", "salt": "s", "arms": [{"name": "one", "model": "tiny", "share": 100}]}

    async with start(artifacts_dir=tmp_path, experiment=alone) as service:
        good = await service.predict(candidates=[{"id": "a1"}])
        bad = await service.predict(candidates=[{"id": "a1"}, {"id": "a4"}])

        assert good.status_code == 200
        assert (bad.status_code, bad.headers["content-type"]) == (503, "application/problem+json")
        assert await service.metric('clickserve_rejected_total{reason="model_failed"}') == 1
        assert await service.metric('clickserve_requests_total{arm="one",route="/predict",status="503"}') == 1


async def test_a_model_that_was_slow_for_a_while_is_tried_again_though_others_are_under_way(service: Running) -> None:
    admission = service.parts.scorer._admission
    latency = service.parts.registry.models["one"].served.latency
    for _ in range(200):
        latency.observe(1, 10 * latency.expected_s(1))
    assert latency.expected_s(1) > 0.5

    statuses: list[int] = []
    admission.admit(1e-9, Deadline.after(60_000, since=time.monotonic()))
    for _ in range(5000):
        answer = await service.predict(user={"id": "u1"}, candidates=[{"id": "a1"}], timeout_ms=500)
        statuses.append(answer.status_code)
        if answer.status_code == 200:
            break

    assert statuses[0] == 503
    assert statuses[-1] == 200


async def test_runs_that_are_too_long_for_the_event_loop_are_made_by_the_models_thread(start: Start) -> None:
    async with start(inline_run_ms=0) as service:
        scored = await ctr(service, ts=0, user={"id": "u1"}, candidates=[{"id": "a1"}])
        queued = await service.metric('clickserve_stage_seconds_count{stage="queue"}')

    alone = expected(seed=1, ts=0.0, user={"user_id": "u1"}, items={"item_id": ["a1"]})
    assert scored == pytest.approx(alone, abs=1e-6)
    assert queued == 1


async def test_requests_whose_answers_come_together_get_each_its_own_scores(start: Start, monkeypatch: Any) -> None:
    store = SlowStore()
    monkeypatch.setattr("service.app.MemoryStore", lambda **_: store)
    users = ["u1", "u2", "u3", None, "u1"]

    async with start() as service:
        asked = [
            asyncio.create_task(service.predict(ts=5, request_id="r", user={"id": user}, candidates=[{"id": item}]))
            for user, item in zip(users, ["a1", "a2", "a3", "a4", "a1"], strict=True)
        ]
        await store.was_asked.wait()
        store.released.set()
        together = [answer.json() for answer in await asyncio.gather(*asked)]
        apart = [
            (await service.predict(ts=5, request_id="r", user={"id": user}, candidates=[{"id": item}])).json()
            for user, item in zip(users, ["a1", "a2", "a3", "a4", "a1"], strict=True)
        ]

    assert together == apart
