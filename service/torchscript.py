"""The TorchScript backend: the service's only file that imports torch, imported only when an arm asks for it."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.artifact import ArtifactError
from models.encoding import Arrays
from service.backends import BackendError


class TorchScriptBackend:
    """libtorch on one CPU core. The graph takes `inputs` by position and gives the logits first.

    A TorchScript file is a program: load none whose manifest you do not trust.
    """

    def __init__(self, graph: Path, *, inputs: Sequence[str]) -> None:
        torch.set_num_threads(1)
        self._inputs = tuple(inputs)
        try:
            with warnings.catch_warnings():
                # Deprecated in torch 2.13 in favour of torch.export, and still promised to our users.
                warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
                module = torch.jit.load(str(graph), map_location="cpu")  # type: ignore[no-untyped-call] # torch's gap
                self._module = module.eval()
        except (RuntimeError, ValueError) as err:
            raise ArtifactError(f"{graph}: libtorch cannot load it: {' '.join(str(err).split())[:300]}") from err

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        try:
            with torch.inference_mode():
                logits, *_ = self._module(*(torch.from_numpy(arrays[name]) for name in self._inputs))
        except RuntimeError as err:
            raise BackendError(f"libtorch: {err}") from err
        scores: NDArray[np.float32] = logits.numpy()
        return scores

    def close(self) -> None:
        del self._module
