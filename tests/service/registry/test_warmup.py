"""A new version takes over between two requests, and what must not serve does not."""

import asyncio
import gc
import json
import re
import shutil
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from models.artifact.folder import make_current
from models.features.packing import PackedLayout
from models.features.schema import Schema
from service.registry.warmup import ModelWarmer
from service.scoring.loaded_model import LoadedModel
from tests.service import tiny
from tests.service.conftest import Running, Start

pytestmark = pytest.mark.usefixtures("measured_once")

TOKEN = {"authorization": "Bearer secret"}
ONE_ARM = {"experiment": "test", "salt": "s", "arms": [{"name": "one", "model": "tiny", "share": 100}]}
ASKED: dict[str, Any] = {"ts": 5e6, "user": {"id": "u1"}, "candidates": [{"id": "a1"}, {"id": "a4"}]}


@pytest.fixture
async def service(start: Start, tmp_path: Path) -> AsyncIterator[Running]:
    """One arm, of version 1 (seed 1)."""
    tiny.write(tmp_path, seed=1)
    async with start(artifacts_dir=tmp_path, experiment=ONE_ARM, admin_token="secret") as running:
        yield running


def write(service: Running, **changes: Any) -> str:
    """Another version beside those there are; it is not made the current one."""
    catalog = service.parts.registry
    current = json.loads((catalog.root / "tiny" / "current.json").read_text())["version"]
    version = tiny.write(catalog.root, **changes).name
    make_current(catalog.root, "tiny", current)
    return version


def use_schema(schema: Schema, patched: pytest.MonkeyPatch) -> None:
    """From now on the tiny model is one over this schema."""
    layout = PackedLayout(schema)
    for name, value in (("SCHEMA", schema), ("LAYOUT", layout), ("SIGNATURES", tiny.signatures(layout))):
        patched.setattr(tiny, name, value)


async def load(service: Running, version: str | None = None, arm: str = "one") -> httpx.Response:
    body = {} if version is None else {"version": version}
    return await service.client.post(f"/models/{arm}/load", json=body, headers=TOKEN)


async def rollback(service: Running) -> httpx.Response:
    return await service.client.post("/models/one/rollback", headers=TOKEN)


async def predict(service: Running) -> tuple[str, list[float]]:
    answer = await service.predict(**ASKED)
    assert answer.status_code == 200, answer.text
    return answer.json()["version"], [row["ctr"] for row in answer.json()["predictions"]]


def model(service: Running) -> LoadedModel:
    return service.parts.registry.models["one"]


def previous(service: Running) -> list[str]:
    return service.parts.registry.versions()["one"][1:]


async def test_after_a_load_the_new_version_answers_and_the_old_one_is_kept(service: Running) -> None:
    old, before = await predict(service)
    new = write(service, seed=2)

    answer = await load(service, new)
    version, after = await predict(service)

    assert answer.status_code == 200
    assert (answer.json()["arm"], answer.json()["version"], answer.json()["previous"]) == ("one", new, [old])
    assert version == new
    assert not np.allclose(before, after)
    assert (await service.client.get("/models")).json() == [answer.json()]
    assert (await service.client.get("/readyz")).json()["arms"] == {"one": new}


async def test_without_a_version_it_is_the_current_one(service: Running) -> None:
    new = write(service, seed=2)
    unchanged = await service.client.post("/models/one/load", headers=TOKEN)
    make_current(service.parts.registry.root, "tiny", new)

    changed = await service.client.post("/models/one/load", headers=TOKEN)

    assert unchanged.json()["version"] != new
    assert changed.json()["version"] == new


async def test_a_version_and_its_scores_belong_together_whenever_it_flips(service: Running) -> None:
    versions = [model(service).version, write(service, seed=2), write(service, seed=3)]
    right = {}
    for version in versions:
        await load(service, version)
        right[version] = (await predict(service))[1]
    seen: list[tuple[str, list[float]]] = []
    done = asyncio.Event()

    async def client() -> None:
        while not done.is_set():
            seen.append(await predict(service))

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(client())
        for version in versions * 2:
            assert (await load(service, version)).status_code == 200
        done.set()

    assert {version for version, _ in seen} == set(versions)
    assert all(np.allclose(scores, right[version], atol=1e-7) for version, scores in seen)


