"""What is served computes what was trained: every graph, fed with item.onnx's rows, against the module."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
import pytest
import safetensors.torch
import torch

from models import zoo
from models.artifact import folder as artifact
from models.artifact.calibration import Calibration
from models.artifact.folder import Artifact
from models.artifact.golden import request_to_json
from models.artifact.manifest import BATCHED, ITEM, MODEL, TORCHSCRIPT
from models.features.arrays import Arrays, concat
from models.features.encoder import Encoder
from models.features.field import FieldSpec
from models.features.packing import PackedLayout, slice_candidates
from models.features.schema import SchemaSpec
from models.layers.base import CTRModel
from tests.models.small import COLUMNS, REQUEST_FIELDS, lively, raw_requests, with_fields_of_clicks, with_history
from tests.trained_models import trained_and_exported
from training import export
from training.export import ExportError

# Forms that no recipe has, with weights large enough to show a difference. Every model of the zoo stands beside them.
FORMS: dict[str, dict[str, Any]] = {
    "stec user_first": {"emb_dim": 4, "hidden": [8], "field_mask": "user_first", "bilinear_form": "qk"},
    "dynint with dwp by request": {"emb_dim": 4, "subspaces": 2, "mode": "dwp", "gate_scope": "request"},
    "feseq with log2 ages": {
        "emb_dim": 4,
        "heads": 4,
        "hidden": [4],
        "interaction": "crossnetv2",
        "interact_layers_in": 1,
        "interact_layers_item": 1,
        "pool": "target",
        "time_scale": "log2",
        "time_unit_s": 1,
        "time_buckets": 28,
    },
}
CALIBRATION = Calibration(slope=0.9, intercept=-0.1)
NO_HISTORY = {"stec", "dynint", "deepmr", "lr"}  # models that read none
SIZES = [(1, 2), (2, 100)]
MORE_SIZES = [(u, c) for u in (1, 2) for c in (1, 2, 100, 1000)]  # for the papers' models


def exported(temp: pytest.TempPathFactory, form: str) -> tuple[CTRModel, Artifact]:
    """A lively float32 model, in training mode as the loop leaves it, and its artifact; `form` begins with its name."""
    name, *_ = form.split()
    schema = with_fields_of_clicks() if name == "feseq" else with_history()
    model = lively(name, schema, **FORMS[form]).float().train()
    folder = export.export(
        name,
        FORMS[form],
        model,
        schema,
        calibration=CALIBRATION,
        metrics={"auc": 0.7},
        golden_requests=raw_requests(),
        data_hash="abc",
        out=temp.mktemp("exports"),
    )
    return model, artifact.read(folder)


# Another process exports them for test_every_model_is_served.py, first to last: the two meet in the middle.
@pytest.fixture(scope="session", params=[*FORMS, *reversed(zoo.MODELS)])
def model_and_artifact(request, tmp_path_factory):
    if request.param in FORMS:
        return exported(tmp_path_factory, request.param)
    run, written = trained_and_exported(tmp_path_factory, request.param)
    return run.model, written


Run = Callable[[Arrays], dict[str, np.ndarray]]
"""Packed arrays to a graph's outputs by name."""


def graph(written: Artifact, file: str) -> Run:
    """One graph of an artifact, fed as its manifest says."""
    described = written.manifest.graphs[file]
    names = [i.name for i in described.inputs]
    outputs = [o.name for o in described.outputs]
    if file == TORCHSCRIPT:
        module = torch.jit.load(written.path / file)
        return lambda packed: {"logit": module(*(torch.from_numpy(packed[name]) for name in names)).numpy()}
    session = onnxruntime.InferenceSession(written.path / file, providers=["CPUExecutionProvider"])
    return lambda packed: dict(zip(outputs, session.run(outputs, {name: packed[name] for name in names}), strict=True))


def packed_with_items(written: Artifact, arrays: Arrays) -> Arrays:
    """The encoder's arrays packed, and the item rows that item.onnx makes of them."""
    packed = PackedLayout(written.schema).pack(arrays)
    return packed | graph(written, ITEM)(packed)


