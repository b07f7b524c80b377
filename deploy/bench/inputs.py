"""Encoded tensors of several requests in one file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = Mapping[str, NDArray[Any]]


def save_inputs(requests: Sequence[Tensors], file: Path) -> None:
    """Each request's arrays under its number."""
    arrays: dict[str, Any] = {f"{n} {name}": a for n, request in enumerate(requests) for name, a in request.items()}
    np.savez(file, allow_pickle=False, **arrays)


def read_inputs(file: Path) -> list[dict[str, NDArray[Any]]]:
    """What `save_inputs` wrote."""
    requests: dict[str, dict[str, NDArray[Any]]] = {}
    with np.load(file) as arrays:
        for key in arrays:
            number, _, name = key.partition(" ")
            requests.setdefault(number, {})[name] = arrays[key]
    return list(requests.values())
