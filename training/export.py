"""A trained model as the graphs that serving runs, proven equal to it and packed for serving.

- `item.onnx` makes an ad's item row, once per version; `model.onnx` scores one request's candidates by their rows;
- `model.batched.onnx` and `model.ts` (TorchScript) do so for the joined candidates of several requests;
- `explain.onnx` gives, from the ads' ids, what the model shows of itself beside the logits.

All take packed inputs (`models.features.packing`).
"""

import copy
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx.reference
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.artifact import folder as artifact
from models.artifact.calibration import Calibration
from models.artifact.folder import LOGIT_TOLERANCE, Golden
from models.artifact.manifest import BATCHED, EXPLAINING, ITEM, MODEL, TORCHSCRIPT, Graph
from models.features.arrays import Arrays, concat
from models.features.encoder import Encoder
from models.features.field import PAD, Input, input_name
from models.features.packing import PackedLayout, slice_candidates
from models.features.request import Request
from models.features.schema import Schema
from models.layers.base import CTRModel, explain, shown
from models.layers.folding import folded_weights
from models.layers.intermediates import recording

# From 1.31 on it reports its use to its makers, on Linux too, and asks only once: when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

# Exporters take a size of 0 or 1 for a constant, and equal sizes for the same dimension.
EXAMPLE_SIZES = (3, 5)  # U, C
LONGEST_AGE_S = 40_000_000  # of an event in an example: more than a year
CHECKED_SIZES = ((1, 1), (1, 2), (1, 100), (1, 1000), (2, 1), (2, 2), (2, 100), (2, 1000))
SHOWN_TOLERANCE = 1e-4  # a softmax of large scores makes more of float32's differences
MOST_EXPLAINED = 20  # candidates: the service explains one request of a few


Outputs: TypeAlias = tuple[NDArray[Any], ...]
"""One array for each of a graph's outputs."""
Run: TypeAlias = Callable[[Arrays], Outputs]
"""Reads what the graph takes from among packed arrays."""


class ExportError(RuntimeError):
    """An exported graph does not compute what the trained model does."""


def export(
    name: str,
    config: Mapping[str, Any],
    model: CTRModel,
    schema: Schema,
    *,
    calibration: Calibration,
    metrics: Mapping[str, Any],
    golden_requests: Sequence[Request],
    data_hash: str,
    out: Path,
) -> Path:
    """Write a trained model's artifact under `out`, read it back as the service does, and return its folder.

    `golden_requests`, about 32 raw ones, stay in the artifact with the scores that the model gives them now.
    Raises ExportError where a graph and the model differ or the schema has no item field, ArtifactError where the
    folder does not read back.
    """
    model = copy.deepcopy(model).cpu().float().eval()
    arrays = concat([Encoder(schema).encode(request) for request in golden_requests])
    graphs = to_graphs(model, schema)
    check(model, schema, graphs, golden=arrays)
    with torch.no_grad():
        logits = model(_tensors(arrays)).numpy()
    return artifact.write(
        out,
        model=name,
        config=config,
        schema=schema,
        calibration=calibration,
        metrics=metrics,
        golden=Golden(requests=tuple(golden_requests), arrays=arrays, logits=logits),
        inputs=[i.name for i in used_inputs(model, schema)],
        graphs=signatures(model, schema),
        data_hash=data_hash,
        files={**graphs, "weights.safetensors": safetensors.torch.save(model.state_dict())},
        explain=model.explanations(),
    )


def used_inputs(model: CTRModel, schema: Schema) -> tuple[Input, ...]:
    """Those of the schema's inputs that the model reads, in the schema's order: STEC, say, reads no history."""
    reads = _Reads(_tensors(example(schema, *EXAMPLE_SIZES)))
    with torch.no_grad():
        model(reads)
    return tuple(i for i in schema.inputs if i.name in reads.names)


