"""What may serve: verified artifacts only, each loaded once."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.artifact.errors import ArtifactError
from models.artifact.folder import make_current
from service.experiments.assignment import Arm
from service.registry.loader import ModelLoader
from service.registry.registry import ModelRegistry
from service.runtime import backends
from tests.service import tiny

pytestmark = pytest.mark.usefixtures("measured_once")

Load = Callable[[list[Arm]], ModelRegistry]


def arm(name: str = "one", **changes: object) -> Arm:
    return Arm.model_validate({"name": name, "model": "tiny", "share": 100, **changes})


@pytest.fixture
def load(tmp_path: Path) -> Load:
    loader = ModelLoader(root=tmp_path, max_candidates=1000, keep_behaviours=200, item_rows=100, fresh_s=10)
    return partial(ModelRegistry.load, loader)


async def test_every_arm_has_its_model(load: Load, tmp_path: Path) -> None:
    tiny.write(tmp_path, "tiny", seed=1)
    tiny.write(tmp_path, "other", seed=2)

    registry = load([arm(), arm("two", model="other")])

    for name, seed in (("one", 1), ("two", 2)):
        model = registry.get(name)
        arrays = model.artifact.golden.arrays
        scores = backends.score(model.served.backend, model.item_graph, tiny.LAYOUT.pack(arrays))
        assert np.allclose(scores, tiny.score(arrays, seed=seed), atol=1e-6)
    await registry.aclose()


async def test_arms_of_one_artifact_share_it(load: Load, tmp_path: Path) -> None:
    version = tiny.write(tmp_path).name
    tiny.write(tmp_path, seed=2)

    registry = load([arm(version=version), arm("same", version=version), arm("newer")])

    assert registry.models["one"] is registry.models["same"]
    assert registry.models["one"] is not registry.models["newer"]
    await registry.aclose()


def lies(root: Path) -> None:
    tiny.write(root, offset=0.01)


def is_damaged(root: Path) -> None:
    graph = tiny.write(root) / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)


def is_no_graph(root: Path) -> None:
    tiny.write(root, files={**tiny.graphs(1), "model.onnx": b"not a graph"})


def has_no_graph(root: Path) -> None:
    file = tiny.write(root) / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["files"]["model.onnx"]
    file.write_text(json.dumps(manifest))


def has_another_schema(root: Path) -> None:
    file = tiny.write(root) / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema_fingerprint": "0" * 64}))


def scores_nan(root: Path) -> None:
    tiny.write(root, files=tiny.graphs(1, poisoned="a1"))


def is_another_model(root: Path) -> None:
    (root / "tiny").mkdir()
    tiny.write(root, "other").rename(root / "tiny" / "20260101-1")
    make_current(root, "tiny", "20260101-1")


def has_another_name(root: Path) -> None:
    version = tiny.write(root)
    version.rename(version.with_name("20260101-1"))
    make_current(root, "tiny", "20260101-1")


def is_absent(root: Path) -> None:
    (root / "tiny").mkdir()


BAD: tuple[tuple[Callable[[Path], None], str], ...] = (
    (lies, "golden row 0 scores"),
    (is_damaged, "damaged file"),
    (is_no_graph, "cannot load"),
    (has_no_graph, "does not list model.onnx"),
    (has_another_schema, "does not match"),
    (scores_nan, "golden row 0 scores nan"),
    (is_another_model, "holds other .*, not tiny 20260101-1"),
    (has_another_name, "holds tiny .*, not tiny 20260101-1"),
    (is_absent, "no such file"),
)


@pytest.mark.parametrize(("spoil", "told"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
def test_no_model_serves_that(spoil: Callable[[Path], None], told: str, load: Load, tmp_path: Path) -> None:
    spoil(tmp_path)

    with pytest.raises(ArtifactError, match=told) as refused:
        load([arm()])

    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_model_that_reads_more_clicks_than_the_store_keeps_is_refused(load: Load, tmp_path: Path) -> None:
    tiny.write(tmp_path)

    bound: Any = load
    few = replace(bound.args[0], keep_behaviours=tiny.T - 1)

    with pytest.raises(ArtifactError, match=f"reads the last {tiny.T} clicks of a user and the store keeps"):
        ModelRegistry.load(few, [arm()])


def test_an_unknown_version_is_refused_by_its_path(load: Load, tmp_path: Path) -> None:
    tiny.write(tmp_path)

    with pytest.raises(ArtifactError, match="20200101-1: no such artifact folder"):
        load([arm(version="20200101-1")])


async def test_a_version_that_was_exported_and_not_decided_does_not_serve_and_is_told(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    decided = tiny.write(tmp_path, seed=1).name
    exported = tiny.write(tmp_path, seed=2).name

    bound: Any = load
    registry = bound([arm(), arm("pinned", version=decided)], versions={"one": [decided], "pinned": [decided]})

    told = [record for record in caplog.records if record.msg == "the control document wins over the exported version"]
    assert registry.versions() == {"one": [decided], "pinned": [decided]}
    assert [(record.__dict__["arm"], record.__dict__["exported"]) for record in told] == [("one", exported)]
    await registry.aclose()


async def test_where_the_decided_version_is_gone_one_before_it_serves(load: Load, tmp_path: Path) -> None:
    first, second = (tiny.write(tmp_path, seed=seed).name for seed in (1, 2))

    bound: Any = load
    registry = bound([arm(version=second)], versions={"one": ["20200101-1", first]})
    fallen_back = registry.versions()
    await registry.aclose()
    registry = bound([arm(version=second)], versions={"one": ["20200101-1"]})

    assert fallen_back == {"one": [first]}
    assert registry.versions() == {"one": [second]}
    await registry.aclose()
