"""A model's inputs by name as numpy arrays, and several requests' joined into one batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
"""A model's inputs by name (`user.age`, `hist_mask`, ...): see `Schema.inputs` for shapes."""


def concat(parts: Sequence[Arrays]) -> Arrays:
    """Several requests' arrays as one: users and candidates in order, `user_index` pointing at each one's own user."""
    joined = {name: np.concatenate([p[name] for p in parts]) for name in parts[0] if name != "user_index"}
    users = [num_users(p) for p in parts]
    offsets = np.cumsum([0, *users[:-1]])
    joined["user_index"] = np.concatenate([p["user_index"] + o for p, o in zip(parts, offsets, strict=True)])
    return joined


def num_users(arrays: Arrays) -> int:
    for name, array in arrays.items():
        if not name.startswith("item.") and name != "user_index":
            return len(array)
    return int(arrays["user_index"].max(initial=-1)) + 1
