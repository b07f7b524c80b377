"""What a GPU makes of a model: parity with the CPU, latency and candidates per second, beside what bounds them.

    python deploy/bench/gpu.py artifacts/mian/20261121-1 [--sizes 100,1000] [--repeats 200] [--out FILE.md]

Needs the extras `gpu` and `train`, with torch's CUDA build. Both runtimes take turns; medians are told. The requests
are made of the artifact's golden ones, their item rows by item.onnx on the CPU, as the service makes and keeps them.
Two floors stand beside each time, measured on the same device:

- memory: the bytes that one run must move (dense weights once, each tensor between two steps written and read), at the
  bandwidth of a plain copy. Embedding tables are not counted, only the rows read from them, as such tensors;
- launches: the steps of the runtime's own optimised graph, each at the time of an empty one. A captured CUDA graph may
  end below it: that is what it is for.

`--device cpu` runs the same code on the CPU, to try it where there is no GPU: its figures say nothing about one. Exit
code 1 where a runtime's logits are further off the CPU's than an artifact's may be.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from models.artifact import folder as artifact
from models.artifact.errors import ArtifactError
from models.artifact.folder import LOGIT_TOLERANCE, Artifact
from models.artifact.manifest import BATCHED, TORCHSCRIPT
from models.features.arrays import Arrays
from service.runtime import backends
from service.runtime.backend import Backend, Device
from service.runtime.onnx_cpu import OnnxBackend, session_options
from service.runtime.onnx_cuda import OnnxCudaBackend
from service.runtime.static_shapes import CANDIDATES
from service.runtime.torchscript import TorchScriptCudaBackend

NO_STEPS = {"Constant", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"}  # they only rename memory
RUNTIMES = {"onnx": "ONNX Runtime", "torchscript": "TorchScript"}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one run of N candidates of one request comes to: bytes moved, and steps by runtime."""

    num_bytes: int
    steps: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Floors:
    """What the device does at best."""

    bytes_per_s: float
    launch_s: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """One runtime at one size; `off` is its largest difference from the CPU's logits, relative to 1 + |logit|."""

    runtime: str
    candidates: int
    off: float
    ms: float
    candidates_per_s: float
    memory_ms: float
    launch_ms: float


def measure(read: Artifact, device: Device, *, sizes: Sequence[int], repeats: int) -> list[Line]:
    """Raises ArtifactError where the device, or what drives it, is not there."""
    if not {BATCHED, TORCHSCRIPT} <= read.manifest.graphs.keys():
        raise ArtifactError(f"{read.path}/manifest.json: lists no {BATCHED} or no {TORCHSCRIPT}; export it again")
    graphs = read.manifest.graphs
    plain, item_graph = backends.load(read, "onnx"), backends.load_item_graph(read)
    compared: dict[str, Backend] = {
        "onnx": OnnxCudaBackend(read.path / BATCHED, inputs=graphs[BATCHED].inputs, device=device),
        "torchscript": TorchScriptCudaBackend(
            read.path / TORCHSCRIPT, inputs=graphs[TORCHSCRIPT].inputs, device=device
        ),
    }
    floors = measure_floors(device)
    lines = []
    for size in sizes:
        arrays = request(read, item_graph, size)
        expected, done = plain.run(arrays), work(read.path, size)
        seconds = take_turns({name: partial(backend.run, arrays) for name, backend in compared.items()}, repeats)
        for name, backend in compared.items():
            lines.append(
                Line(
                    runtime=name,
                    candidates=size,
                    off=largest_difference(backend.run(arrays), expected),
                    ms=1000 * seconds[name],
                    candidates_per_s=candidates_per_s(backend, arrays, repeats),
                    memory_ms=1000 * done.num_bytes / floors.bytes_per_s,
                    launch_ms=1000 * done.steps[name] * floors.launch_s,
                )
            )
    for backend in (plain, item_graph, *compared.values()):
        backend.close()
    return lines


def request(read: Artifact, item_graph: OnnxBackend, num_candidates: int) -> Arrays:
    """The golden request with the most clicks, packed, and the item rows of candidates drawn from all golden ones."""
    packed = read.encoder.layout.pack(read.golden.arrays)
    mask = packed.get("history_mask", np.zeros((len(read.golden.requests), 0), dtype=bool))
    best = int(mask.sum(1).argmax())
    drawn = np.random.default_rng(num_candidates).integers(len(packed["user_index"]), size=num_candidates)
    arrays = backends.one_request({**packed, "items": item_graph.run(packed)}, best, drawn)
    return {**arrays, "user_index": np.zeros(num_candidates, dtype=np.int64)}


def largest_difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float((np.abs(found - expected) / (1 + np.abs(expected))).max())


