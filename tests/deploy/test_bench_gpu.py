"""The GPU's table, made on the CPU: its parity, its floors, and what it says where there is no GPU."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from models.artifact import folder as artifact
from models.artifact.calibration import Calibration
from models.artifact.manifest import BATCHED, TORCHSCRIPT
from tests.trained_models import trained_and_exported
from training import export

FEW = ["--device", "cpu", "--sizes", "3,20", "--repeats", "4"]


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "deploy" / "bench")
        yield importlib.import_module("gpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes artifacts of LR in ONNX and, in TorchScript, of the model that it is given."""
    run, exported = trained_and_exported(tmp_path_factory, "lr")
    model, schema, signatures = run.model, exported.schema, exported.manifest.graphs
    graphs = {file: (exported.path / file).read_bytes() for file in signatures}

    def write(of_torchscript: Any = model) -> Path:
        signature = signatures[TORCHSCRIPT]
        traced = export._to_torchscript(export._ScoringGraph(of_torchscript, signature), signature, schema)
        return artifact.write(
            tmp_path_factory.mktemp("artifacts"), model="lr", config={}, schema=schema,
            calibration=Calibration(slope=1.0, intercept=0.0), metrics={}, golden=exported.golden,
            inputs=[i.name for i in export.used_inputs(model, schema)], graphs=signatures, data_hash="none",
            files={**graphs, TORCHSCRIPT: traced},
        )  # fmt: skip

    return write


def test_the_table_has_a_line_for_each_runtime_and_size(gpu, written, tmp_path, capsys):
    code = gpu.main([str(written()), *FEW, "--out", str(tmp_path / "gpu.md")])

    printed = capsys.readouterr().out
    lines = [line.split(" | ") for line in printed.splitlines()[4:]]
    assert code == 0
    assert printed == (tmp_path / "gpu.md").read_text()
    assert [line[:2] for line in lines] == [
        ["| ONNX Runtime", "3"], ["| TorchScript", "3"], ["| ONNX Runtime", "20"], ["| TorchScript", "20"],
    ]  # fmt: skip
    for line in lines:
        off, ms, speed, memory_ms, launch_ms, over = (float(cell.strip(" |").replace(",", "")) for cell in line[2:])
        assert off < 1e-5
        assert min(ms, speed, memory_ms, launch_ms) > 0
        assert over == pytest.approx(ms / max(memory_ms, launch_ms), rel=0.1, abs=0.06)


def test_a_runtime_that_scores_otherwise_fails_the_command(gpu, written, capsys, tmp_path_factory):
    other, _ = trained_and_exported(tmp_path_factory, "lr")
    for parameter in other.model.parameters():
        parameter.data += 0.01

    assert gpu.main([str(written(other.model)), *FEW]) == 1
    assert float(capsys.readouterr().out.splitlines()[5].split(" | ")[2]) > 1e-5


def test_where_there_is_no_gpu_it_says_so(gpu, written, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU on this machine")

    assert gpu.main([str(written())]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "device cuda needs onnxruntime-gpu" in error


def test_the_work_of_a_graph_is_its_weights_once_and_each_tensor_twice(gpu, tmp_path):
    """logit = relu(table[ids]) w: C ids, C x 4 rows, C x 4 after the relu, C logits."""
    table, weight = np.ones((1000, 4), np.float32), np.ones(4, np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "item.id"], ["rows"]),
        helper.make_node("Relu", ["rows"], ["positive"]),
        helper.make_node("MatMul", ["positive", "weight"], ["logit"]),
    ]
    ids = helper.make_tensor_value_info("item.id", TensorProto.INT64, ["C"])
    logit = helper.make_tensor_value_info("logit", TensorProto.FLOAT, ["C"])
    weights = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(weight, "weight")]
    graph = helper.make_graph(nodes, "small", [ids], [logit], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / BATCHED)
    rows = torch.from_numpy(table)
    module = torch.jit.trace(lambda ids: torch.relu(rows[ids]).unsqueeze(0) * 2, torch.arange(7))
    torch.jit.save(module, str(tmp_path / TORCHSCRIPT))

    done = gpu.work(tmp_path, 10)

    assert done.num_bytes == 4 * 4 + 2 * (10 * 8 + 2 * 10 * 4 * 4 + 10 * 4)
    assert done.steps == {"onnx": 3, "torchscript": 3}  # of those three: the rows, the relu and the product
