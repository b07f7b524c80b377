"""Masked softmax and multi-head self-attention, in operators that every runtime computes alike."""

# U requests, C candidates, T history length, F fields, M values of a multi-valued field, H heads, D width; n: U or C

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.folding import of_weights
from models.layers.intermediates import record


class SelfAttention(nn.Module):
    """Multi-head attention of n sequences over themselves: concat_h(softmax(Q K^T / sqrt(D/H)) V) W_O^T, no biases."""

    def __init__(self, width: int, heads: int, *, dropout: float, shown_as: str = "self_attn") -> None:
        super().__init__()
        self.heads, self.shown_as = heads, shown_as
        self.scale = math.sqrt(width / heads)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_nTD: Tensor, mask_nT: Tensor | None = None) -> Tensor:
        # What is H x T x T large takes most of the time: the scale is in the weights, and the values are cleared.
        products_nTX = F.linear(x_nTD, self._weight())
        query_nTD, key_nTD, value_nTD = products_nTX.chunk(3, dim=-1)
        scores_nHTT = split_heads(query_nTD, self.heads) @ split_heads(key_nTD, self.heads).transpose(-1, -2)
        if mask_nT is not None:
            scores_nHTT = scores_nHTT + mask_bias(mask_nT, scores_nHTT.dtype).unsqueeze(1).unsqueeze(1)
            value_nTD = value_nTD * mask_nT.unsqueeze(-1)  # so that attending to nothing gives zeros
        weights_nHTT = scores_nHTT.softmax(dim=-1)
        record(self.shown_as, lambda: weights_nHTT if mask_nT is None else weights_nHTT * _both(mask_nT))
        attended_nHTD = self.dropout(weights_nHTT) @ split_heads(value_nTD, self.heads)
        out_nTD: Tensor = self.out(merge_heads(attended_nHTD))
        return out_nTD

    @of_weights
    def _weight(self) -> Tensor:
        """Of queries divided by sqrt(D/H), keys and values, in one product: [3 D, D]."""
        return torch.cat([self.query.weight / self.scale, self.key.weight, self.value.weight])


def _both(mask_nT: Tensor) -> Tensor:
    """[n, 1, T, T]: true where neither place is padding."""
    return (mask_nT.unsqueeze(1) & mask_nT.unsqueeze(2)).unsqueeze(1)


def split_heads(x_nTD: Tensor, heads: int) -> Tensor:
    """[n, T, D] to [n, H, T, D/H], the heads being contiguous slices of D."""
    return torch.unflatten(x_nTD, -1, (heads, -1)).transpose(1, 2)


def merge_heads(x_nHTD: Tensor) -> Tensor:
    """The inverse of `split_heads`."""
    return x_nHTD.transpose(1, 2).flatten(2)


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the last axis where the mask is true, 0 elsewhere; all zeros, never NaN, where nothing is true."""
    if mask is None:
        return scores.softmax(dim=-1)
    return (scores + mask_bias(mask, scores.dtype)).softmax(dim=-1) * mask


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores before a softmax: 0 where the mask is true, so much elsewhere that nothing is left."""
    # -inf would give NaN in a row without a single true (models.md section 9, X1); half precision ends at -65504 (X3).
    low = -1e4 if dtype == torch.float16 else -1e9
    return torch.where(mask, 0.0, low).to(dtype)


def masked_mean(x_nTD: Tensor, mask_nT: Tensor) -> Tensor:
    """The mean over T of x, which is zero where the mask is false: [n, D], zero where nothing is true."""
    return x_nTD.sum(dim=1) / mask_nT.sum(dim=1, keepdim=True).clamp(min=1)
