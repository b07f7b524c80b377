"""What runs a model's graph: arrays in, logits out."""

import importlib.metadata
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.artifact import EXPLAINING, Artifact, ArtifactError, check_scores
from models.encoding import Arrays

# From 1.31 on it reports its use to its makers, on Linux too, and asks only once: when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

Kind = Literal["onnx", "torchscript"]


class BackendError(RuntimeError):
    """A graph that could not be run on these arrays."""


class Backend(Protocol):
    """One loaded graph. `run` is called from any thread, one call at a time, and leaves the GIL while it computes."""

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        """The logits [C] of C candidates. Raises BackendError; what the model computes is not judged here."""

    def close(self) -> None: ...


def load(artifact: Artifact, kind: Kind) -> Backend:
    """The artifact's graph of that kind, ready to run. Raises ArtifactError where it cannot be loaded."""
    if kind == "onnx":
        return OnnxBackend(_graph(artifact, "model.onnx"), fed=[i.name for i in artifact.schema.inputs])
    try:
        from service.torchscript import TorchScriptBackend
    except ModuleNotFoundError as err:
        raise ArtifactError(f"{artifact.path}: backend torchscript needs torch, which is not installed") from err
    return TorchScriptBackend(_graph(artifact, "model.ts"), inputs=[i.name for i in artifact.manifest.inputs])


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
    """ONNX Runtime on one CPU core. The graph takes those of the `fed` arrays it names, and gives `outputs`."""

    def __init__(self, graph: Path, *, fed: Sequence[str], outputs: Sequence[str] = ("logit",)) -> None:
        _refuse_two_runtimes()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A graph may name other files to read its weights from, and its author could name any: none lies in here.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/dev/null")
        try:
            self._session = onnxruntime.InferenceSession(
                graph.read_bytes(), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as err:  # onnxruntime's exceptions have no common base but this
            raise ArtifactError(f"{graph}: ONNX Runtime cannot load it: {' '.join(str(err).split())[:300]}") from err
        self._inputs = [i.name for i in self._session.get_inputs()]
        if unknown := set(self._inputs) - set(fed):
            raise ArtifactError(f"{graph}: takes {', '.join(sorted(unknown))}, which its schema does not describe")
        self._outputs = list(outputs)
        if absent := set(self._outputs) - {o.name for o in self._session.get_outputs()}:
            raise ArtifactError(f"{graph}: has no output called {', '.join(sorted(absent))}")

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        return self.run_all(arrays)[0]

    def run_all(self, arrays: Arrays) -> list[NDArray[np.float32]]:
        """Every one of the `outputs`. Raises BackendError."""
        try:
            values = self._session.run(self._outputs, {name: arrays[name] for name in self._inputs})
        except Exception as err:  # as above
            raise BackendError(f"ONNX Runtime: {err}") from err
        return [np.asarray(value, dtype=np.float32) for value in values]

    def close(self) -> None:
        del self._session


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
