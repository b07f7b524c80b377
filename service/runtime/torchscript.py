"""The TorchScript backends: the service's only file that imports torch, imported only when an arm asks for it."""

import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.artifact.errors import ArtifactError
from models.features.arrays import Arrays
from models.features.field import Input
from service.runtime.backend import BackendError
from service.runtime.static_shapes import Buckets, Layout

DTYPES = {np.dtype("int64"): torch.int64, np.dtype("float32"): torch.float32, np.dtype("bool"): torch.bool}


class TorchScriptBackend:
    """libtorch on one CPU core. The graph takes `inputs` by position and gives the logits.

    A TorchScript file is a program: load none whose manifest you do not trust.
    """

    lanes = 1
    joins = True
    batch_wait_s = 0.0

    def __init__(self, graph: Path, *, inputs: Sequence[str]) -> None:
        torch.set_num_threads(1)
        self._inputs = tuple(inputs)
        self._module = _load(graph, torch.device("cpu"))

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        try:
            with torch.inference_mode():
                return _logits(self._module(*(torch.from_numpy(arrays[name]) for name in self._inputs)))
        except RuntimeError as err:
            raise err if isinstance(err, BackendError) else BackendError(f"libtorch: {err}") from err

    def close(self) -> None:
        del self._module


class TorchScriptCudaBackend:
    """libtorch on one stream of a GPU, at static shapes: it compiles kernels anew for shapes it never saw.

    On `device` cpu it is the same, but for pinned memory and the stream.
    """

    lanes = 1
    joins = True
    batch_wait_s = 0.001  # as ONNX Runtime's there: see onnx_cuda.py

    def __init__(
        self,
        graph: Path,
        *,
        inputs: Sequence[Input],
        device: str = "cuda",
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            built = "sees no GPU that it can use" if torch.version.cuda else "is the CPU's build"
            raise ArtifactError(f"{graph}: device cuda: torch {torch.__version__} {built}")
        # Off is torch's default too, but anybody in the process could change it: see onnx_cuda.py.
        torch.backends.cuda.matmul.allow_tf32 = False
        module = _load(graph, torch.device(device))
        self._alone = threading.Lock()  # a swap replays requests on a model that may serve already

        def bind(layout: Layout) -> _Bound:
            return _Bound(module, layout, torch.device(device))

        try:
            self._buckets = Buckets(inputs, bind)
        except RuntimeError as err:
            raise ArtifactError(f"{graph}: does not run on {device}: {' '.join(str(err).split())[:300]}") from err

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        try:
            with self._alone:
                return self._buckets.run(arrays)
        except RuntimeError as err:
            raise err if isinstance(err, BackendError) else BackendError(f"libtorch: {err}") from err

    def close(self) -> None:
        del self._buckets


class _Bound:
    """One size's buffers: inputs go over in one copy, from memory that the device reads by itself."""

    def __init__(self, module: Any, layout: Layout, device: torch.device) -> None:
        self._module = module
        self._pinned = torch.zeros(layout.num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._sent = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
        self.host: NDArray[np.uint8] = self._pinned.numpy()
        self._inputs = [_view(self._sent, s.offset, DTYPES[s.dtype], s.shape) for s in layout.slots]

    @torch.inference_mode()
    def run(self) -> NDArray[np.float32]:
        self._sent.copy_(self._pinned, non_blocking=True)
        return _logits(self._module(*self._inputs))


def _logits(output: Any) -> NDArray[np.float32]:
    """What a graph gave, once the device has it."""
    if not isinstance(output, Tensor):  # several outputs, as graphs of older artifacts had
        raise BackendError(f"libtorch: expected one tensor, the logits, got a {type(output).__name__}")
    logits: NDArray[np.float32] = output.cpu().numpy()
    return logits


def _view(buffer: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    num_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    return buffer[offset : offset + num_bytes].view(dtype).view(shape)


def _load(graph: Path, device: torch.device) -> Any:
    """The module in eval mode, its weights on the device. Raises ArtifactError."""
    try:
        with warnings.catch_warnings():
            # Deprecated in torch 2.13 in favour of torch.export, and still promised to our users.
            warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
            module = torch.jit.load(str(graph), map_location=device)  # type: ignore[no-untyped-call] # torch's gap
            return module.eval()
    except (RuntimeError, ValueError) as err:
        raise ArtifactError(f"{graph}: libtorch cannot load it: {' '.join(str(err).split())[:300]}") from err