async def test_a_request_that_began_before_the_flip_ends_with_its_model(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, _ = await predict(service)
    versions = [write(service, seed=seed) for seed in (2, 3, 4, 5)]
    reached, go_on = asyncio.Event(), asyncio.Event()
    fetch_soon = service.store.fetch_soon

    def slow(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(service.store, "fetch_soon", fetch_soon)
        waiting.add_done_callback(lambda _: fetch_soon(*args, **kwargs))
        reached.set()

    waiting = asyncio.create_task(go_on.wait())
    monkeypatch.setattr(service.store, "fetch_soon", slow)
    asked = asyncio.create_task(service.predict(**{**ASKED, "candidates": [{"id": "a2"}]}))
    await reached.wait()
    for version in versions:  # more than are kept: the old one is to be closed by now
        assert (await load(service, version)).status_code == 200
    go_on.set()
    answer = await asked
    await service.parts.registry.settled()

    assert answer.status_code == 200
    assert answer.json()["version"] == old


async def test_a_rollback_goes_back_step_by_step_and_a_load_forward_again(service: Running) -> None:
    first, before = await predict(service)
    second, third = write(service, seed=2), write(service, seed=3)
    await load(service, second)
    await load(service, third)

    answers = [await rollback(service) for _ in range(3)]
    back = await predict(service)
    forward = await load(service, third)

    assert [answer.status_code for answer in answers] == [200, 200, 422]
    assert [answer.json()["version"] for answer in answers[:2]] == [second, first]
    assert "no previous version" in answers[2].json()["detail"]
    assert back == (first, before)
    assert (forward.json()["version"], forward.json()["previous"]) == (third, [first])


async def test_the_metrics_show_the_serving_version_only(service: Running) -> None:
    old = model(service).version
    new = write(service, seed=2)
    await load(service, new)

    def info(version: str) -> str:
        return f'clickserve_model_info{{arm="one",model="tiny",version="{version}"}}'

    text = (await service.client.get("/metrics")).text
    await rollback(service)
    after = (await service.client.get("/metrics")).text

    assert (info(new) + " 1.0" in text, info(old) in text) == (True, False)
    assert (info(old) + " 1.0" in after, info(new) in after) == (True, False)


def is_truncated(folder: Path) -> None:
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])


def has_wrong_hash(folder: Path) -> None:
    change_manifest(folder, lambda told: told["files"].update({"model.onnx": "0" * 64}))


def has_another_schema(folder: Path) -> None:
    change_manifest(folder, lambda told: told.update(schema_fingerprint="0" * 64))


def is_another_model(folder: Path) -> None:
    change_manifest(folder, lambda told: told.update(model="other"))


def has_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "manifest.json"
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("changes", "spoil", "told"),
    [
        ({}, is_truncated, "damaged file"),
        ({}, has_wrong_hash, "damaged file"),
        ({}, has_another_schema, "fingerprint .* does not match"),
        ({}, is_another_model, "holds other"),
        ({}, has_no_manifest, "manifest.json: unreadable"),
        ({"offset": 0.01}, None, "golden row 0 scores"),
        ({"files": tiny.graphs(1, poisoned="a1")}, None, "golden row 0 scores nan"),
        ({"files": {**tiny.graphs(1), "model.onnx": b"no graph"}}, None, "cannot load"),
    ],
    ids=["truncated", "hash", "schema", "model", "no manifest", "golden off", "golden nan", "no graph"],
)
async def test_what_must_not_serve_is_refused_and_changes_nothing(
    changes: dict[str, Any], spoil: Callable[[Path], None] | None, told: str, service: Running
) -> None:
    before = await predict(service)
    version = write(service, **changes)
    if spoil is not None:
        spoil(service.parts.registry.root / "tiny" / version)

    refused = await load(service, version)

    assert refused.status_code == 409
    assert refused.headers["content-type"] == "application/problem+json"
    assert re.search(told, refused.json()["detail"])
    assert await predict(service) == before
    assert previous(service) == []


async def test_a_model_that_scores_a_live_request_as_nan_is_refused(service: Running) -> None:
    version = write(service, files=tiny.graphs(1, poisoned="a4"))  # no golden row has that item
    unseen = await load(service, version)
    await rollback(service)
    before = await predict(service)

    refused = await load(service, version)

    assert unseen.status_code == 200
    assert refused.status_code == 409
    assert "recent request a score that is no number" in refused.json()["detail"]
    assert await predict(service) == before


async def test_a_model_that_cannot_take_a_live_request_is_refused(service: Running) -> None:
    numeric = tiny.SCHEMA.model_dump()
    for field in numeric["fields"]:
        if field["name"] == "gender":
            field.update(kind="multi", max_values=2)
    other = Schema.model_validate(numeric)
    await service.predict(**{**ASKED, "user": {"id": "u1", "features": {"gender": "F"}}})
    golden = tuple(
        replace(request, user={**request.user, "gender": ["F"]} if request.user else {}) for request in tiny.GOLDEN
    )
    with pytest.MonkeyPatch.context() as patched:
        use_schema(other, patched)
        patched.setattr(tiny, "GOLDEN", golden)
        version = write(service, schema=other)

    refused = await load(service, version)

    assert refused.status_code == 409
    assert "cannot take a recent request" in refused.json()["detail"]


