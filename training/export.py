"""A trained model as the graphs that serving runs, ONNX and TorchScript, proven equal to it and packed for serving.

What the model shows of itself is a graph of its own, explain.onnx: the others stay as fast as they are without it.
"""

import copy
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.artifact import folder as artifact
from models.artifact.calibration import Calibration
from models.artifact.folder import EXPLAINING, LOGIT_TOLERANCE, Golden
from models.features.arrays import Arrays, concat
from models.features.encoder import Encoder
from models.features.field import PAD, Input, input_name
from models.features.request import Request
from models.features.schema import Schema
from models.layers.base import CTRModel, explain

# From 1.31 on it reports its use to its makers, on Linux too, and asks only once: when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

OUTPUTS = ("logit", "prob")
# Exporters take a size of 0 or 1 for a constant, and equal sizes for the same dimension.
EXAMPLE_SIZES = (3, 5)  # U, C
LONGEST_AGE_S = 40_000_000  # of an event in an example: more than a year
CHECKED_SIZES = ((1, 1), (1, 2), (1, 100), (1, 1000), (2, 1), (2, 2), (2, 100), (2, 1000))
EXPLAINED_SIZES = ((1, 1), (1, 20), (2, 5))  # the service explains one request of a few candidates


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
    Raises ExportError where a graph and the model differ, ArtifactError where the folder does not read back.
    """
    model = copy.deepcopy(model).cpu().float().eval()
    arrays = concat([Encoder(schema).encode(request) for request in golden_requests])
    graphs = {"model.onnx": to_onnx(model, schema), "model.ts": to_torchscript(model, schema)}
    if model.explanations():
        graphs[EXPLAINING] = to_explaining_onnx(model, schema)
    check(model, schema, graphs, golden=arrays)
    logits, _ = _run_eager(_graph(model, schema))(arrays)
    return artifact.write(
        out,
        model=name,
        config=config,
        schema=schema,
        calibration=calibration,
        metrics=metrics,
        golden=Golden(requests=tuple(golden_requests), arrays=arrays, logits=logits),
        inputs=[i.name for i in used_inputs(model, schema)],
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


def to_onnx(model: CTRModel, schema: Schema) -> bytes:
    """A model in eval mode as one self-contained ONNX file, dynamic in U and C; at most 2 GB, where the format ends."""
    return _to_onnx(_graph(model, schema), schema)


def to_explaining_onnx(model: CTRModel, schema: Schema) -> bytes:
    """The same with other outputs: the logits, and all that `model.explanations()` names."""
    return _to_onnx(_graph(model, schema, ExplainingGraph), schema)


def _to_onnx(graph: "ServingGraph", schema: Schema) -> bytes:
    inputs = [i for i in schema.inputs if i.name in graph.inputs]
    dims = {"U": torch.export.Dim("U"), "C": torch.export.Dim("C")}
    shapes = tuple({axis: dims[d] for axis, d in enumerate(i.dims) if isinstance(d, str)} for i in inputs)
    with _known_warnings():
        program = torch.onnx.export(
            graph,
            _example_values(schema, graph.inputs),
            dynamo=True,
            verbose=False,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=(shapes,),
        )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def to_torchscript(model: CTRModel, schema: Schema) -> bytes:
    """The same for `torch.jit.load`; inputs go by position."""
    graph = _graph(model, schema)
    buffer = io.BytesIO()
    with _known_warnings():
        traced = torch.jit.trace(graph, _example_values(schema, graph.inputs))  # type: ignore[no-untyped-call]  # torch's
        torch.jit.save(torch.jit.freeze(traced), buffer)
    return buffer.getvalue()


def check(model: CTRModel, schema: Schema, graphs: Mapping[str, bytes], *, golden: Arrays) -> None:
    """Compare the graphs, each by its file's name, with the model: at several sizes, with and without history, on the
    golden requests. Raises ExportError, saying which output of which graph is off, at which sizes and by how much.
    """
    for file, content in graphs.items():
        graph = _graph(model, schema, ExplainingGraph if file == EXPLAINING else ServingGraph)
        run = _run_torchscript(content, graph.inputs) if file.endswith(".ts") else _run_onnx(content, graph.outputs)
        eager = _run_eager(graph)
        for case, arrays in _cases(schema, EXPLAINED_SIZES if file == EXPLAINING else CHECKED_SIZES, golden):
            for output, wanted, found in zip(graph.outputs, eager(arrays), run(arrays), strict=True):
                if found.shape != wanted.shape:
                    raise ExportError(f"{file}: {output} has shape {found.shape}, not {wanted.shape}, at {case}")
                off = np.abs(found - wanted)
                # Of what a row adds up, each part is as far off as the largest makes it.
                largest = np.abs(wanted).max(axis=tuple(range(1, wanted.ndim)), keepdims=True, initial=0)
                if not (off <= LOGIT_TOLERANCE * (1 + largest)).all():
                    raise ExportError(f"{file}: {output} is up to {off.max():.3g} off the model's at {case}")


def _cases(schema: Schema, sizes: Iterable[tuple[int, int]], golden: Arrays) -> Iterator[tuple[str, Arrays]]:
    yield "the golden requests", golden
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


class ServingGraph(nn.Module):
    """What is exported: inputs by position; out come the logits [C] and their sigmoid, not yet calibrated."""

    def __init__(self, model: CTRModel, inputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.inputs = tuple(inputs)
        self.outputs: tuple[str, ...] = OUTPUTS

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        logit_C = self.model(dict(zip(self.inputs, values, strict=True)))
        return logit_C, logit_C.sigmoid()


class ExplainingGraph(ServingGraph):
    """Beside it: out come the logits, and what the model shows of itself."""

    def __init__(self, model: CTRModel, inputs: Sequence[str]) -> None:
        super().__init__(model, inputs)
        self.explanations = model.explanations()
        self.outputs = ("logit", *(explanation.name for explanation in self.explanations))

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        logit_C, shown = explain(self.model, dict(zip(self.inputs, values, strict=True)), self.explanations)
        return logit_C, *shown.values()


def _graph(model: CTRModel, schema: Schema, kind: type[ServingGraph] = ServingGraph) -> ServingGraph:
    assert not model.training, "dropout and batch statistics do not belong in a graph"
    return kind(model, [i.name for i in used_inputs(model, schema)]).eval()


class _Reads(dict[str, Tensor]):
    """Remembers which of its tensors were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return super().__getitem__(name)


