"""What may serve: verified artifacts only, each loaded once."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.artifact import ArtifactError
from service.catalog import Catalog
from service.experiment import Arm
from tests.service import tiny


def arm(name: str = "one", **changes: object) -> Arm:
    return Arm.model_validate({"name": name, "model": "tiny", "share": 1, **changes})


def test_every_arm_has_its_model(tmp_path: Path) -> None:
    tiny.write(tmp_path, "tiny", seed=1)
    tiny.write(tmp_path, "other", seed=2)

    catalog = Catalog.load(tmp_path, [arm(), arm("two", model="other")])

    arrays = catalog.models["one"].artifact.golden.arrays
    for name, seed in (("one", 1), ("two", 2)):
        assert np.allclose(catalog.models[name].backend.run(arrays), tiny.score(arrays, seed=seed), atol=1e-6)
    catalog.close()


def test_arms_of_one_artifact_share_it(tmp_path: Path) -> None:
    version = tiny.write(tmp_path).name
    tiny.write(tmp_path, seed=2)

    catalog = Catalog.load(tmp_path, [arm(version=version), arm("same", version=version), arm("newer")])

    assert catalog.models["one"] is catalog.models["same"]
    assert catalog.models["one"] is not catalog.models["newer"]
    catalog.close()


def lies(root: Path) -> None:
    tiny.write(root, offset=0.01)


def is_damaged(root: Path) -> None:
    graph = tiny.write(root) / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)


def is_no_graph(root: Path) -> None:
    tiny.write(root, files={"model.onnx": b"not a graph"})


def has_no_graph(root: Path) -> None:
    tiny.write(root, files={"model.ts": b""})


def has_another_schema(root: Path) -> None:
    file = tiny.write(root) / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema_fingerprint": "0" * 64}))


def scores_nan(root: Path) -> None:
    tiny.write(root, files={"model.onnx": tiny.to_onnx(1, poisoned="a1")})


def is_absent(root: Path) -> None:
    (root / "tiny").mkdir()


BAD: tuple[tuple[Callable[[Path], None], str], ...] = (
    (lies, "golden row 0 scores"),
    (is_damaged, "damaged file"),
    (is_no_graph, "cannot load"),
    (has_no_graph, "lists no model.onnx"),
    (has_another_schema, "does not match"),
    (scores_nan, "golden row 0 scores nan"),
    (is_absent, "no such file"),
)


@pytest.mark.parametrize(("spoil", "told"), BAD, ids=[spoil.__name__ for spoil, _ in BAD])
def test_no_model_serves_that(spoil: Callable[[Path], None], told: str, tmp_path: Path) -> None:
    spoil(tmp_path)

    with pytest.raises(ArtifactError, match=told) as refused:
        Catalog.load(tmp_path, [arm()])

    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_version_is_refused_by_its_path(tmp_path: Path) -> None:
    tiny.write(tmp_path)

    with pytest.raises(ArtifactError, match="20200101-1: no such artifact folder"):
        Catalog.load(tmp_path, [arm(version="20200101-1")])
