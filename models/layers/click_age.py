"""Embedding of a click's age, the time between the click and the request, on a logarithmic scale."""

# U requests, T history length, E width of a click

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.config import Within
from models.layers.initialisation import tiny_normal

AgeBuckets = Annotated[int, Within(low=0, most=64)]  # of more, some would begin where an age of 64 bits ends


class AgeEmbedding(nn.Module):
    """One vector for each bucket of ages, which are cut at 1, 2, 4, ... seconds; the last holds whatever is older.

    So each bucket is as wide as all younger ages together, and few of them reach over years: each is met in training.
    """

    ends: Tensor

    def __init__(self, buckets: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(buckets, width))
        tiny_normal(self.table.data)
        # Whole numbers all the way: seconds since 1970 do not fit a float32 (models.md X14).
        ends = torch.tensor([1 << k for k in range(buckets - 1)], dtype=torch.int64)
        self.register_buffer("ends", ends, persistent=False)

    def forward(self, age_UT: Tensor) -> Tensor:
        """[U, T, E] of ages in whole seconds."""
        return F.embedding((age_UT.unsqueeze(-1) >= self.ends).sum(dim=-1), self.table)
