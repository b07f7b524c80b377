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
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.artifact import folder as artifact
from models.artifact.calibration import Calibration
from models.artifact.folder import EXPLAINING, LOGIT_TOLERANCE, Golden
from models.artifact.manifest import GraphSignature
from models.features.arrays import Arrays, concat
from models.features.encoder import Encoder
from models.features.field import PAD, Input, input_name
from models.features.packing import PackedLayout, num_requests
from models.features.request import Request
from models.features.schema import Schema
from models.layers.base import CTRModel, explain

# From 1.31 on it reports its use to its makers, on Linux too, and asks only once: when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

# Exporters take a size of 0 or 1 for a constant, and equal sizes for the same dimension.
EXAMPLE_SIZES = (3, 5)  # U, C
LONGEST_AGE_S = 40_000_000  # of an event in an example: more than a year
CHECKED_SIZES = ((1, 1), (1, 2), (1, 100), (1, 1000), (2, 1), (2, 2), (2, 100), (2, 1000))
EXPLAINED_SIZES = ((1, 1), (1, 20), (2, 5))  # the service explains one request of a few candidates


Outputs: TypeAlias = tuple[NDArray[Any], ...]
"""One array for each of a graph's outputs."""


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
    graphs = {graph.file: graph for graph in graphs_of(model, schema)}
    contents = {
        file: graph.to_torchscript() if file.endswith(".ts") else graph.to_onnx() for file, graph in graphs.items()
    }
    check(model, schema, contents, golden=arrays)
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
        graphs={file: graph.signature for file, graph in graphs.items()},
        data_hash=data_hash,
        files={**contents, "weights.safetensors": safetensors.torch.save(model.state_dict())},
        explain=model.explanations(),
    )


def used_inputs(model: CTRModel, schema: Schema) -> tuple[Input, ...]:
    """Those of the schema's inputs that the model reads, in the schema's order: STEC, say, reads no history."""
    reads = _Reads(_tensors(example(schema, *EXAMPLE_SIZES)))
    with torch.no_grad():
        model(reads)
    return tuple(i for i in schema.inputs if i.name in reads.names)


def graphs_of(model: CTRModel, schema: Schema) -> list["ServingGraph"]:
    """Every graph of a model in eval mode: of one request, of an ad, of requests joined (ONNX and TorchScript), and,
    where the model shows anything of itself, the one that does.
    """
    kinds: list[type[ServingGraph]] = [RequestGraph, ItemGraph, BatchedGraph, TorchScriptGraph]
    if model.explanations():
        kinds.append(ExplainingGraph)
    return [kind(model, schema).eval() for kind in kinds]


def check(model: CTRModel, schema: Schema, graphs: Mapping[str, bytes], *, golden: Arrays) -> None:
    """Compare the graphs, each by its file's name, with the model: at several sizes, with and without history, on the
    golden requests; whatever takes item rows is fed those that item.onnx gives. Raises ExportError, saying which output
    of which graph is off, at which sizes and by how much.
    """
    by_file = {graph.file: graph for graph in graphs_of(model, schema)}
    runs = {file: by_file[file].runner(content) for file, content in graphs.items()}
    layout = PackedLayout(schema)
    for file, run in runs.items():
        sizes = EXPLAINED_SIZES if file == EXPLAINING else CHECKED_SIZES
        for case, arrays in _cases(schema, sizes, golden):
            packed = layout.pack(arrays)
            if "item.onnx" in runs and file != "item.onnx":
                (packed["items"],) = runs["item.onnx"](packed)
            for part in by_file[file].parts(packed):
                expected = by_file[file].eager(part)
                for output, wanted, found in zip(by_file[file].signature.outputs, expected, run(part), strict=True):
                    _compare(file, output.name, wanted, found, case)


def _compare(file: str, output: str, wanted: NDArray[Any], found: NDArray[Any], case: str) -> None:
    if found.shape != wanted.shape:
        raise ExportError(f"{file}: {output} has shape {found.shape}, not {wanted.shape}, at {case}")
    off = np.abs(found - wanted)
    # Of what a row adds up, each part is as far off as the largest makes it.
    largest = np.abs(wanted).max(axis=tuple(range(1, wanted.ndim)), keepdims=True, initial=0)
    if not (off <= LOGIT_TOLERANCE * (1 + largest)).all():
        raise ExportError(f"{file}: {output} is up to {off.max():.3g} off the model's at {case}")


