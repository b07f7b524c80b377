"""The backend protocol: arrays in, logits out, whatever runs the graph."""

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.features.arrays import Arrays

Kind = Literal["onnx", "torchscript"]


Device = Literal["cpu", "cuda"]


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
