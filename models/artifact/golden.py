"""Golden requests as JSON, and back: raw, and in an artifact with what they encode to and score."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.features.arrays import Arrays
from models.features.history import Event
from models.features.request import Request


def request_to_json(request: Request) -> dict[str, Any]:
    """A raw request as plain JSON values."""
    behaviours = [
        {name: v for name, v in asdict(event).items() if v != {} or name == "features"} for event in request.behaviours
    ]
    items = {
        name: column.tolist() if isinstance(column, np.ndarray) else list(column)
        for name, column in request.items.items()
    }
    return {
        "user": dict(request.user),
        "context": dict(request.context),
        "ts": request.ts,
        "behaviours": behaviours,
        "items": items,
        "num_items": request.num_items,
    }


def request_from_json(values: Mapping[str, Any]) -> Request:
    """The inverse of `request_to_json`; raises KeyError or TypeError where the shape is another."""
    behaviours = tuple(Event(**event) for event in values["behaviours"])
    return Request(**{**values, "behaviours": behaviours})


def golden_to_json(requests: Sequence[Request], arrays: Arrays, logits: NDArray[np.float64]) -> bytes:
    """An artifact's golden.json. Raises ValueError where a number is none."""
    document = {
        "requests": [request_to_json(request) for request in requests],
        "arrays": {name: array.tolist() for name, array in arrays.items()},
        "logits": logits.tolist(),
    }
    return json.dumps(document, allow_nan=False).encode()


def golden_from_json(content: bytes) -> tuple[tuple[Request, ...], Arrays, NDArray[np.float64]]:
    """The inverse; raises ValueError, KeyError, TypeError or AttributeError where the shape is another."""
    document = json.loads(content)
    return (
        tuple(request_from_json(r) for r in document["requests"]),
        {name: np.array(values) for name, values in document["arrays"].items()},
        np.array(document["logits"], dtype=np.float64),
    )