def signatures(model: CTRModel, schema: Schema) -> dict[str, Graph]:
    """What each graph of the model takes and gives, by the graph's file name; dimensions are U, C or a number."""
    layout, tensors = PackedLayout(schema), _tensors(_packed(schema, *EXAMPLE_SIZES))
    reads, item_reads = _Reads(tensors), _Reads(tensors)
    with torch.no_grad():
        model.encode_user(reads)
        width = model.encode_items(item_reads).shape[1]
    items = Input(name="items", dtype="float32", dims=("C", width))
    logit = Input(name="logit", dtype="float32", dims=("C",))
    (user_index,) = layout.inputs(["user_index"])
    request, item = layout.inputs([*reads.names]), layout.inputs([*item_reads.names])
    if not item or not {i.name for i in item} <= {*layout.item.input_names}:
        names = ", ".join(sorted(item_reads.names)) or "nothing"
        raise ExportError(
            f"an item row is made of the schema's item fields, and of them alone; this model reads {names}"
        )
    one_request = tuple(replace(i, dims=(1, *i.dims[1:])) for i in request)
    graphs = {
        MODEL: Graph(inputs=(*one_request, items), outputs=(logit,)),
        BATCHED: Graph(inputs=(*request, items, user_index), outputs=(logit,)),
        TORCHSCRIPT: Graph(inputs=(*request, items, user_index), outputs=(logit,)),
        ITEM: Graph(inputs=item, outputs=(items,)),
    }
    if model.explanations():
        length = schema.history_length
        tensors_shown = tuple(
            Input(name=explanation.name, dtype="float32", dims=explanation.dims(history_length=length))
            for explanation in model.explanations()
        )
        graphs[EXPLAINING] = Graph(inputs=(*request, *item, user_index), outputs=(logit, *tensors_shown))
    return graphs


def to_graphs(model: CTRModel, schema: Schema) -> dict[str, bytes]:
    """The graphs of a model in eval mode, by file name, each self-contained; at most 2 GB together, where ONNX ends.

    Tracing takes nearly all the time, so there are two: of one request, and of several from their ids on, whose parts
    are the item half, the batched graph and the explaining one.
    """
    assert not model.training, "dropout and batch statistics do not belong in a graph"
    graphs = signatures(model, schema)
    explained = graphs[EXPLAINING].outputs[1:] if EXPLAINING in graphs else ()
    (items,), (logit,) = graphs[ITEM].outputs, graphs[MODEL].outputs
    *request, _, user_index = graphs[BATCHED].inputs
    composed = Graph(inputs=(*request, *graphs[ITEM].inputs, user_index), outputs=(logit, items, *explained))
    with folded_weights():
        composed_graph = _to_onnx(_ComposedGraph(model, composed), composed, schema)
        contents = {
            MODEL: _to_onnx(_ScoringGraph(model, graphs[MODEL]), graphs[MODEL], schema).SerializeToString(),
            TORCHSCRIPT: _to_torchscript(_ScoringGraph(model, graphs[TORCHSCRIPT]), graphs[TORCHSCRIPT], schema),
        }
    for file in (ITEM, BATCHED, *([EXPLAINING] if explained else [])):
        contents[file] = _part(composed_graph, graphs[file]).SerializeToString()
    return contents


class _ScoringGraph(nn.Module):
    """Inputs by position; out come the logits [C], not calibrated. Without `user_index` all are of one request."""

    def __init__(self, model: CTRModel, graph: Graph) -> None:
        super().__init__()
        self.model, self.names = model, [i.name for i in graph.inputs]

    def forward(self, *values: Tensor) -> Tensor:
        inputs = dict(zip(self.names, values, strict=True))
        return self.model.score(self.model.encode_user(inputs), inputs["items"], inputs.get("user_index"))


