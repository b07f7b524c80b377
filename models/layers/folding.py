"""Constant folding of what depends on a model's weights alone, for export: computed once, and in the graph a constant.

    @of_weights
    def kernel(self) -> Tensor:
        return torch.cat([self.first.weight, self.second.weight])

is called anew by every forward pass in training, where weights change. Under `folded_weights` the first call's result
stands for all later ones, so that a trace made then holds neither the computation nor its parts.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")
_constants: ContextVar[dict[Hashable, Any] | None] = ContextVar("constants", default=None)


def of_weights(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Marks a function of modules and other hashable arguments, which reads no tensor but their weights."""

    @wraps(function)
    def call(*args: _P.args, **options: _P.kwargs) -> _R:
        constants = _constants.get()
        if constants is None:
            return function(*args, **options)
        key = (function, args, tuple(sorted(options.items())))
        if key not in constants:
            with torch.no_grad():
                constants[key] = _detached(function(*args, **options))
        result: _R = constants[key]
        return result

    return call


@contextmanager
def folded_weights() -> Iterator[None]:
    """Weights are as they are now for as long as this lasts. Run the model once before it is traced."""
    token = _constants.set({})
    try:
        yield
    finally:
        _constants.reset(token)


def _detached(result: Any) -> Any:
    """Without the weights' history; a view (of a transposed weight, say) becomes a tensor of its own."""
    if isinstance(result, Tensor):
        return result.detach().contiguous()
    if isinstance(result, dict):
        return {name: _detached(value) for name, value in result.items()}
    if isinstance(result, tuple | list):
        return type(result)(_detached(value) for value in result)
    return result
