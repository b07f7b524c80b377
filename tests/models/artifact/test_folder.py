import json
import os
from pathlib import Path

import numpy as np
import pytest

from models.artifact import folder as artifact
from models.artifact.calibration import Calibration
from models.artifact.errors import ArtifactError
from models.artifact.folder import Golden
from models.artifact.manifest import ITEM, MODEL, Graph
from models.features.arrays import concat
from models.features.encoder import Encoder
from models.features.field import FieldSpec, Input
from models.features.history import Event
from models.features.packing import PackedLayout
from models.features.request import Request
from models.features.schema import SchemaSpec

SCHEMA = SchemaSpec(
    item_key="ad",
    history_length=2,
    fields=(
        FieldSpec(name="age", kind="numeric", group="user"),
        FieldSpec(name="ad", kind="categorical", group="item"),
        FieldSpec(name="ad", kind="sequence", group="behaviour", of="ad"),
    ),
).fit({"age": [10, 20], "ad": ["a", "b"]})

ITEMS = Input(name="items", dtype="float32", dims=("C", 3))
LOGIT = Input(name="logit", dtype="float32", dims=("C",))
GRAPHS = {
    MODEL: Graph(
        inputs=(
            Input(name="request_ids", dtype="int64", dims=(1, 1)),
            Input(name="history_mask", dtype="bool", dims=(1, 2)),
            ITEMS,
        ),
        outputs=(LOGIT,),
    ),
    ITEM: Graph(inputs=PackedLayout(SCHEMA).inputs(["item_ids"]), outputs=(ITEMS,)),
}


def written(root: Path) -> Path:
    requests = tuple(
        Request(
            user={"age": age},
            context={},
            ts=10.0,
            behaviours=[Event(item="b", ts=5.0, features={})],
            items={"ad": ["a", "zz"]},
            num_items=2,
        )
        for age in (10, None)
    )
    arrays = concat([Encoder(SCHEMA).encode(r) for r in requests])
    return artifact.write(
        root,
        model="toy",
        config={"emb_dim": 4},
        schema=SCHEMA,
        calibration=Calibration(slope=2.0),
        metrics={"auc": 0.7},
        golden=Golden(requests=requests, arrays=arrays, logits=np.array([0.1, 0.2, 0.3, 0.4])),
        inputs=["user.age", "item.ad", "hist_mask", "user_index"],
        graphs=GRAPHS,
        data_hash="d",
        files={MODEL: b"graph", ITEM: b"item graph"},
    )


def test_what_was_written_reads_back(tmp_path):
    path = written(tmp_path)

    read = artifact.read(path)

    assert read.schema == SCHEMA
    assert read.calibration.slope == 2.0
    assert [i.name for i in read.manifest.inputs] == ["user.age", "hist_mask", "item.ad", "user_index"]
    assert read.manifest.graphs == GRAPHS
    assert read.manifest.item_width == 3
    assert read.golden.arrays["hist_mask"].dtype == np.bool_
    assert read.golden.arrays["item.ad"].tolist() == [2, 1, 2, 1]
    assert artifact.resolve(tmp_path, "toy") == path


def test_each_export_is_a_new_version_and_becomes_current(tmp_path):
    first, second = written(tmp_path), written(tmp_path)

    assert first != second
    assert artifact.resolve(tmp_path, "toy") == second
    assert artifact.resolve(tmp_path, "toy", first.name) == first


def test_a_rollback_is_one_pointer(tmp_path):
    first, _ = written(tmp_path), written(tmp_path)

    artifact.make_current(tmp_path, "toy", first.name)

    assert artifact.resolve(tmp_path, "toy") == first


@pytest.mark.parametrize("name", ["schema.json", "calibration.json", "golden.json", "model.onnx"])
def test_one_changed_byte_in_any_file_is_refused(tmp_path, name):
    file = written(tmp_path) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)

    with pytest.raises(ArtifactError, match=rf"{name}: sha256 .* damaged"):
        artifact.read(file.parent)


def test_a_missing_file_is_refused(tmp_path):
    path = written(tmp_path)
    (path / "model.onnx").unlink()

    with pytest.raises(ArtifactError, match="model.onnx: named in the manifest but unreadable"):
        artifact.read(path)


