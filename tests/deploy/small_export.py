"""An export as the benchmarks read it, made by hand in a moment: a graph of item rows and one of scores."""

import json
from pathlib import Path

import numpy as np
import onnx
import workload
from checkouts import Export
from inputs import save_inputs
from onnx import TensorProto, helper, numpy_helper

NUM_CANDIDATES = 7
NUM_REQUESTS = 4


def write(folder: Path) -> Export:
    """logit = sum(request table[request_ids]) . item table[item_ids]."""
    draw = np.random.default_rng(1)
    tables = {name: draw.standard_normal((20, 3), dtype=np.float32) for name in ("request_table", "item_table")}
    artifact = folder / "artifacts" / "small" / "1"
    artifact.mkdir(parents=True)
    ids = helper.make_tensor_value_info
    item = _model(
        [helper.make_node("Gather", ["item_table", "item_ids"], ["items"])],
        [ids("item_ids", TensorProto.INT64, ["C"])],
        [ids("items", TensorProto.FLOAT, ["C", 3])],
        {"item_table": tables["item_table"]},
    )
    model = _model(
        [
            helper.make_node("Gather", ["request_table", "request_ids"], ["rows"]),
            helper.make_node("ReduceSum", ["rows", "axes"], ["request"], keepdims=0),
            helper.make_node("MatMul", ["items", "request"], ["logit"]),
        ],
        [ids("request_ids", TensorProto.INT64, [1, 2]), ids("items", TensorProto.FLOAT, ["C", 3])],
        [ids("logit", TensorProto.FLOAT, ["C"])],
        {"request_table": tables["request_table"], "axes": np.array([0, 1])},
    )
    onnx.save(item, str(artifact / "item.onnx"))
    onnx.save(model, str(artifact / "model.onnx"))
    graph = workload.composed_graph(artifact)
    onnx.save(graph, str(folder / "graph.onnx"))
    requests = [
        {"request_ids": draw.integers(20, size=(1, 2)), "item_ids": draw.integers(20, size=NUM_CANDIDATES)}
        for _ in range(NUM_REQUESTS)
    ]
    logits = [
        tables["item_table"][r["item_ids"]] @ tables["request_table"][r["request_ids"]].sum((0, 1)) for r in requests
    ]
    save_inputs(requests, folder / f"inputs-{NUM_CANDIDATES}.npz")
    np.save(folder / f"logits-{NUM_CANDIDATES}.npy", np.stack(logits))
    (folder / "facts.json").write_text(json.dumps({"model": "small", **workload.graph_facts(graph)}))
    return Export(folder=folder)


def _model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: dict[str, np.ndarray],
) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