def eager(model: CTRModel, arrays: Arrays) -> np.ndarray:
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        logits: np.ndarray = model({name: torch.from_numpy(a) for name, a in arrays.items()}).numpy()
    return logits


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_every_graph_answers_as_the_model_at_every_size(model_and_artifact):
    model, written = model_and_artifact
    manifest = written.manifest
    graphs = {file: graph(written, file) for file in manifest.graphs if file != ITEM}
    is_of_a_paper = manifest.model in {"mian", "stec", "dynint", "deepmr", "feseq"}
    for num_requests, num_candidates in MORE_SIZES if is_of_a_paper else SIZES:
        for history in (True, False):
            arrays = export.example(written.schema, num_requests, num_candidates, history=history)
            packed = packed_with_items(written, arrays)
            expected = eager(model, arrays)
            for file, run in graphs.items():
                if file != MODEL or num_requests == 1:
                    assert_close(run(packed)["logit"], expected)


@pytest.mark.parametrize("cuts", [[5], [1, 2, 11], [7, 8, 9, 10]])
def test_rows_made_in_other_batches_and_fed_in_another_order_give_the_same_scores(model_and_artifact, cuts):
    model, written = model_and_artifact
    arrays = export.example(written.schema, 1, 12)
    packed, make = PackedLayout(written.schema).pack(arrays), graph(written, ITEM)
    order = np.random.default_rng(0).permutation(12)

    kept = np.concatenate([make(slice_candidates(packed, part))["items"] for part in np.split(np.arange(12), cuts)])
    logits = graph(written, MODEL)(packed | {"items": kept[order]})["logit"]

    assert kept.shape == (12, written.manifest.item_width)
    assert_close(logits, eager(model, arrays)[order])


def test_the_batched_graph_joins_requests_that_the_other_scores_alone(model_and_artifact):
    _, written = model_and_artifact
    requests = [export.example(written.schema, 1, n) for n in (3, 1, 6)]
    alone, joined = graph(written, MODEL), graph(written, BATCHED)

    together = joined(packed_with_items(written, concat(requests)))["logit"]

    assert_close(together, np.concatenate([alone(packed_with_items(written, r))["logit"] for r in requests]))


def test_the_golden_scores_are_the_models_own(model_and_artifact):
    model, written = model_and_artifact

    arrays = concat([Encoder(written.schema).encode(request) for request in written.golden.requests])
    np.testing.assert_allclose(written.golden.logits, eager(model, arrays), rtol=1e-6, atol=1e-6)
    packed = packed_with_items(written, written.golden.arrays)
    artifact.check_scores(written, graph(written, TORCHSCRIPT)(packed)["logit"])


def test_the_manifest_describes_each_graph_as_it_is(model_and_artifact):
    _, written = model_and_artifact
    manifest, layout = written.manifest, PackedLayout(written.schema)
    packed = {i.name: i for i in layout.inputs(["history_mask", "user_index", *layout.request.input_names])}

    for file, described in manifest.graphs.items():
        if file.endswith(".onnx"):
            proto = onnx.load(written.path / file).graph
            for listed, values in ((described.inputs, proto.input), (described.outputs, proto.output)):
                assert [i.name for i in listed] == [v.name for v in values]
                shapes = [tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values]
                assert shapes == [i.dims for i in listed]
    reads = {file: {i.name for i in described.inputs} for file, described in manifest.graphs.items()}
    assert reads[MODEL] == reads[BATCHED] - {"user_index"}
    assert all(i.dims[0] == 1 for i in manifest.graphs[MODEL].inputs if i.name != "items")
    assert all(i.dims[0] == "U" for i in manifest.graphs[BATCHED].inputs if i.name not in {"items", "user_index"})
    assert ("history_mask" in reads[MODEL]) == (manifest.model not in NO_HISTORY)
    assert ("hist_mask" in {i.name for i in manifest.inputs}) == ("history_mask" in reads[MODEL])
    assert packed["history_mask"].dims == ("U", written.schema.history_length)