async def test_recent_requests_are_replayed_at_every_size(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (3, 7):
        await service.predict(user={"id": "u1"}, candidates=[{"id": f"a{n}"} for n in range(size)])
    sizes: list[int] = []
    original = ModelWarmer._try

    async def noting(self: ModelWarmer, new: LoadedModel, arrays: Any, background: Any) -> None:
        sizes.append(len(arrays["items"]))
        await original(self, new, arrays, background)

    monkeypatch.setattr(ModelWarmer, "_try", noting)

    await load(service, write(service, seed=2))

    assert sizes == [3, 7, 1, 2, 100, 1000]


async def test_loads_at_once_are_made_one_after_the_other(service: Running) -> None:
    first = model(service).version
    versions = [write(service, seed=seed) for seed in (2, 3)]

    answers = await asyncio.gather(*(load(service, version) for version in versions))

    assert [answer.status_code for answer in answers] == [200, 200]
    serving, *before = service.parts.registry.versions()["one"]
    assert {serving, *before} == {first, *versions}
    assert serving in versions


async def test_files_that_changed_under_a_version_that_serves_are_refused(service: Running) -> None:
    serving = model(service)
    folder = serving.artifact.path
    draft = tiny.write(folder.parents[1] / "draft", seed=7)
    shutil.rmtree(folder)
    draft.rename(folder)
    change_manifest(folder, lambda told: told.update(version=folder.name))

    refused = await load(service, serving.version)

    assert refused.status_code == 409
    assert "export it as another one" in refused.json()["detail"]
    assert model(service) is serving


@pytest.mark.parametrize("version", ["20200101-1", "../tiny", "", ".hidden"])
async def test_a_version_that_is_none_is_refused(version: str, service: Running) -> None:
    refused = await load(service, version)

    assert (refused.status_code, "no such artifact folder" in refused.json()["detail"]) == (422, True)


async def test_an_arm_that_is_none_is_not_found(service: Running) -> None:
    refused = await load(service, arm="none")

    assert (refused.status_code, refused.json()["detail"]) == (404, 'there is no arm "none"; there are one')


async def test_loading_what_serves_verifies_it_again_and_swaps_nothing(service: Running) -> None:
    serving = model(service)

    again = await load(service, serving.version)
    still = model(service)
    is_truncated(serving.artifact.path)
    damaged = await load(service, serving.version)

    assert (again.status_code, damaged.status_code) == (200, 409)
    assert still is model(service) is serving
    assert previous(service) == []


async def test_a_grown_vocabulary_is_a_new_fingerprint_and_loads(service: Running) -> None:
    told = tiny.SCHEMA.model_dump()
    for field in told["fields"]:
        if field["name"] == "device":
            field["vocabulary"] = (*field["vocabulary"], "watch")
    grown = Schema.model_validate(told)
    with pytest.MonkeyPatch.context() as patched:
        use_schema(grown, patched)
        version = write(service, schema=grown)

    answer = await load(service, version)

    assert answer.status_code == 200
    assert model(service).artifact.schema.fingerprint == grown.fingerprint != tiny.SCHEMA.fingerprint


async def test_versions_of_one_schema_share_its_tables(service: Running) -> None:
    old = model(service)

    await load(service, write(service, seed=2))

    assert model(service).artifact.encoder is old.artifact.encoder


async def test_twenty_swaps_leave_no_more_models_than_are_kept(service: Running) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    versions = [write(service, seed=seed) for seed in range(2, 6)]

    for number in range(20):
        await predict(service)
        assert (await load(service, versions[number % len(versions)])).status_code == 200
        alive.add(model(service).served.backend)
    await service.parts.registry.settled()
    gc.collect()

    assert len(alive) == 3
    assert previous(service) == [versions[2], versions[1]]
    assert await service.metric("clickserve_queue_candidates") == 0


async def test_arms_of_one_artifact_share_a_model_until_the_last_gives_it_up(start: Start, tmp_path: Path) -> None:
    tiny.write(tmp_path, seed=1)
    arms = [{"name": name, "model": "tiny", "share": 50} for name in ("one", "two")]
    settings = {"artifacts_dir": tmp_path, "experiment": {**ONE_ARM, "arms": arms}, "keep_versions": 0}
    async with start(**settings, admin_token="secret") as service:
        shared = model(service)
        closed = []
        close = shared.served.backend.close

        def noting() -> None:
            closed.append(1)
            close()

        shared.served.backend.close = noting  # type: ignore[method-assign] # to see it
        new = write(service, seed=2)

        await load(service, new)
        await service.parts.registry.settled()
        after_one = len(closed)
        await load(service, new, arm="two")
        await service.parts.registry.settled()

        assert (after_one, len(closed)) == (0, 1)
        assert service.parts.registry.models["two"] is model(service)
