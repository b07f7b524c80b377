"""How much a candidate attends to each of N elements (clicks, user fields, context fields), each way in two halves.

Equation numbers are those of MIAN (arXiv 2012.06968); M6 and M8 are ambiguities of models.md section 2.3.
"""

# U requests, C candidates, N elements, I width of a candidate, X width of an element

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.own import matmul_own


class Scorer(nn.Module):
    """gamma(V_n) with V_n = [e_i; x_n], in two halves: what the elements bring, then the candidates' scores [C, N]."""

    def read_elements(self, x_UNX: Tensor) -> Tensor:
        """Whatever of the elements alone enters the scores, [U, N], [U, I, N] or [U, N, X]."""
        raise NotImplementedError

    def forward(self, item_CI: Tensor, read_UN: Tensor, user_index: Tensor) -> Tensor:
        """The scores, given each candidate, what was read of each request's elements, and whose candidate it is."""
        raise NotImplementedError


class AdditiveScorer(Scorer):
    """tanh([e_i; x_n] w_n + b_n), eq. (8) and (10): one w per element, or one for all (M6)."""

    def __init__(self, num_weights: int, item: int, element: int) -> None:
        super().__init__()
        self.kernel = nn.Linear(item + element, num_weights)
        self.item = item

    def read_elements(self, x_UNX: Tensor) -> Tensor:
        return (x_UNX * self.kernel.weight[:, self.item :]).sum(dim=-1) + self.kernel.bias

    def forward(self, item_CI: Tensor, read_UN: Tensor, user_index: Tensor) -> Tensor:
        item_CN = F.linear(item_CI, self.kernel.weight[:, : self.item])
        return torch.tanh(item_CN + read_UN.index_select(0, user_index))


class BilinearScorer(Scorer):
    """tanh(e_i^T M x_n / sqrt(I) + b_n): candidate and click multiply, as they never do in the paper (M8)."""

    def __init__(self, num_biases: int, item: int, element: int) -> None:
        super().__init__()
        self.kernel = nn.Linear(element, item, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_biases))

    def read_elements(self, x_UNX: Tensor) -> Tensor:
        read_UNI: Tensor = self.kernel(x_UNX)
        return read_UNI.transpose(1, 2) / math.sqrt(self.kernel.out_features)

    def forward(self, item_CI: Tensor, read_UIN: Tensor, user_index: Tensor) -> Tensor:
        return torch.tanh(matmul_own(item_CI.unsqueeze(1), read_UIN, user_index).squeeze(1) + self.bias)


class MLPScorer(Scorer):
    """tanh(v ReLU(W [e_i; x_n] + c) + b_n), as wide inside as a click (M8)."""

    def __init__(self, num_biases: int, item: int, element: int) -> None:
        super().__init__()
        self.kernel = nn.Linear(item + element, element)
        self.out = nn.Linear(element, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_biases))
        self.item = item

    def read_elements(self, x_UNX: Tensor) -> Tensor:
        return F.linear(x_UNX, self.kernel.weight[:, self.item :], self.kernel.bias)

    def forward(self, item_CI: Tensor, read_UNX: Tensor, user_index: Tensor) -> Tensor:
        item_C1X = F.linear(item_CI, self.kernel.weight[:, : self.item]).unsqueeze(1)
        read_CNX = read_UNX.index_select(0, user_index)
        return torch.tanh(self.out(F.relu(item_C1X + read_CNX)).squeeze(-1) + self.bias)
