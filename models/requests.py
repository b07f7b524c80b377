"""A raw request as plain JSON values, as golden.json holds it, and back."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from models.encoding import Event, Request


def request_to_json(request: Request) -> dict[str, Any]:
    """A raw request as plain JSON values."""
    behaviours = [asdict(event) for event in request.behaviours]
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
