"""DIN's local activation unit: how much a candidate attends to each past click."""

# U requests, C candidates, T history length, E width of a click, A width of an attention layer, X = T * A

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention import masked_softmax


class TargetAttention(nn.Module):
    """The weights a_t of a history's clicks for a candidate.

    The first layer is linear in what it reads, W = [W_i W_t W_d W_p] of [e_i; e_t; e_i - e_t; e_i * e_t], so that
    (W_t - W_d) e_t is computed once per request and (W_i + W_d) e_i once per candidate.
    """

    def __init__(
        self, width: int, hidden: Sequence[int], *, activation: Literal["dice", "relu"] = "dice", softmax: bool
    ) -> None:
        super().__init__()
        self.softmax = softmax
        self.first = nn.Linear(4 * width, hidden[0])
        self.rest = nn.Sequential()
        for this, following in pairwise((*hidden, 1)):
            self.rest.append(Dice(this) if activation == "dice" else nn.ReLU())
            self.rest.append(nn.Linear(this, following))

    def read(self, clicks_UTE: Tensor) -> Tensor:
        """What the clicks alone bring to the first layer, [U, T, A]."""
        _, of_click, of_difference, _ = self.first.weight.chunk(4, dim=1)
        return F.linear(clicks_UTE, of_click - of_difference)

    def forward(self, target_CE: Tensor, clicks_CTE: Tensor, read_CTA: Tensor, mask_CT: Tensor) -> Tensor:
        """The weights [C, T] of each candidate's clicks; `read` is what `self.read` makes of them."""
        of_target, _, of_difference, of_product = self.first.weight.chunk(4, dim=1)
        target_C1A = F.linear(target_CE, of_target + of_difference, self.first.bias).unsqueeze(1)
        product_CTA = F.linear(target_CE.unsqueeze(1) * clicks_CTE, of_product)
        return self._weigh(read_CTA + target_C1A + product_CTA, mask_CT)

    def of_one_request(self, target_CE: Tensor, clicks_TE: Tensor, read_TA: Tensor, mask_T: Tensor) -> Tensor:
        """The same where all candidates have the same clicks: then the first layer is one map of the target."""
        of_target, _, of_difference, of_product = self.first.weight.chunk(4, dim=1)
        weight_TAE = of_product * clicks_TE.unsqueeze(1) + (of_target + of_difference)
        z_CX = F.linear(target_CE, weight_TAE.flatten(0, 1), (read_TA + self.first.bias).flatten())
        return self._weigh(torch.unflatten(z_CX, -1, (-1, self.first.out_features)), mask_T)

    def _weigh(self, z_CTA: Tensor, mask_CT: Tensor) -> Tensor:
        scores_CT: Tensor = self.rest(z_CTA).squeeze(-1)
        return masked_softmax(scores_CT, mask_CT) if self.softmax else scores_CT * mask_CT


class Dice(nn.Module):
    """p x + (1 - p) alpha x with p = sigmoid(x batch-normalised), eq. (3), over the last axis of [C, T, A].

    The statistics of training count padded places too, as FuxiCTR's do, whose epsilon and momentum these are.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=1e-9, momentum=0.01, affine=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x_CTA: Tensor) -> Tensor:
        # Channels last: over the [C, A, T] that BatchNorm1d documents, its backward pass takes ten times as long.
        p_CTA = torch.sigmoid(self.norm(x_CTA.flatten(0, 1)).unflatten(0, x_CTA.shape[:2]))
        return x_CTA * (self.alpha + (1 - self.alpha) * p_CTA)
