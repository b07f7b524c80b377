"""What runs a model's graph: arrays in, logits out."""

import os
from pathlib import Path

from models.artifact.errors import ArtifactError
from models.artifact.folder import EXPLAINING, Artifact, check_scores

# From 1.31 on it reports its use to its makers, on Linux too, and asks only once: when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
from service.runtime.backend import Backend, BackendError, Device, Kind
from service.runtime.onnx_cpu import OnnxBackend


def load(artifact: Artifact, kind: Kind, device: Device = "cpu") -> Backend:
    """The artifact's graph of that kind, ready to run on that device.

    Raises ArtifactError where it cannot be loaded, or the device or what drives it is not here.
    """
    graph = _graph(artifact, "model.onnx" if kind == "onnx" else "model.ts")
    if kind == "onnx" and device == "cpu":
        return OnnxBackend(graph, fed=[i.name for i in artifact.schema.inputs])
    if kind == "onnx":
        from service.runtime.onnx_cuda import OnnxCudaBackend

        return OnnxCudaBackend(graph, inputs=artifact.manifest.inputs)
    try:
        from service.runtime import torchscript
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


def _graph(artifact: Artifact, name: str) -> Path:
    if name not in artifact.manifest.files:
        raise ArtifactError(f"{artifact.path}/manifest.json: lists no {name}")
    return artifact.path / name