def test_no_graph_decides_anything_and_each_table_is_one_constant_where_it_is_read(model_and_artifact):
    _, written = model_and_artifact

    for file in written.manifest.graphs:
        if file.endswith(".onnx"):
            proto = onnx.load(written.path / file).graph
            assert {node.op_type for node in proto.node} & {"If", "Loop", "Scan"} == set()
            constants = {constant.name for constant in proto.initializer}
            for node in proto.node:
                assert not {*node.input} <= constants, f"{file}: {node.op_type} of constants alone"
            tables = [n.input[0] for n in proto.node if n.op_type == "Gather" and n.input[1].endswith("_ids")]
            assert {*tables} <= constants
            assert len(tables) == len({*tables})


def test_the_artifact_is_complete_and_rebuilds_the_model(model_and_artifact):
    model, written = model_and_artifact
    manifest, arrays = written.manifest, written.golden.arrays

    rebuilt = zoo.build(manifest.model, manifest.config, written.schema)
    rebuilt.load_state_dict(safetensors.torch.load((written.path / "weights.safetensors").read_bytes()))

    assert set(manifest.files) >= {MODEL, BATCHED, TORCHSCRIPT, ITEM, "weights.safetensors"}
    np.testing.assert_array_equal(eager(rebuilt, arrays), eager(model, arrays))


@pytest.mark.parametrize("model_and_artifact", FORMS, indirect=True)
def test_an_export_leaves_the_model_in_training_mode_and_tells_what_it_was_handed(model_and_artifact):
    model, written = model_and_artifact

    assert all(module.training for module in model.modules())
    assert list(map(request_to_json, written.golden.requests)) == list(map(request_to_json, raw_requests()))
    assert written.calibration == CALIBRATION
    assert (written.manifest.data_hash, written.manifest.metrics) == ("abc", {"auc": 0.7})


@pytest.fixture(scope="session")
def flat(tmp_path_factory):
    """A schema, a model of it, its graphs and golden arrays."""
    run, written = trained_and_exported(tmp_path_factory, "lr")
    graphs = {file: (written.path / file).read_bytes() for file in written.manifest.graphs}
    return written.schema, run.model, graphs, written.golden.arrays


@pytest.mark.parametrize(("change", "difference"), [(0.5, "0.5"), (float("nan"), "nan"), (1e-3, "0.001")])
def test_graphs_of_another_model_are_refused_with_output_case_and_difference(flat, change, difference):
    schema, model, graphs, golden = flat
    other = copy.deepcopy(model)
    other.get_parameter("bias").data += change

    with pytest.raises(
        ExportError, match=rf"model\.onnx: logit is up to {difference} off the model's at the golden requests"
    ):
        export.check(other, schema, graphs, golden=golden)


def test_item_rows_of_another_model_are_refused(flat):
    schema, model, graphs, golden = flat
    other = onnx.load_from_string(graphs[ITEM])
    for constant in other.graph.initializer:
        values = onnx.numpy_helper.to_array(constant)
        if values.dtype == np.float32:
            constant.CopyFrom(onnx.numpy_helper.from_array(2 * values, constant.name))

    with pytest.raises(ExportError, match=r"model\.onnx: logit is up to .* off the model's at the golden requests"):
        export.check(model, schema, graphs | {ITEM: other.SerializeToString()}, golden=golden)


def test_a_schema_without_item_fields_is_refused():
    schema = SchemaSpec(fields=REQUEST_FIELDS).fit(COLUMNS)

    with pytest.raises(ExportError, match="an item row is made of the schema's item fields, and of them alone"):
        export.to_graphs(lively("lr", schema).float(), schema)


def test_an_item_row_that_reads_the_request_is_refused():
    class Peeks(CTRModel):
        def encode_user(self, inputs):
            return {"ids": inputs["request_ids"]}

        def encode_items(self, inputs):
            return inputs["item_ids"].float() + inputs["history_age"].float().mean()

    with pytest.raises(ExportError, match="of them alone; this model reads history_age, item_ids"):
        export.signatures(Peeks(), with_history())


def test_a_one_field_schema_is_exported_too():
    schema = SchemaSpec(fields=(FieldSpec(name="movie", kind="categorical", group="item"),)).fit(COLUMNS)
    model = lively("lr", schema).float()
    golden = concat([Encoder(schema).encode(request) for request in raw_requests()])

    export.check(model, schema, export.to_graphs(model, schema), golden=golden)