def test_a_manifest_that_points_outside_its_folder_is_refused(tmp_path):
    path = written(tmp_path)
    rewrite(path, lambda m: m["files"].update({"../current.json": "0"}))

    with pytest.raises(ArtifactError, match="not a plain file of this folder"):
        artifact.read(path)


def test_another_schema_than_the_models_is_refused(tmp_path):
    path = written(tmp_path)
    rewrite(path, lambda m: m.update(schema_fingerprint="0" * 64))

    with pytest.raises(ArtifactError, match="fingerprint .* does not match the model's 000000000000; export it again"):
        artifact.read(path)


def test_golden_requests_that_encode_differently_are_refused(tmp_path):
    path = written(tmp_path)
    golden = json.loads((path / "golden.json").read_text())
    golden["arrays"]["item.ad"][0] = 3
    content = json.dumps(golden).encode()
    (path / "golden.json").write_bytes(content)
    rewrite(path, lambda m: m["files"].update({"golden.json": artifact._sha256(content)}))

    with pytest.raises(ArtifactError, match="item.ad encodes to other values"):
        artifact.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.pop("requests"), "expected requests, arrays and logits .*'requests'"),
        (lambda g: g.update(requests=[]), "expected requests, it holds none"),
        (lambda g: g.update(requests=[1]), "expected requests, arrays and logits"),
        (lambda g: g.update(arrays=[1]), "expected requests, arrays and logits"),
        (lambda g: g["requests"][0].update(user=5), "golden.json: "),
        (lambda g: g["requests"][0].update(num_items="2"), "golden.json: "),
        (lambda g: g["arrays"].update({"item.ad": [2.5, 1, 2, 1]}), "item.ad encodes to other values"),
        (lambda g: g["arrays"].update({"item.ad": ["a"]}), "item.ad encodes to other values"),
        (lambda g: g["arrays"].update({"item.ad": [[2], [1, 2]]}), "expected requests, arrays and logits"),
        (lambda g: g["arrays"].pop("hist_age"), "holds no hist_age, which the encoder makes now; export it again$"),
        (lambda g: g.update(logits=[0.1]), "a finite logit for each of 4 candidates"),
        (lambda g: g.update(logits=[0.1, float("nan"), 0.3, 0.4]), "a finite logit for each of 4 candidates"),
    ],
)
def test_golden_rows_of_another_shape_are_one_clear_error(tmp_path, change, message):
    path = written(tmp_path)
    golden = json.loads((path / "golden.json").read_text())
    change(golden)
    content = json.dumps(golden).encode()
    (path / "golden.json").write_bytes(content)
    rewrite(path, lambda m: m["files"].update({"golden.json": artifact._sha256(content)}))

    with pytest.raises(ArtifactError, match=message):
        artifact.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["inputs"][0].update(dtype="int64"), "the schema makes no input .*user.age"),
        (lambda m: m["inputs"].append({"name": "x", "dtype": "int64", "dims": ["U"]}), "the schema makes no input"),
        (lambda m: m["graphs"].pop(MODEL), "at graphs: does not describe model.onnx"),
        (
            lambda m: m["graphs"][MODEL]["inputs"][0].update(dims=[1, 2]),
            r"at graphs\.model\.onnx: takes .* the schema makes",
        ),
        (
            lambda m: m["graphs"][MODEL]["inputs"][1].update(dims=["U", 2]),
            r"at graphs\.model\.onnx: takes .* the schema makes",
        ),
        (
            lambda m: m["graphs"][ITEM]["outputs"][0].update(dims=["C", 4]),
            r"at graphs\.model\.onnx: takes .* the schema makes",
        ),
        (
            lambda m: m.update(inputs=[i for i in m["inputs"] if i["name"] != "hist_mask"]),
            r"at inputs: graphs\.model\.onnx takes history_mask, and hist_mask is not listed",
        ),
        (lambda m: m["graphs"][ITEM].update(outputs=[]), "at graphs.item.onnx: expected one output"),
        (lambda m: m["graphs"].update({"other.onnx": m["graphs"][ITEM]}), "does not list other.onnx"),
        (lambda m: m["files"].pop("golden.json"), "does not list golden.json"),
        (lambda m: m["files"].update({"..": "0"}), "named in the manifest but unreadable"),
        (lambda m: m["files"].update({"a\0b": "0"}), "named in the manifest but unreadable"),
    ],
)
def test_a_manifest_that_contradicts_its_folder_is_refused(tmp_path, change, message):
    path = written(tmp_path)
    rewrite(path, change)

    with pytest.raises(ArtifactError, match=message):
        artifact.read(path)


