"""Which backend runs an artifact's graph, by kind and device; and scores of any packed tensors on any of them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.artifact.errors import ArtifactError
from models.artifact.folder import Artifact, check_scores
from models.artifact.manifest import BATCHED, EXPLAINING, ITEM, MODEL, TORCHSCRIPT
from models.features.arrays import Arrays
from models.features.packing import num_candidates, num_requests
from service.runtime.backend import Backend, BackendError, Device, Kind, Logits
from service.runtime.onnx_cpu import OnnxBackend


def load(artifact: Artifact, kind: Kind, device: Device = "cpu") -> Backend:
    """The artifact's graph of that kind, ready to run on that device.

    Raises ArtifactError where it cannot be loaded, or the device or what drives it is not here.
    """
    if kind == "onnx" and device == "cpu":
        return OnnxBackend(_file(artifact, MODEL), fed=_inputs(artifact, MODEL))
    if kind == "onnx":
        from service.runtime.onnx_cuda import OnnxCudaBackend

        graph = _file(artifact, BATCHED)
        return OnnxCudaBackend(graph, inputs=artifact.manifest.graphs[BATCHED].inputs)
    graph = _file(artifact, TORCHSCRIPT)
    try:
        from service.runtime import torchscript
    except ModuleNotFoundError as err:
        raise ArtifactError(f"{artifact.path}: backend torchscript needs torch, which is not installed") from err
    inputs = artifact.manifest.graphs[TORCHSCRIPT].inputs
    if device == "cpu":
        return torchscript.TorchScriptBackend(graph, inputs=[i.name for i in inputs])
    return torchscript.TorchScriptCudaBackend(graph, inputs=inputs)


def load_item_graph(artifact: Artifact) -> OnnxBackend:
    """The item half of packed item tensors, [C, W]; on the CPU whatever runs the rest: its rows are kept. As `load`."""
    return OnnxBackend(_file(artifact, ITEM), fed=_inputs(artifact, ITEM), outputs=["items"])


def load_explaining(artifact: Artifact) -> OnnxBackend:
    """What gives the logits and then each tensor that the manifest lists under `explain`, in their order.

    Raises ArtifactError where it cannot be loaded, is another model's, or has not the axes that the manifest names.
    """
    outputs = ["logit", *(shown.name for shown in artifact.manifest.explain)]
    backend = OnnxBackend(_file(artifact, EXPLAINING), fed=_inputs(artifact, EXPLAINING), outputs=outputs)
    try:
        logits, *tensors = backend.run_all(artifact.encoder.layout.pack(artifact.golden.arrays))
    except BackendError as err:
        raise ArtifactError(f"{artifact.path}: {EXPLAINING} does not run on its own golden rows: {err}") from err
    check_scores(artifact, logits)
    num_golden, length = len(artifact.golden.requests), artifact.schema.history_length
    for explanation, values in zip(artifact.manifest.explain, tensors, strict=True):
        expected = explanation.shape(requests=num_golden, candidates=len(logits), history_length=length)
        if values.shape != expected:  # its labels would stand beside other values
            raise ArtifactError(
                f"{artifact.path}/{EXPLAINING}: {explanation.name} is {values.shape}, the manifest's axes are"
                f" {expected}; export it again"
            )
    return backend


def score(backend: Backend, item_graph: OnnxBackend, packed: Arrays) -> Logits:
    """The logits [C] of any number of requests' packed tensors, with `item_*` and `user_index`. Raises BackendError."""
    items = item_graph.run(packed)
    if items.shape[:1] != (num_candidates(packed),):
        raise BackendError(f"{items.shape[:1]} item rows came for {num_candidates(packed)} candidates")
    packed = {**packed, "items": items}
    if backend.joins:
        return backend.run(packed)
    user_index = packed["user_index"]
    logits = np.empty(len(user_index), dtype=np.float32)
    for user in range(num_requests(packed)):
        rows = np.flatnonzero(user_index == user)
        if rows.size:
            logits[rows] = backend.run(one_request(packed, user, rows))
    return logits


def one_request(packed: Arrays, user: int, rows: NDArray[np.int64]) -> Arrays:
    """The packed tensors of one of several requests, and its candidates."""
    of_request = {n: v[user : user + 1] for n, v in packed.items() if n.startswith(("request_", "history_"))}
    return {**of_request, "items": packed["items"][rows]}


def _inputs(artifact: Artifact, name: str) -> list[str]:
    return [i.name for i in artifact.manifest.graphs[name].inputs]


def _file(artifact: Artifact, name: str) -> Path:
    if name not in artifact.manifest.files or name not in artifact.manifest.graphs:
        raise ArtifactError(f"{artifact.path}/manifest.json: lists no {name}; export it again")
    return artifact.path / name
