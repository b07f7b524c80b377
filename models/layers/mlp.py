"""Multi-layer perceptron that ends in one logit."""

# U requests, C candidates, T history length, F fields, M values of a multi-valued field, H heads, D width; n: U or C

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from models.layers.split_linear import SplitLinear


class MLP(nn.Module):
    """Hidden layers (Linear, BatchNorm if asked, ReLU, Dropout), then one logit. No hidden layer: a linear map.

    `first` stands apart so that a model can apply it part by part. Of the `width` numbers that it reads, the first
    `request_width` are the request's and the last `cross_width` are cross features; the rest are the item's.
    """

    def __init__(
        self,
        width: int,
        hidden: Sequence[int],
        *,
        dropout: float,
        batch_norm: bool = False,
        request_width: int = 0,
        cross_width: int = 0,
    ) -> None:
        super().__init__()
        widths = (*hidden, 1)
        item_width = width - request_width - cross_width
        self.first = SplitLinear(request_width, item_width, widths[0], cross_width=cross_width)
        self.rest = nn.Sequential()
        for this, following in pairwise(widths):
            if batch_norm:
                self.rest.append(nn.BatchNorm1d(this))
            self.rest.append(nn.ReLU())
            self.rest.append(nn.Dropout(dropout))
            self.rest.append(nn.Linear(this, following))

    def forward(self, x_CD: Tensor) -> Tensor:
        """The logits [C]."""
        return self.finish(self.first(x_CD))

    def finish(self, z_CF: Tensor) -> Tensor:
        """The logits [C], given the first layer's output."""
        logit_C1: Tensor = self.rest(z_CF)
        return logit_C1.squeeze(-1)