def _cases(schema: Schema, sizes: Iterable[tuple[int, int]], golden: Arrays) -> Iterator[tuple[str, Arrays]]:
    yield "the golden requests", golden
    for users, candidates in sizes:
        case = f"U={users}, C={candidates}"
        yield case, example(schema, users, candidates)
        yield f"{case}, no history", example(schema, users, candidates, history=False)


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
    """What is exported: packed tensors by position in, `signature.outputs` out. A subclass for each file."""

    file: ClassVar[str]

    def __init__(self, model: CTRModel, schema: Schema) -> None:
        super().__init__()
        assert not model.training, "dropout and batch statistics do not belong in a graph"
        self.model = model
        self.schema = schema
        self.layout = PackedLayout(schema)
        self.signature = GraphSignature(inputs=self._inputs(), outputs=self._outputs())

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return self.compute({i.name: value for i, value in zip(self.signature.inputs, values, strict=True)})

    def compute(self, packed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def parts(self, packed: Arrays) -> Iterator[Arrays]:
        """The same requests as this graph takes them: all at once, unless it takes one."""
        yield packed

    def eager(self, packed: Arrays) -> tuple[NDArray[Any], ...]:
        """The outputs as PyTorch computes them."""
        with torch.no_grad():
            return tuple(o.numpy() for o in self(*(torch.from_numpy(packed[i.name]) for i in self.signature.inputs)))

    def to_onnx(self) -> bytes:
        """One self-contained ONNX file, dynamic in U and C; at most 2 GB, where the format ends."""
        dims = {"U": torch.export.Dim("U"), "C": torch.export.Dim("C")}
        shapes = tuple(
            {axis: dims[d] for axis, d in enumerate(i.dims) if isinstance(d, str)} for i in self.signature.inputs
        )
        with _known_warnings():
            program = torch.onnx.export(
                self,
                self._example(),
                dynamo=True,
                verbose=False,
                input_names=[i.name for i in self.signature.inputs],
                output_names=[o.name for o in self.signature.outputs],
                dynamic_shapes=(shapes,),
            )
        assert program is not None
        content: bytes = program.model_proto.SerializeToString()
        return content

    def to_torchscript(self) -> bytes:
        """The same for `torch.jit.load`."""
        buffer = io.BytesIO()
        with _known_warnings():
            traced = torch.jit.trace(self, self._example())  # type: ignore[no-untyped-call]  # torch's
            torch.jit.save(torch.jit.freeze(traced), buffer)
        return buffer.getvalue()

    def runner(self, content: bytes) -> Callable[[Arrays], Outputs]:
        """The exported file as a function of packed tensors."""
        inputs, outputs = ([tensor.name for tensor in part] for part in (self.signature.inputs, self.signature.outputs))
        return _run_torchscript(content, inputs) if self.file.endswith(".ts") else _run_onnx(content, outputs)

    def _example(self) -> tuple[Tensor, ...]:
        packed = self.layout.pack(example(self.schema, *EXAMPLE_SIZES))
        packed["items"] = np.zeros((EXAMPLE_SIZES[1], item_width(self.model, self.schema)), dtype=np.float32)
        return tuple(torch.from_numpy(packed[i.name]) for i in self.signature.inputs)

    def _of_request(self) -> tuple[Input, ...]:
        """The request's packed tensors that the model reads."""
        reads = _Reads(_tensors(self.layout.pack(example(self.schema, *EXAMPLE_SIZES))))
        with torch.no_grad():
            self.model.encode_user(reads)
        return self.layout.inputs([name for name in reads.names if name.startswith(("request_", "history_"))])

    def _of_items(self) -> tuple[Input, ...]:
        return self.layout.inputs(self.layout.item.input_names if self.layout.item.fields else ())

    def _item_rows(self) -> Input:
        return Input(name="items", dtype="float32", dims=("C", item_width(self.model, self.schema)))

    def _inputs(self) -> tuple[Input, ...]:
        raise NotImplementedError

    def _outputs(self) -> tuple[Input, ...]:
        return (LOGIT,)


class RequestGraph(ServingGraph):
    """One request and the item rows of its candidates."""

    file = "model.onnx"

    def _inputs(self) -> tuple[Input, ...]:
        one = tuple(replace(i, dims=(1, *i.dims[1:])) for i in self._of_request())
        return (*one, self._item_rows())

    def compute(self, packed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (self.model.score(self.model.encode_user(packed), packed["items"], None),)

    def parts(self, packed: Arrays) -> Iterator[Arrays]:
        for user in range(num_requests(packed)):
            rows = np.flatnonzero(packed["user_index"] == user)
            if rows.size:
                of_request = {
                    n: v[user : user + 1] for n, v in packed.items() if n.startswith(("request_", "history_"))
                }
                yield {**of_request, "items": packed["items"][rows]}

    def _example(self) -> tuple[Tensor, ...]:
        return tuple(
            v[:1] if n.dims[0] == 1 else v for n, v in zip(self.signature.inputs, super()._example(), strict=True)
        )


class ItemGraph(ServingGraph):
    """The item rows of ads."""

    file = "item.onnx"

    def _inputs(self) -> tuple[Input, ...]:
        return self._of_items()

    def _outputs(self) -> tuple[Input, ...]:
        return (self._item_rows(),)

    def compute(self, packed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (self.model.encode_items(packed),)


class BatchedGraph(ServingGraph):
    """The candidates of several requests joined; `user_index` names each one's."""

    file = "model.batched.onnx"

    def _inputs(self) -> tuple[Input, ...]:
        return (*self._of_request(), self._item_rows(), *self.layout.inputs(["user_index"]))

    def compute(self, packed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (self.model.score(self.model.encode_user(packed), packed["items"], packed["user_index"]),)


class TorchScriptGraph(BatchedGraph):
    file = "model.ts"


class ExplainingGraph(ServingGraph):
    """Row form with other outputs: the logits, and all that `model.explanations()` names."""

    file = EXPLAINING

    def __init__(self, model: CTRModel, schema: Schema) -> None:
        self.explanations = model.explanations()
        super().__init__(model, schema)

    def _inputs(self) -> tuple[Input, ...]:
        return (*self._of_request(), *self._of_items(), *self.layout.inputs(["user_index"]))

    def _outputs(self) -> tuple[Input, ...]:
        length = self.schema.history_length
        shown = (Input(name=e.name, dtype="float32", dims=e.dims(length)) for e in self.explanations)
        return (LOGIT, *shown)

    def compute(self, packed: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        logit_C, shown = explain(self.model, packed, self.explanations)
        return logit_C, *shown.values()


LOGIT = Input(name="logit", dtype="float32", dims=("C",))


def item_width(model: CTRModel, schema: Schema) -> int:
    """W: how many numbers the item half of an ad has."""
    with torch.no_grad():
        return model.encode_items(_tensors(PackedLayout(schema).pack(example(schema, *EXAMPLE_SIZES)))).shape[1]


class _Reads(dict[str, Tensor]):
    """Remembers which of its tensors were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return super().__getitem__(name)


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
