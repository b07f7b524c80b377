"""What is served computes what was trained: ONNX and TorchScript against the module, awkward rows included."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch

from models import zoo
from models.artifact import folder as artifact
from models.artifact.calibration import Calibration
from models.artifact.golden import request_to_json
from tests.models.small import encoded, lively, raw_requests, with_history, without_history
from training import export
from training.export import ExportError

SCHEMA = with_history()
# test_every_model_is_served.py exports and compares every model, with weights that one epoch moved. Here stand those
# whose graphs have the most to them, with weights large enough to show a difference.
OPTIONS: dict[str, dict[str, Any]] = {
    "mian": {"emb_dim": 4, "heads": 2, "cross_layers": 2},
    "stec": {"emb_dim": 4, "dropout": 0.3, "hidden": [8]},
    "stec user_first": {"emb_dim": 4, "hidden": [8], "field_mask": "user_first"},
    "dynint": {"emb_dim": 4, "subspaces": 2, "mode": "dwp", "orth_lambda": 0.1},
    "dynint by request": {"emb_dim": 4, "subspaces": 2, "kernel_size": 5, "gate_scope": "request"},
    "deepmr": {"emb_dim": 4, "dropout": 0.3},
    "feseq": {"emb_dim": 4, "heads": 4, "hidden": [4], "pool_width": 6},
    "feseq with log2 ages": {
        "emb_dim": 4,
        "heads": 4,
        "hidden": [4],
        "interaction": "crossnetv2",
        "pool": "target",
        "time_scale": "log2",
        "time_unit_s": 1,
        "time_buckets": 28,
    },
    "lr": {},
    "finalmlp": {"emb_dim": 4, "hidden_1": [8], "hidden_2": [6], "heads": 2, "gate_1": "user", "gate_2": "item"},
}
SIZES = [(u, c) for u in (1, 2) for c in (1, 2, 100, 1000)]


@pytest.fixture(scope="session", params=OPTIONS)
def exported(request, tmp_path_factory):
    """A model in training mode, as the loop leaves it, and the artifact made of it."""
    name, *_ = request.param.split()
    options = OPTIONS[request.param]
    model = lively(name, SCHEMA, **options).float().train()
    folder = export.export(
        name,
        options,
        model,
        SCHEMA,
        calibration=Calibration(slope=0.9, intercept=-0.1),
        metrics={"auc": 0.7},
        golden_requests=raw_requests(),
        data_hash="abc",
        out=tmp_path_factory.mktemp("artifacts"),
    )
    return model, artifact.read(folder)


def eager(model, arrays):
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return model({name: torch.from_numpy(a) for name, a in arrays.items()}).numpy()


def served_by_onnx(path: Path, arrays):
    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(["logit", "prob"], {i.name: arrays[i.name] for i in session.get_inputs()})


def served_by_torchscript(path: Path, arrays):
    graph = torch.jit.load(path / "model.ts")
    names = [i.name for i in artifact.read(path).manifest.inputs]
    return [output.numpy() for output in graph(*(torch.from_numpy(arrays[name]) for name in names))]


@pytest.mark.parametrize("served", [served_by_onnx, served_by_torchscript])
def test_both_graphs_answer_as_the_model_at_every_size(exported, served):
    model, written = exported
    for num_requests, num_candidates in SIZES:
        for history in (True, False):
            arrays = export.example(SCHEMA, num_requests, num_candidates, history=history)

            logit, prob = served(written.path, arrays)

            expected = eager(model, arrays)
            np.testing.assert_allclose(logit, expected, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(prob, 1 / (1 + np.exp(-expected)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("served", [served_by_onnx, served_by_torchscript])
def test_both_graphs_answer_alike_to_ids_outside_their_tables(exported, served):
    model, written = exported
    arrays = export.example(SCHEMA, 1, 3)
    arrays["item.movie"][:] = [-7, 10**9, 2]

    logit, _ = served(written.path, arrays)

    np.testing.assert_allclose(logit, eager(model, arrays), rtol=1e-5, atol=1e-5)


def test_the_golden_scores_are_the_models_own(exported):
    model, written = exported

    assert list(map(request_to_json, written.golden.requests)) == list(map(request_to_json, raw_requests()))
    np.testing.assert_allclose(written.golden.logits, eager(model, encoded(SCHEMA)), rtol=1e-6, atol=1e-6)
    artifact.check_scores(written, served_by_torchscript(written.path, written.golden.arrays)[0])


def test_the_manifest_names_the_inputs_the_graph_takes_in_their_order(exported):
    _, written = exported
    manifest = written.manifest
    graph = onnx.load(written.path / "model.onnx", load_external_data=False).graph

    assert [i.name for i in graph.input] == [i.name for i in manifest.inputs]
    assert [o.name for o in graph.output] == list(manifest.outputs)
    assert ("hist_mask" in [i.name for i in manifest.inputs]) == (
        manifest.model not in {"stec", "dynint", "deepmr", "lr"}
    )
    for given, listed in zip(graph.input, manifest.inputs, strict=True):
        dims = tuple(d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim)
        assert dims == listed.dims, given.name


def test_the_artifact_is_complete_and_rebuilds_the_model(exported):
    model, written = exported
    manifest = written.manifest

    rebuilt = zoo.build(manifest.model, manifest.config, written.schema)
    rebuilt.load_state_dict(safetensors.torch.load((written.path / "weights.safetensors").read_bytes()))

    assert set(manifest.files) >= {"model.onnx", "model.ts", "weights.safetensors"}
    assert manifest.data_hash == "abc"
    assert written.calibration == Calibration(slope=0.9, intercept=-0.1)
    np.testing.assert_array_equal(eager(rebuilt, encoded(SCHEMA)), eager(model, encoded(SCHEMA)))


def test_exporting_leaves_the_model_in_training_mode(exported):
    model, _ = exported

    assert all(module.training for module in model.modules())


@pytest.fixture(scope="session")
def flat():
    """A schema, a model, its graphs and golden arrays."""
    schema = without_history()
    model = lively("lr", schema).float()
    graphs = {"model.onnx": export.to_onnx(model, schema), "model.ts": export.to_torchscript(model, schema)}
    return schema, model, graphs, encoded(schema)


@pytest.mark.parametrize(("change", "difference"), [(0.5, "0.5"), (float("nan"), "nan"), (1e-3, "0.001")])
def test_graphs_of_another_model_are_refused_with_output_case_and_difference(flat, change, difference):
    schema, model, graphs, golden = flat
    other = copy.deepcopy(model)
    other.get_parameter("bias").data += change

    with pytest.raises(
        ExportError, match=rf"model\.onnx: logit is up to {difference} off the model's at the golden requests"
    ):
        export.check(other, schema, graphs, golden=golden)