def test_what_a_killed_export_left_behind_is_in_nobodys_way(tmp_path):
    (tmp_path / "toy" / f".writing-{os.getpid()}").mkdir(parents=True)

    path = written(tmp_path)

    assert artifact.resolve(tmp_path, "toy") == path


def test_exports_that_take_the_same_version_at_once_both_end_up_whole(tmp_path, monkeypatch):
    first: list[Path] = []
    read = artifact.read

    def another_export_is_faster(path):
        if not first:
            first.append(path)
            first[0] = written(tmp_path)
        return read(path)

    monkeypatch.setattr(artifact, "read", another_export_is_faster)
    second = written(tmp_path)

    assert first[0] != second
    assert [read(path).manifest.version for path in (first[0], second)] == [first[0].name, second.name]
    assert {p.name for p in (tmp_path / "toy").iterdir()} == {first[0].name, second.name, "current.json"}


@pytest.mark.parametrize("version", ["..", ".", "", "../toy/1", "/tmp", ".writing-1", "1" * 300, "a\0"])
def test_a_version_is_no_path(tmp_path, version):
    written(tmp_path)
    (tmp_path / "toy" / ".writing-1").mkdir()

    with pytest.raises(ArtifactError, match="no such artifact folder"):
        artifact.resolve(tmp_path, "toy", version)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'"1"'])
def test_a_broken_pointer_is_one_clear_error(tmp_path, content):
    written(tmp_path)
    (tmp_path / "toy" / "current.json").write_bytes(content)

    with pytest.raises(ArtifactError, match="current.json: expected"):
        artifact.resolve(tmp_path, "toy")


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_broken_manifest_is_one_clear_error(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)

    with pytest.raises(ArtifactError, match="manifest.json: at"):
        artifact.read(tmp_path)


def test_scores_of_another_model_are_refused(tmp_path):
    read = artifact.read(written(tmp_path))

    artifact.check_scores(read, np.array([0.1, 0.2, 0.3, 0.4]) + 5e-6)
    with pytest.raises(ArtifactError, match=r"golden row 2 scores 0.31.*\(1 of 4 rows are off\)"):
        artifact.check_scores(read, np.array([0.1, 0.2, 0.31, 0.4]))
    with pytest.raises(ArtifactError, match="golden row 0"):
        artifact.check_scores(read, np.array([np.nan, 0.2, 0.3, 0.4]))
    with pytest.raises(ArtifactError, match="were expected"):
        artifact.check_scores(read, np.array([0.1]))


def test_an_artifact_that_does_not_read_back_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(path):
        raise ArtifactError("no")

    monkeypatch.setattr(artifact, "read", refuse)

    with pytest.raises(ArtifactError):
        written(tmp_path)
    assert list((tmp_path / "toy").iterdir()) == []


@pytest.mark.parametrize(("version", "method"), [("current", "read_text"), ("20260101-1", "is_dir")])
def test_a_folder_that_may_not_be_entered_says_so(tmp_path, monkeypatch, version, method):
    def forbidden(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, method, forbidden)

    with pytest.raises(ArtifactError, match=r"unreadable \(Permission denied\)"):
        artifact.resolve(tmp_path, "toy", version)


def test_a_model_that_was_never_exported_says_so(tmp_path):
    with pytest.raises(ArtifactError, match="export a mian to"):
        artifact.resolve(tmp_path, "mian")
    (tmp_path / "mian").mkdir()
    (tmp_path / "mian" / "current.json").write_text('{"version": "1"}')
    with pytest.raises(ArtifactError, match="no such artifact folder"):
        artifact.resolve(tmp_path, "mian")


def rewrite(path: Path, change) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
