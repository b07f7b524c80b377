"""DIN's local activation unit: how much a candidate attends to each past click."""

# U requests, C candidates, T history length, E width of a click, A width of an attention layer
# X = T * A, n = C * T

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention import masked_softmax
from models.layers.folding import of_weights


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
        return F.linear(clicks_UTE, self._kernels()["click"])

    def forward(self, target_CE: Tensor, clicks_CTE: Tensor, read_CTA: Tensor, mask_CT: Tensor) -> Tensor:
        """The weights [C, T] of each candidate's clicks; `read` is what `self.read` makes of them."""
        kernels = self._kernels()
        target_C1A = F.linear(target_CE, kernels["target"], self.first.bias).unsqueeze(1)
        product_CTA = F.linear(target_CE.unsqueeze(1) * clicks_CTE, kernels["product"])
        return self._weigh((read_CTA + target_C1A + product_CTA).flatten(0, 1), mask_CT)

    def of_one_request(self, target_CE: Tensor, clicks_TE: Tensor, read_TA: Tensor, mask_T: Tensor) -> Tensor:
        """The same where all candidates have the same clicks.

        Then the first layer is one map of the target, W_p diag(e_t) + W_i + W_d for every click t.
        """
        # One product for the multiplication and the sum: as two operations over [E, T, A] they take twice as long.
        clicks_ET2 = torch.stack([clicks_TE.T, torch.ones_like(clicks_TE.T)], dim=-1)
        weight_EX = (clicks_ET2 @ self._kernels()["both"]).flatten(1)
        z_CX = torch.addmm((read_TA + self.first.bias).flatten(), target_CE, weight_EX)
        return self._weigh(z_CX.reshape(-1, self.first.out_features), mask_T)

    @of_weights
    def _kernels(self) -> dict[str, Tensor]:
        """The first layer's weight by what it reads, each [A, E]; `both` [E, 2, A] is the product's, the target's."""
        of_target, of_click, of_difference, of_product = self.first.weight.chunk(4, dim=1)
        target, click = of_target + of_difference, of_click - of_difference
        both = torch.stack([of_product.T, target.T], dim=1)
        return {"target": target, "click": click, "product": of_product, "both": both}

    def _weigh(self, z_nA: Tensor, mask_CT: Tensor) -> Tensor:
        # Two dimensions: over three, a runtime adds each bias in a pass of its own.
        scores_CT = self.rest(z_nA).reshape(-1, mask_CT.shape[-1])
        return masked_softmax(scores_CT, mask_CT) if self.softmax else scores_CT * mask_CT


class Dice(nn.Module):
    """p x + (1 - p) alpha x with p = sigmoid(x batch-normalised), eq. (3), over the last axis.

    The statistics of training count padded places too, as FuxiCTR's do, whose epsilon and momentum these are.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=1e-9, momentum=0.01, affine=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x_nA: Tensor) -> Tensor:
        return x_nA * _scale_and_shift(torch.sigmoid(self.norm(x_nA)), self._sigmoid_scale(), self.alpha)

    @of_weights
    def _sigmoid_scale(self) -> Tensor:
        return 1 - self.alpha


def _scale_and_shift(x_nA: Tensor, scale_A: Tensor, shift_A: Tensor) -> Tensor:
    """X * scale + shift, as a normalisation by 0 and 1: in ONNX Runtime a third of the time of the two operations."""
    eps = 1e-5  # the least that cuDNN takes
    mean_A, variance_A = torch.zeros_like(scale_A), torch.full_like(scale_A, 1 - eps)
    return F.batch_norm(x_nA, mean_A, variance_A, weight=scale_A, bias=shift_A, eps=eps)