def take_turns(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Each one's median seconds."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            took[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def candidates_per_s(backend: Backend, arrays: Arrays, repeats: int) -> float:
    """With as many callers as it takes at once."""
    with ThreadPoolExecutor(backend.lanes) as pool:
        started = time.perf_counter()
        list(pool.map(backend.run, [arrays] * repeats))
        return repeats * len(arrays["user_index"]) / (time.perf_counter() - started)


def work(folder: Path, num_candidates: int) -> Work:
    """Read off the graph as ONNX Runtime optimises it for one user and that many candidates."""
    with TemporaryDirectory(prefix="clickserve-bench-") as scratch:
        options = session_options()
        # What every device may run; beyond it, nodes are fused for the CPU alone.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(scratch) / "optimised.onnx")
        for axis, size in (("U", 1), ("C", num_candidates)):
            options.add_free_dimension_override_by_name(axis, size)
        onnxruntime.InferenceSession(folder / BATCHED, options, providers=["CPUExecutionProvider"])
        graph = onnx.shape_inference.infer_shapes(onnx.load(Path(scratch) / "optimised.onnx")).graph
    tables = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    weights = sum(onnx.numpy_helper.to_array(w).nbytes for w in graph.initializer if w.name not in tables)
    between = sum(map(_num_bytes, [*graph.value_info, *graph.input, *graph.output]))
    module = torch.jit.load(folder / TORCHSCRIPT)  # type: ignore[no-untyped-call] # torch's gap
    operators = [node.kind() for node in module.inlined_graph.nodes()]
    steps = {
        "onnx": sum(node.op_type not in NO_STEPS for node in graph.node),
        "torchscript": sum(kind.startswith("aten::") and kind not in _VIEWS for kind in operators),
    }
    return Work(num_bytes=weights + 2 * between, steps=steps)


_VIEWS = {f"aten::{n}" for n in ("view", "reshape", "squeeze", "unsqueeze", "expand", "permute", "transpose", "t",
                                 "select", "slice", "size", "Int", "ScalarImplicit", "split", "chunk")}  # fmt: skip


def _num_bytes(value: onnx.ValueInfoProto) -> int:
    tensor = value.type.tensor_type
    size = np.prod([d.dim_value for d in tensor.shape.dim], dtype=np.int64)
    return int(size) * onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize


def measure_floors(device: Device) -> Floors:
    """The bandwidth of a copy far larger than any cache, and the time of a step with nothing to do."""
    source = torch.zeros(2**28 if device == "cuda" else 2**25, dtype=torch.uint8, device=device)
    target, one = torch.empty_like(source), torch.zeros(1, device=device)

    def seconds(run: Callable[[], object], times: int) -> float:
        for _ in range(3):
            run()
        took = []
        for _ in range(5):
            _wait(device)
            started = time.perf_counter()
            for _ in range(times):
                run()
            _wait(device)
            took.append((time.perf_counter() - started) / times)
        return min(took)

    copied = seconds(lambda: target.copy_(source), 10)
    return Floors(bytes_per_s=2 * source.nbytes / copied, launch_s=seconds(lambda: one.add_(1), 1000))


def _wait(device: Device) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def markdown(lines: Sequence[Line], device: Device, name: str) -> str:
    machine = torch.cuda.get_device_name() if device == "cuda" else "the CPU, to try the code: no figures of a GPU"
    titles = ["runtime", "N", "off", "ms", "candidates/s", "memory floor, ms", "launch floor, ms", "times the floor"]
    text = [f"{name} on {machine}", "", "| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for line in lines:
        over = line.ms / max(line.memory_ms, line.launch_ms)
        cells = [RUNTIMES[line.runtime], f"{line.candidates}", f"{line.off:.1e}", f"{line.ms:.3f}"]
        cells += [f"{line.candidates_per_s:,.0f}", f"{line.memory_ms:.3g}", f"{line.launch_ms:.3g}", f"{over:.1f}"]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if not all(1 <= size <= 10_000 for size in sizes):
        raise ValueError
    return sizes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="one version's folder")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", type=_sizes, default=[100, 1000, CANDIDATES[-1]], help="numbers of candidates")
    parser.add_argument("--repeats", type=int, choices=range(1, 10**6), metavar="N", default=200)
    parser.add_argument("--out", type=Path, help="where the table is written too")
    options = parser.parse_args(arguments)
    try:
        read = artifact.read(options.artifact)
        lines = measure(read, options.device, sizes=options.sizes, repeats=options.repeats)
    except ArtifactError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    table = markdown(lines, options.device, f"{read.manifest.model} {read.manifest.version}")
    print(table)
    if options.out is not None:
        options.out.write_text(table + "\n")
    return int(any(line.off > LOGIT_TOLERANCE for line in lines))


if __name__ == "__main__":
    sys.exit(main())