class _ComposedGraph(nn.Module):
    """Inputs by position; out come the logits, the item rows they were made of, and what the model shows of itself."""

    def __init__(self, model: CTRModel, graph: Graph) -> None:
        super().__init__()
        self.model, self.names, self.explanations = model, [i.name for i in graph.inputs], model.explanations()

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(self.names, values, strict=True))
        if not self.explanations:
            items_CW = self.model.encode_items(inputs)
            return self.model.score(self.model.encode_user(inputs), items_CW, inputs["user_index"]), items_CW
        with recording() as recorded:  # of all three parts: FESeq, say, makes its query where it makes item rows
            items_CW = self.model.encode_items(inputs)
            logit_C = self.model.score(self.model.encode_user(inputs), items_CW, inputs["user_index"])
        return logit_C, items_CW, *shown(recorded, self.explanations).values()


def _to_onnx(module: nn.Module, graph: Graph, schema: Schema) -> onnx.ModelProto:
    values = _example_values(graph, schema)
    dims = {"U": torch.export.Dim("U"), "C": torch.export.Dim("C")}
    shapes = tuple({axis: dims[d] for axis, d in enumerate(i.dims) if isinstance(d, str)} for i in graph.inputs)
    with _known_warnings(), torch.no_grad():
        module.eval()(*values)  # computes what `folded_weights` keeps, before anything is traced
        # Exported here, as torch.onnx would make of a size that is not free a constant, and say nothing.
        exported = torch.export.export(module, values, dynamic_shapes=(shapes,))
        program = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            input_names=[i.name for i in graph.inputs],
            output_names=[o.name for o in graph.outputs],
        )
    assert program is not None
    return _part(_folded(program.model_proto), graph)


def _to_torchscript(module: nn.Module, graph: Graph, schema: Schema) -> bytes:
    buffer = io.BytesIO()
    with _known_warnings(), torch.no_grad():
        traced = torch.jit.trace(module.eval(), _example_values(graph, schema))  # type: ignore[no-untyped-call]  # torch's
        # Its numeric rewrites fold a batch norm into a layer whose output is read elsewhere too (DIN's Dice).
        torch.jit.save(torch.jit.freeze(traced, optimize_numerics=False), buffer)
    return buffer.getvalue()


def _folded(proto: onnx.ModelProto) -> onnx.ModelProto:
    """With a constant in place of every node that reads constants alone, unless it gives an output of the graph."""
    constants = {constant.name for constant in proto.graph.initializer}
    outputs = {output.name for output in proto.graph.output}
    folded: list[onnx.NodeProto] = []
    others: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        is_folded = {*node.input} <= {*constants, ""} and not outputs & {*node.output}
        (folded if is_folded else others).append(node)
        if is_folded:
            constants |= {*node.output}
    if not folded:
        return proto
    read = {name for node in others for name in node.input}
    names = [name for node in folded for name in node.output if name in read]
    values = [onnx.helper.make_empty_tensor_value_info(name) for name in names]
    graph = onnx.helper.make_graph(folded, "constants", [], values, proto.graph.initializer)
    model = onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    results = onnx.reference.ReferenceEvaluator(model).run(names, {})
    made = [onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in zip(names, results, strict=True)]
    del proto.graph.node[:]
    proto.graph.node.extend(others)
    proto.graph.initializer.extend(made)
    return proto


def _part(proto: onnx.ModelProto, graph: Graph) -> onnx.ModelProto:
    """Those nodes and constants of an ONNX model that make these outputs of these inputs."""
    makers = {output: node for node in proto.graph.node for output in node.output}
    constants = {constant.name: constant for constant in proto.graph.initializer}
    inputs = {i.name for i in graph.inputs}
    used: set[str] = set()
    pending = [output.name for output in graph.outputs]
    while pending:
        name = pending.pop()
        if name in used or name in inputs or not name:
            continue
        used.add(name)
        if name in makers:
            pending += makers[name].input
        elif name not in constants:
            outputs = ", ".join(o.name for o in graph.outputs)
            raise ExportError(f"{outputs} depends on {name}, which is no input of its graph")
    nodes = [node for node in proto.graph.node if used & {*node.output}]
    part = onnx.helper.make_graph(
        nodes,
        proto.graph.name,
        [_value_info(i) for i in graph.inputs],
        [_value_info(o) for o in graph.outputs],
        [constant for name, constant in constants.items() if name in used],
    )
    return onnx.helper.make_model(part, opset_imports=proto.opset_import, ir_version=proto.ir_version)