Outputs: TypeAlias = tuple[NDArray[Any], ...]
"""One array for each of a graph's outputs."""


def _run_eager(graph: ServingGraph) -> Callable[[Arrays], Outputs]:
    @torch.no_grad()
    def run(arrays: Arrays) -> Outputs:
        tensors = _tensors(arrays)
        return tuple(output.numpy() for output in graph(*(tensors[name] for name in graph.inputs)))

    return run


def _run_onnx(content: bytes, outputs: Sequence[str]) -> Callable[[Arrays], Outputs]:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda arrays: tuple(session.run(list(outputs), {name: arrays[name] for name in names}))


def _run_torchscript(content: bytes, inputs: Sequence[str]) -> Callable[[Arrays], Outputs]:
    with _known_warnings():
        graph = torch.jit.load(io.BytesIO(content))  # type: ignore[no-untyped-call]  # torch's

    @torch.no_grad()
    def run(arrays: Arrays) -> Outputs:
        return tuple(output.numpy() for output in graph(*(torch.from_numpy(arrays[name]) for name in inputs)))

    return run


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _example_values(schema: Schema, inputs: Sequence[str]) -> tuple[Tensor, ...]:
    tensors = _tensors(example(schema, *EXAMPLE_SIZES))
    return tuple(tensors[name] for name in inputs)


@contextmanager
def _known_warnings() -> Iterator[None]:
    """Silences what torch 2.13's exporters say of themselves; anything else is still heard."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")  # "torchvision is not installed"
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category, message in _KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message=message, category=category)
            yield
    finally:
        registration.setLevel(level)


_KNOWN_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (DeprecationWarning, r"`torch\.jit\.\w+` is deprecated"),  # promised to our users all the same
    (UserWarning, "# The axis name: [UC] will not be used"),  # all U's are one dimension, as they should be
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
)
