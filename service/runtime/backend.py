"""The backend protocol: packed tensors in, logits out, whatever runs the graph."""

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from models.features.arrays import Arrays

Kind = Literal["onnx", "torchscript"]
Device = Literal["cpu", "cuda"]
Logits = NDArray[np.float32]


class BackendError(RuntimeError):
    """A graph that could not be run on these arrays."""


class Backend(Protocol):
    """One loaded graph. `run` is called from any thread, `lanes` calls at a time, and releases the GIL meanwhile."""

    @property
    def lanes(self) -> int:
        """How many runs may be under way at once."""

    @property
    def joins(self) -> bool:
        """Whether a run takes the candidates of several requests, told apart by `user_index`; else of one, without."""

    @property
    def batch_wait_s(self) -> float:
        """How long a request may wait for others to run with it, where the model is idle."""

    def run(self, arrays: Arrays) -> Logits:
        """The logits [C] of C candidates, given packed tensors and `items`. Raises BackendError.

        What the model computes is not judged here.
        """

    def close(self) -> None: ...