def _value_info(value: Input) -> onnx.ValueInfoProto:
    kinds = {"int64": onnx.TensorProto.INT64, "float32": onnx.TensorProto.FLOAT, "bool": onnx.TensorProto.BOOL}
    return onnx.helper.make_tensor_value_info(value.name, kinds[value.dtype], value.dims)


def check(model: CTRModel, schema: Schema, graphs: Mapping[str, bytes], *, golden: Arrays) -> None:
    """Compare the graphs, each by its file's name, with the model: at several sizes, with and without history, on the
    golden requests. The item rows that scoring graphs are fed are those of item.onnx where it is among the graphs.

    Raises ExportError, saying which output of which graph is off, at which sizes and by how much.
    """
    known = signatures(model, schema)
    layout = PackedLayout(schema)
    make_items = _run_onnx(graphs[ITEM], known[ITEM]) if ITEM in graphs else None
    runs = {
        file: _run_torchscript(content, known[file]) if file == TORCHSCRIPT else _run_onnx(content, known[file])
        for file, content in graphs.items()
        if file != ITEM
    }
    for case, arrays in _cases(schema, CHECKED_SIZES, golden):
        is_explained = case == _GOLDEN or len(arrays["user_index"]) <= MOST_EXPLAINED
        packed = layout.pack(arrays)
        packed["items"] = _items(model, packed) if make_items is None else make_items(packed)[0]
        expected = _eager(model, arrays, shows=EXPLAINING in graphs and is_explained)
        for file, run in runs.items():
            if file == EXPLAINING and not is_explained:
                continue
            found = _one_by_one(run, packed) if file == MODEL else run(packed)
            for output, value in zip(known[file].outputs, found, strict=True):
                _compare(file, output.name, value, expected[output.name], case)


_GOLDEN = "the golden requests"


def _compare(file: str, output: str, found: NDArray[Any], expected: NDArray[Any], case: str) -> None:
    if found.shape != expected.shape:
        raise ExportError(f"{file}: {output} has shape {found.shape}, not {expected.shape}, at {case}")
    off = np.abs(found - expected)
    # Of what a row adds up, each part is as far off as the largest makes it.
    largest = np.abs(expected).max(axis=tuple(range(1, expected.ndim)), keepdims=True, initial=0)
    tolerance = LOGIT_TOLERANCE if output == "logit" else SHOWN_TOLERANCE
    if not (off <= tolerance * (1 + largest)).all():
        raise ExportError(f"{file}: {output} is up to {off.max():.3g} off the model's at {case}")


def _one_by_one(run: Run, packed: Arrays) -> Outputs:
    """Joined requests scored each on its own, as the graph of one request does, in the candidates' order."""
    index_C = packed["user_index"]
    logits_C = np.empty(len(index_C), dtype=np.float32)
    for user in np.unique(index_C).tolist():
        rows = np.flatnonzero(index_C == user)
        alone = slice_candidates(packed, rows)
        by_request = {n: a[user : user + 1] for n, a in alone.items() if n.startswith(("request_", "history_"))}
        (logits_C[rows],) = run(alone | by_request)
    return (logits_C,)


def _cases(schema: Schema, sizes: Iterable[tuple[int, int]], golden: Arrays) -> Iterator[tuple[str, Arrays]]:
    yield _GOLDEN, golden
    for num_requests, num_candidates in sizes:
        case = f"U={num_requests}, C={num_candidates}"
        yield case, example(schema, num_requests, num_candidates)
        yield f"{case}, no history", example(schema, num_requests, num_candidates, history=False)


