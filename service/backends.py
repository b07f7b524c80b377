"""What runs a model's graph: arrays in, logits out."""

import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.artifact import EXPLAINING, Artifact, ArtifactError, check_scores
from models.encoding import Arrays

# From 1.31 on it reports its use to its makers, on Linux too, and asks only once: when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

Kind = Literal["onnx", "torchscript"]
Device = Literal["cpu", "cuda"]

# Candidates of a run that is rare. The arena keeps the largest run it ever saw: after one of 10,000 candidates 28 MB
# for MIAN and 36 MB for STEC stayed; given back after each such run 2 MB and none did, and runs below pay nothing.
LARGE_RUN = 2000


class BackendError(RuntimeError):
    """A graph that could not be run on these arrays."""


class Backend(Protocol):
    """One loaded graph. `run` is called from any thread, `lanes` calls at a time, and leaves the GIL meanwhile."""

    @property
    def lanes(self) -> int:
        """How many runs may be under way at once."""

    @property
    def batch_wait_s(self) -> float:
        """How long a request may wait for others to run with it, where the model is idle."""

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        """The logits [C] of C candidates. Raises BackendError; what the model computes is not judged here."""

    def close(self) -> None: ...


def load(artifact: Artifact, kind: Kind, device: Device = "cpu") -> Backend:
    """The artifact's graph of that kind, ready to run on that device.

    Raises ArtifactError where it cannot be loaded, or the device or what drives it is not here.
    """
    graph = _graph(artifact, "model.onnx" if kind == "onnx" else "model.ts")
    if kind == "onnx" and device == "cpu":
        return OnnxBackend(graph, fed=[i.name for i in artifact.schema.inputs])
    if kind == "onnx":
        from service.cuda import OnnxCudaBackend

        return OnnxCudaBackend(graph, inputs=artifact.manifest.inputs)
    try:
        from service import torchscript
    except ModuleNotFoundError as err:
        raise ArtifactError(f"{artifact.path}: backend torchscript needs torch, which is not installed") from err
    if device == "cpu":
        return torchscript.TorchScriptBackend(graph, inputs=[i.name for i in artifact.manifest.inputs])
    return torchscript.TorchScriptCudaBackend(graph, inputs=artifact.manifest.inputs)


def load_explaining(artifact: Artifact) -> "OnnxBackend":
    """What gives the logits and then each tensor that the manifest lists under `explain`, in their order.

    Raises ArtifactError where it cannot be loaded, is another model's, or has not the axes that the manifest names.
    """
    fed = [i.name for i in artifact.schema.inputs]
    outputs = ["logit", *(shown.name for shown in artifact.manifest.explain)]
    backend = OnnxBackend(_graph(artifact, EXPLAINING), fed=fed, outputs=outputs)
    try:
        logits, *tensors = backend.run_all(artifact.golden.arrays)
    except BackendError as err:
        raise ArtifactError(f"{artifact.path}: {EXPLAINING} does not run on its own golden rows: {err}") from err
    check_scores(artifact, logits)
    num_requests, length = len(artifact.golden.requests), artifact.schema.history_length
    for shown, values in zip(artifact.manifest.explain, tensors, strict=True):
        wanted = shown.shape(requests=num_requests, candidates=len(logits), history_length=length)
        if values.shape != wanted:  # its labels would stand beside other values
            raise ArtifactError(
                f"{artifact.path}/{EXPLAINING}: {shown.name} is {values.shape}, the manifest's axes are {wanted};"
                " export it again"
            )
    return backend


class OnnxBackend:
    """ONNX Runtime on one CPU core. The graph takes those of the `fed` arrays it names, and gives `outputs`.

    Fed with plain arrays: with bound buffers, filled anew for every run, MIAN's 100 candidates took 0.98 to 0.99 of the
    time, with bindings made anew 1.13 to 1.15, past the wrapper's own `run` 0.965 (400 turns each, one thread).
    """

    lanes = 1
    batch_wait_s = 0.0

    def __init__(self, graph: Path, *, fed: Sequence[str], outputs: Sequence[str] = ("logit",)) -> None:
        self._session = open_session(graph, session_options(), ["CPUExecutionProvider"])
        self._shrinking = onnxruntime.RunOptions()
        self._shrinking.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._inputs, self._outputs = names_of(self._session, graph, fed=fed, outputs=outputs)

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        return self.run_all(arrays)[0]

    def run_all(self, arrays: Arrays) -> list[NDArray[np.float32]]:
        """Every one of the `outputs`. Raises BackendError."""
        try:
            large = len(arrays["user_index"]) > LARGE_RUN
            feed = {name: arrays[name] for name in self._inputs}
            values = self._session.run(self._outputs, feed, self._shrinking if large else None)
        except Exception as err:  # as below
            raise BackendError(f"ONNX Runtime: {err}") from err
        return [np.asarray(value, dtype=np.float32) for value in values]

    def close(self) -> None:
        del self._session


def session_options() -> Any:
    """One thread, no spinning, no files but the graph's own."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A graph may name other files to read its weights from, and its author could name any: none lies in here.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/dev/null")
    return options


def open_session(graph: Path, options: Any, providers: Sequence[Any]) -> Any:
    """Raises ArtifactError."""
    _refuse_two_runtimes()
    try:
        # It would otherwise try again with other options, and say so on stdout.
        return onnxruntime.InferenceSession(graph.read_bytes(), options, providers=list(providers), enable_fallback=0)
    except Exception as err:  # onnxruntime's exceptions have no common base but this
        raise ArtifactError(f"{graph}: ONNX Runtime cannot load it: {' '.join(str(err).split())[:300]}") from err


def names_of(session: Any, graph: Path, *, fed: Sequence[str], outputs: Sequence[str]) -> tuple[list[str], list[str]]:
    """What it takes, and `outputs`. Raises ArtifactError where it takes more than it is fed, or does not give those."""
    inputs = [i.name for i in session.get_inputs()]
    if unknown := set(inputs) - set(fed):
        raise ArtifactError(f"{graph}: takes {', '.join(sorted(unknown))}, which its schema does not describe")
    if absent := set(outputs) - {o.name for o in session.get_outputs()}:
        raise ArtifactError(f"{graph}: has no output called {', '.join(sorted(absent))}")
    return inputs, list(outputs)


def _graph(artifact: Artifact, name: str) -> Path:
    if name not in artifact.manifest.files:
        raise ArtifactError(f"{artifact.path}/manifest.json: lists no {name}")
    return artifact.path / name


def _refuse_two_runtimes() -> None:
    """The two packages install the same files: with both, which of them runs is an accident."""
    present = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(present) > 1:
        raise ArtifactError("onnxruntime and onnxruntime-gpu are both installed; uninstall both, then install one")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
