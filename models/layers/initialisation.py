"""Initialisers of tables and dense layers, and the L2 penalty."""

# U requests, C candidates, T history length, F fields, M values of a multi-valued field, H heads, D width; n: U or C

from collections.abc import Callable, Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn

Init: TypeAlias = Callable[[Tensor], object]
"""Fills a tensor in place."""


def l2(weight: float, parameters: Iterable[Tensor]) -> Tensor:
    """Weight * sum of squares; with a weight of 0 none is read, and none gets a gradient: tables are large."""
    squares = [p.square().sum() for p in parameters] if weight else []
    return weight * torch.stack(squares).sum() if squares else torch.zeros(())


def tiny_normal(tensor: Tensor) -> None:
    """FuxiCTR's rule for embedding tables: normal with deviation 1e-4."""
    nn.init.normal_(tensor, std=1e-4)


def truncated_normal(tensor: Tensor) -> None:
    """BERT's rule: normal with deviation 0.02, cut at two deviations."""
    nn.init.trunc_normal_(tensor, std=0.02, a=-0.04, b=0.04)


def start_linears(module: nn.Module, init: Init) -> None:
    """Starts the weights of every dense layer by the given rule (FuxiCTR's is Xavier-normal), its biases at zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            init(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
