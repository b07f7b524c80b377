import json
from pathlib import Path

import numpy as np
import pytest

from models import artifact
from models.artifact import ArtifactError, Golden
from models.calibration import Calibration
from models.encoding import Encoder, Event, Request, concat
from models.schema import FieldSpec, SchemaSpec

SCHEMA = SchemaSpec(
    item_key="ad",
    history_length=2,
    fields=(
        FieldSpec(name="age", kind="numeric", group="user"),
        FieldSpec(name="ad", kind="categorical", group="item"),
        FieldSpec(name="ad", kind="sequence", group="behaviour", of="ad"),
    ),
).fit({"age": [10, 20], "ad": ["a", "b"]})


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
        inputs=["user.age", "item.ad", "user_index"],
        data_hash="d",
        files={"model.onnx": b"graph"},
    )


def test_what_was_written_reads_back(tmp_path):
    path = written(tmp_path)

    read = artifact.read(path)

    assert read.schema == SCHEMA
    assert read.calibration.slope == 2.0
    assert [i.name for i in read.manifest.inputs] == ["user.age", "item.ad", "user_index"]
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
