"""What a client sees of /explain: the same scores as of /predict, and beside them every tensor with its names."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.artifact import folder as artifact
from models.artifact.errors import ArtifactError
from models.artifact.manifest import EXPLAINING
from models.features.field import FIRST
from service.runtime.onnx_cpu import OnnxBackend
from service.scoring import explainer
from service.scoring.loaded_model import LoadedModel
from service.store.feature_store import StoreUnavailable
from tests.service import tiny
from tests.service.conftest import Running, Start

ALONE = {"experiment": "test", "salt": "s", "arms": [{"name": "one", "model": "tiny", "share": 100}]}
PAST = [{"item": "a3", "ts": 1.0}, {"item": "a1", "ts": 2.0}]
ASKED: dict[str, Any] = {
    "request_id": 7,
    "ts": 100.0,
    "user": {"id": "u1"},
    "behaviours": PAST,
    "candidates": [{"id": "a2"}, {"id": 5}],
}


async def asked(service: Running, **changes: Any) -> Any:
    answer = await service.client.post("/explain", json={**ASKED, **changes})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_the_scores_are_those_of_predict_in_the_same_form(service: Running) -> None:
    columns = {"id": ["a2", 5], "price": [2.5, None]}
    for changes in ({}, {"candidates": columns}):
        predicted = (await service.predict(**{**ASKED, **changes})).json()

        told = await asked(service, **changes)

        assert {name: told[name] for name in predicted} == predicted
        assert list(told) == [*predicted, "explanations"]


async def test_every_place_of_a_tensor_has_a_name_and_padding_is_left_out(service: Running) -> None:
    told = (await asked(service))["explanations"]

    clicks, user = told["click_contrib"], told["user_part"]
    assert clicks["meaning"] == tiny.EXPLANATIONS[0].meaning
    assert clicks["axes"] == [
        {"name": "candidate", "labels": ["a2", "5"]},
        {"name": "behaviour", "labels": ["a3", "a1"]},
    ]
    table = tiny.tables(1)["hist.item_id"]
    vocabulary = tiny.SCHEMA.field("item_id").vocabulary
    assert vocabulary is not None
    by_hand = [table[vocabulary.index(i) + FIRST] * p for i, p in zip(("a3", "a1"), tiny.POSITIONS[-2:], strict=True)]
    np.testing.assert_allclose(clicks["values"], [by_hand, by_hand], rtol=1e-6)
    assert list(told) == ["logit", "click_contrib", "user_part"]
    assert user["axes"] == [{"name": "request", "labels": ["7"]}]
    assert np.shape(user["values"]) == (1,)


async def test_the_logit_is_what_the_answered_probability_is_made_of(service: Running) -> None:
    told = await asked(service)

    calibrated = tiny.CALIBRATION(np.array(told["explanations"]["logit"]["values"]))
    np.testing.assert_allclose(calibrated, [p["ctr"] for p in told["predictions"]], rtol=1e-6)


async def test_only_the_clicks_that_the_model_saw_are_named(service: Running) -> None:
    many = [{"item": f"a{n}", "ts": float(n)} for n in (5, 4, 1, 2, 3, 999)]

    told = await asked(service, behaviours=many)

    assert told["explanations"]["click_contrib"]["axes"][1]["labels"] == ["a3", "a4", "a5"]


async def test_without_clicks_there_is_nothing_to_name(service: Running) -> None:
    told = await asked(service, behaviours=[])

    assert told["explanations"]["click_contrib"]["axes"][1]["labels"] == []
    assert told["explanations"]["click_contrib"]["values"] == [[], []]


async def test_a_prediction_may_ask_for_its_explanation(service: Running) -> None:
    told = (await service.predict(**ASKED, explain=True)).json()

    assert told == await asked(service)


@pytest.mark.parametrize("path", ["/explain", "/predict"])
async def test_more_candidates_than_can_be_explained_are_refused(start: Start, path: str) -> None:
    body = {**ASKED, "explain": True}
    async with start(max_explained=2) as service:
        enough = await service.client.post(path, json=body)
        refused = await service.client.post(path, json={**body, "candidates": [{"id": 1}] * 3})

    assert enough.status_code == 200
    assert refused.status_code == 422
    assert refused.json()["errors"] == [{"pointer": "/candidates", "expected": "1 to 2 candidates", "got": "3"}]


@pytest.mark.parametrize(
    ("body", "status", "pointer"),
    [
        (b"{", 400, None),
        (b"[]", 422, ""),
        (b'{"candidates": {"price": [1]}}', 422, "/candidates/id"),
        (b'{"candidates": [{"id": "a1", "features": {"price": "dear"}}], "user": {"id": "u1"}}', 422,
         "/candidates/0/features/price"),
    ],
)  # fmt: skip
async def test_a_bad_body_is_refused_as_a_prediction_would_be(
    service: Running, body: bytes, status: int, pointer: str | None
) -> None:
    answers = [await service.client.post(path, content=body) for path in ("/explain", "/predict")]

    assert answers[0].status_code == answers[1].status_code == status
    assert answers[0].json() == answers[1].json()
    assert pointer is None or answers[0].json()["errors"][0]["pointer"] == pointer


async def test_an_arm_without_explanations_says_so(service: Running) -> None:
    answer = await service.client.post("/explain", json={**ASKED, "user": {"id": "u2"}})

    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"
    assert "explains nothing" in answer.json()["detail"]
    assert (await service.predict(**{**ASKED, "user": {"id": "u2"}})).status_code == 200
    assert await service.metric('clickserve_requests_total{arm="two",route="/explain",status="409"}') == 1


async def test_a_prediction_loads_nothing_that_explains(service: Running) -> None:
    assert service.api.service is not None
    model: LoadedModel = service.api.service.registry.models["one"]

    await service.predict(**ASKED)
    assert "explaining" not in vars(model)

    await asked(service)
    first = model.explaining
    await asked(service)
    assert model.explaining is first


async def test_what_is_explained_is_no_prediction_to_the_metrics(service: Running) -> None:
    await asked(service)

    assert await service.metric('clickserve_requests_total{arm="one",route="/explain",status="200"}') == 1
    assert await service.metric('clickserve_candidates_total{arm="one"}') == 0
    assert await service.metric('clickserve_stage_seconds_count{stage="encode"}') == 0


async def test_a_dead_store_costs_the_clicks_and_not_the_answer(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def down(*_: Any, **__: Any) -> Any:
        raise StoreUnavailable("down")

    monkeypatch.setattr(service.store, "fetch", down)

    told = await asked(service, behaviours=None)

    assert "behaviours_unavailable" in told["degraded"]
    assert told["explanations"]["click_contrib"]["axes"][1]["labels"] == []


async def test_explanations_under_way_hold_up_no_prediction_and_beyond_a_few_are_refused(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, go_on = threading.Event(), threading.Event()
    run_all = OnnxBackend.run_all

    def slow(self: OnnxBackend, arrays: Any) -> Any:
        if threading.current_thread().name.startswith("explain"):
            running.set()
            assert go_on.wait(30)
        return run_all(self, arrays)

    monkeypatch.setattr(OnnxBackend, "run_all", slow)
    waiting = [asyncio.create_task(asked(service)) for _ in range(explainer.MAX_PENDING)]
    await asyncio.to_thread(running.wait, 30)

    predicted = await service.predict(**ASKED)
    fetched = await service.metric('clickserve_store_seconds_count{op="fetch"}')
    refused = await service.client.post("/explain", json=ASKED)
    go_on.set()

    assert predicted.status_code == 200
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert await service.metric('clickserve_store_seconds_count{op="fetch"}') == fetched
    assert len({json.dumps(told) for told in await asyncio.gather(*waiting)}) == 1
    assert (await service.client.post("/explain", json=ASKED)).status_code == 200


@pytest.mark.parametrize(
    ("changes", "status"),
    [({"user": {"id": "u2"}}, 409), ({"context": {"device": []}}, 422), ({"timeout_ms": 1e-6}, 504)],
)
async def test_what_was_refused_leaves_its_place_in_the_line(
    service: Running, changes: dict[str, Any], status: int
) -> None:
    for _ in range(explainer.MAX_PENDING + 1):
        refused = await service.client.post("/explain", json={**ASKED, **changes})
        assert refused.status_code == status
        await asyncio.sleep(0.01)  # what came too late is still to be dropped

    await asked(service)


async def test_a_deadline_that_passed_is_told(service: Running) -> None:
    answer = await service.client.post("/explain", json={**ASKED, "timeout_ms": 1e-6})

    assert answer.status_code == 504


@pytest.mark.parametrize("spoil", ["another model's", "other axes", "no graph", "changed on disk"])
async def test_an_explaining_graph_that_cannot_be_trusted_is_not_used(start: Start, tmp_path: Path, spoil: str) -> None:
    folder = tiny.write(tmp_path, explaining_seed=2 if spoil == "another model's" else 1)
    if spoil == "other axes":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["explain"][0]["axes"][1] = {"name": "field", "labels": ["price", "genres"]}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    async with start(artifacts_dir=tmp_path, experiment=ALONE) as service:
        if spoil == "no graph":
            (folder / EXPLAINING).unlink()
        if spoil == "changed on disk":
            (folder / EXPLAINING).write_bytes(tiny.explaining_graph(2))

        answer = await service.client.post("/explain", json=ASKED)

        assert answer.status_code == 503, answer.text
        assert answer.json()["detail"] == "the model could not be explained"
        assert (await service.predict(**ASKED)).status_code == 200


async def test_a_manifest_from_before_explanations_is_served_and_explains_nothing(start: Start, tmp_path: Path) -> None:
    file = tiny.write(tmp_path) / "manifest.json"
    old = json.loads(file.read_text())
    del old["explain"]
    file.write_text(json.dumps(old))

    async with start(artifacts_dir=tmp_path, experiment=ALONE) as service:
        assert (await service.predict(**ASKED)).status_code == 200
        assert (await service.client.post("/explain", json=ASKED)).status_code == 409


def test_a_manifest_that_promises_explanations_needs_their_graph(tmp_path: Path) -> None:
    file = tiny.write(tmp_path, explaining_seed=1) / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["files"][EXPLAINING]
    file.write_text(json.dumps(manifest))

    with pytest.raises(ArtifactError, match=r"does not list explain\.onnx"):
        artifact.read(file.parent)