def example(schema: Schema, num_requests: int, num_candidates: int, *, history: bool = True) -> Arrays:
    """Inputs of that many requests and candidates: any ids, histories of any length, or of none."""
    draw = np.random.default_rng([num_requests, num_candidates])
    lengths_U1 = draw.integers(0, schema.history_length + 1, size=(num_requests, 1)) if history else 0
    mask_UT = np.arange(schema.history_length) >= schema.history_length - lengths_U1 * np.ones((num_requests, 1))
    num_ids = {input_name(f): schema.field(f.of or f.name).num_ids for f in schema.fields}
    arrays: Arrays = {}
    for i in schema.inputs:
        shape = i.shape(users=num_requests, candidates=num_candidates)
        if i.name == "user_index":
            arrays[i.name] = draw.integers(0, num_requests, size=shape)
        elif i.name == "hist_mask":
            arrays[i.name] = mask_UT
        elif i.name == "hist_age":
            arrays[i.name] = draw.integers(0, LONGEST_AGE_S, size=shape) * mask_UT
        elif i.dtype == "float32":
            arrays[i.name] = draw.standard_normal(shape, dtype=np.float32)
        else:
            arrays[i.name] = draw.integers(PAD, num_ids[i.name], size=shape)
            if i.name.startswith("hist."):
                arrays[i.name][~mask_UT] = PAD
    return arrays


def _run_onnx(content: bytes, graph: Graph) -> Run:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    outputs = [o.name for o in graph.outputs]
    return lambda packed: tuple(session.run(outputs, {i.name: packed[i.name] for i in graph.inputs}))


def _run_torchscript(content: bytes, graph: Graph) -> Run:
    with _known_warnings():
        loaded = torch.jit.load(io.BytesIO(content))  # type: ignore[no-untyped-call]  # torch's

    @torch.no_grad()
    def run(packed: Arrays) -> Outputs:
        return (loaded(*(torch.from_numpy(packed[i.name]) for i in graph.inputs)).numpy(),)

    return run


@torch.no_grad()
def _eager(model: CTRModel, arrays: Arrays, *, shows: bool) -> Arrays:
    """The model's own logits of the encoder's arrays, by name, and what it shows of itself where that is asked for."""
    logit_C, tensors = explain(model, _tensors(arrays)) if shows else (model(_tensors(arrays)), {})
    return {"logit": logit_C.numpy(), **{name: tensor.numpy() for name, tensor in tensors.items()}}


@torch.no_grad()
def _items(model: CTRModel, packed: Arrays) -> NDArray[Any]:
    rows: NDArray[Any] = model.encode_items(_tensors(packed)).numpy()
    return rows


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _packed(schema: Schema, num_requests: int, num_candidates: int) -> Arrays:
    return PackedLayout(schema).pack(example(schema, num_requests, num_candidates))


def _example_values(graph: Graph, schema: Schema) -> tuple[Tensor, ...]:
    num_requests, num_candidates = EXAMPLE_SIZES
    if "user_index" not in {i.name for i in graph.inputs}:
        num_requests = 1  # and a constant of the graph
    packed = _packed(schema, num_requests, num_candidates)
    for i in graph.inputs:
        if i.name == "items":
            packed["items"] = np.zeros(i.shape(users=num_requests, candidates=num_candidates), dtype=np.float32)
    return tuple(torch.from_numpy(packed[i.name]) for i in graph.inputs)


class _Reads(dict[str, Tensor]):
    """Remembers which of its tensors were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return super().__getitem__(name)


@contextmanager
def _known_warnings() -> Iterator[None]:
    """Silences what torch 2.13's exporters say of themselves; anything else is still heard."""
    loggers = [logging.getLogger(name) for name in _TALKING_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category, message in _KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message=message, category=category)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_TALKING_LOGGERS = (
    "torch.onnx._internal.exporter._registration",  # "torchvision is not installed"
    "onnx_ir.passes.common.initializer_deduplication",  # of an output that is a constant, as LR's bias
)
_KNOWN_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (DeprecationWarning, r"`torch\.jit\.\w+` is deprecated"),  # promised to our users all the same
    (UserWarning, "# The axis name: [UC] will not be used"),  # all U's are one dimension, as they should be
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
)
