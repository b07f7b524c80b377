"""MIAN's global interaction module and head, which of a candidate's groups count and what they come to; its crosses.

Equation numbers are the paper's (arXiv 2012.06968), M9 is an ambiguity of models.md section 2.3.
"""

# U requests, C candidates, F = first layer of the head, and the group's score before it, L groups
# R width of the request's vectors together, I of the candidate's, X = R + I

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import MLP
from models.taps import tap

if TYPE_CHECKING:
    from models.mian import MIANConfig


class GlobalInteraction(nn.Module):
    """GIM and head, eq. (14)-(17): omega = softmax_l(tanh(score of r_l)), then the MLP over the weighted groups.

    Groups have unequal widths, which leaves their sum undefined (M9): `project_sum` maps each to G first, `concat`
    weights and concatenates them, `zero_pad` pads them to the widest. Without `gim` the MLP reads their plain
    concatenation. In each case a group enters only through its score and the MLP's first layer, both linear in it:
    `kernel` is that one matrix, whose columns follow the group's own concatenation.
    """

    def __init__(self, config: "MIANConfig", groups: dict[str, int], width: int) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.attends = config.gim
        self.combine = config.gim_combine if config.gim else "concat"
        self.projections = nn.ModuleDict()
        self.scores = nn.ModuleDict()
        if self.combine == "project_sum":
            self.projections.update({name: nn.Linear(raw, width) for name, raw in groups.items()})
        if self.attends:
            self.scores.update({n: nn.Linear(width if n in self.projections else w, 1) for n, w in groups.items()})
        ends = dict(zip(groups, accumulate(groups.values()), strict=True))
        self.columns = {
            "project_sum": dict.fromkeys(groups, slice(0, width)),
            "concat": {name: slice(ends[name] - raw, ends[name]) for name, raw in groups.items()},
            "zero_pad": {name: slice(0, raw) for name, raw in groups.items()},
        }[self.combine]
        read = max(columns.stop for columns in self.columns.values())
        self.head = MLP(read, config.hidden, dropout=config.dropout)
        self.out_width = self.head.first.out_features + self.attends  # F, rows of each group's kernel

    def kernel(self, group: str) -> tuple[Tensor, Tensor]:
        """Weight and bias that take r_l to its score (first, if there are scores) and its part of the first layer."""
        first_FG = self.head.first.weight[:, self.columns[group]]
        weight, bias = first_FG, torch.zeros_like(first_FG[:, 0])
        if self.attends:
            score = _linear(self.scores, group)
            weight = torch.cat([score.weight, first_FG])
            bias = torch.cat([score.bias, bias])
        if group in self.projections:
            projection = _linear(self.projections, group)
            bias = bias + weight @ projection.bias
            weight = weight @ projection.weight
        return weight, bias

    def forward(self, parts_CLF: Tensor) -> Tensor:
        """Logits from what each group's kernel made of it."""
        if self.attends:
            omega_CL = torch.tanh(parts_CLF[..., 0]).softmax(dim=1)
            tap("gim_weight", omega_CL)
            found_CF = (omega_CL.unsqueeze(1) @ parts_CLF).squeeze(1)[:, 1:]
        else:
            found_CF = parts_CLF.sum(dim=1)
        return self.head.finish(found_CF + self.head.first.bias)


class Crosses(nn.Module):
    """DCNv2's cross layers, whose logit is added to the head's: x_{l+1} = x_0 * (W_l x_l + b_l) + x_l over all vectors.

    MIAN weighs fields against each other and multiplies none. R. Wang et al., "DCN V2", WWW 2021. The request's columns
    of W_0 meet it once.
    """

    def __init__(self, request: int, item: int, layers: int) -> None:
        super().__init__()
        self.request_width, width = request, request + item
        self.first = nn.Linear(width, width)
        self.rest = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))
        self.out = nn.Linear(width, 1, bias=False)

    def read(self, request_UR: Tensor) -> Tensor:
        """What all candidates of a request share [U, R + X]: its own part of x_0, and what W_0 makes of that."""
        return torch.cat([request_UR, F.linear(request_UR, self.first.weight[:, : self.request_width])], dim=-1)

    def forward(self, read_CR: Tensor | None, item_CI: Tensor) -> Tensor:
        """The logits [C], given what `read` says of each one's request; None where that has no fields."""
        x0_CX, met_CX = item_CI, F.linear(item_CI, self.first.weight[:, self.request_width :], self.first.bias)
        if read_CR is not None:
            x0_CX = torch.cat([read_CR[:, : self.request_width], item_CI], dim=-1)
            met_CX = met_CX + read_CR[:, self.request_width :]
        x_CX = x0_CX * met_CX + x0_CX
        for layer in self.rest:
            x_CX = x0_CX * layer(x_CX) + x_CX
        logits_C: Tensor = self.out(x_CX).squeeze(-1)
        return logits_C


def _linear(layers: nn.ModuleDict, group: str) -> nn.Linear:
    layer = layers[group]
    assert isinstance(layer, nn.Linear)
    return layer
