"""Linear layer over [request; item; cross] features whose parts are computed apart: W x = W_r x_r + W_i x_i + W_x x_x.

The request's part is computed once per request, the item's once per ad and model version; only the part of the cross
features, which depend on both, is left for each candidate.
"""

# n: U requests or C candidates, X input width of a part, O output width

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.folding import of_weights


class SplitLinear(nn.Linear):
    """One nn.Linear, with its parameters and their start; `request(r) + item(i) + cross(x)` is its output."""

    def __init__(
        self, request_width: int, item_width: int, out: int, *, cross_width: int = 0, bias: bool = True
    ) -> None:
        super().__init__(request_width + item_width + cross_width, out, bias=bias)
        self.widths = (request_width, item_width, cross_width)

    def request(self, x_nX: Tensor) -> Tensor:
        return request_product(x_nX, self)

    def item(self, x_nX: Tensor) -> Tensor:
        """The bias is in this part: every candidate has one."""
        return item_product(x_nX, self)

    def cross(self, x_nX: Tensor) -> Tensor:
        return F.linear(x_nX, self.part(2))

    @of_weights
    def part(self, index: int) -> Tensor:
        """The columns of the weight that read part 0 (request), 1 (item) or 2 (cross)."""
        start = sum(self.widths[:index])
        return self.weight[:, start : start + self.widths[index]]


def request_product(x_nX: Tensor, *layers: SplitLinear) -> Tensor:
    """`layer.request(x)` of several layers side by side, [n, sum of their O], in one matrix product."""
    return F.linear(x_nX, _request_weight(*layers))


def item_product(x_nX: Tensor, *layers: SplitLinear) -> Tensor:
    """`layer.item(x)` of several layers side by side, [n, sum of their O], in one matrix product."""
    return F.linear(x_nX, *_item_weight(*layers))


@of_weights
def _request_weight(*layers: SplitLinear) -> Tensor:
    return _stacked([layer.part(0) for layer in layers])


@of_weights
def _item_weight(*layers: SplitLinear) -> tuple[Tensor, Tensor]:
    """Weight and bias."""
    biases: list[Tensor] = [
        layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers
    ]
    return _stacked([layer.part(1) for layer in layers]), _stacked(biases)


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
