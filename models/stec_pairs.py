"""What STEC's head reads of pairs of fields, for candidates of a single request (models.md section 8.3)."""

# C candidates; R fields of the request, G of the item; D embedding width, P pairs of fields, O first layer of the head
# I, J one kind of field, R or G; Q pairs of two such; X = P * D; K numbers that are the candidate's own

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PairReader(nn.Module):
    """Batch norm with fixed statistics, then the head's first layer, of b_ij = l_i * r_j of all pairs at all levels.

    Both are linear in b_ij, so a pair of two request fields is read once. A pair of both kinds is linear in the item's
    field: sum_i W_ij (l_i * r_j) = M_j r_j with M_j = sum_i W_ij diag(l_i), which is made once.
    """

    def __init__(self, first_P: Tensor, second_P: Tensor, num_request: int) -> None:
        super().__init__()
        kinds = {"rr": (True, True), "rg": (True, False), "gr": (False, True), "gg": (False, False)}
        self.num_pairs = {}
        for kind, (left, right) in kinds.items():
            places_Q = (((first_P < num_request) == left) & ((second_P < num_request) == right)).nonzero()[:, 0]
            self.num_pairs[kind] = len(places_Q)
            self.register_buffer(kind, places_Q, persistent=False)
            self.register_buffer(f"{kind}_left", first_P[places_Q] - num_request * (not left), persistent=False)
            self.register_buffer(f"{kind}_right", second_P[places_Q] - num_request * (not right), persistent=False)

    def forward(self, levels: Sequence[Sequence[Tensor]], norms: Sequence[nn.BatchNorm1d], first: nn.Linear) -> Tensor:
        """The first layer's output [C, O].

        `levels`: the request's l [1, R, D] and r [1, R, D], then the item's, [C, G, D] both, at each level.
        """
        weights_OX = torch.unflatten(first.weight, 1, (-1, norms[0].num_features)).unbind(1)
        if len(weights_OX) < len(levels):
            weights_OX *= len(levels)  # the levels are added up before the layer
        fixed: Tensor = first.bias
        own_CK, weight_KO = [], []
        for norm, weight_OX, level in zip(norms, weights_OX, levels, strict=True):
            left_1RD, right_1RD, left_CGD, right_CGD = level
            scale_X, shift_X = _affine(norm)
            weight_OPD = torch.unflatten(weight_OX * scale_X, 1, (-1, left_1RD.shape[-1]))
            of_request_1O = F.linear(self._products("rr", left_1RD, right_1RD), self._of("rr", weight_OPD).flatten(1))
            fixed = fixed + F.linear(shift_X, weight_OX) + of_request_1O
            weight_ORGD = torch.unflatten(self._of("rg", weight_OPD), 1, (left_1RD.shape[1], -1))
            own_CK.append(right_CGD.transpose(1, 2).flatten(1))
            weight_KO.append(_read_by(left_1RD, weight_ORGD.transpose(1, 2)))
            if self.num_pairs["gr"]:
                own_CK.append(left_CGD.transpose(1, 2).flatten(1))
                weight_OGRD = torch.unflatten(self._of("gr", weight_OPD), 1, (-1, left_1RD.shape[1]))
                weight_KO.append(_read_by(right_1RD, weight_OGRD))
            if self.num_pairs["gg"]:
                own_CK.append(self._products("gg", left_CGD, right_CGD))
                weight_KO.append(self._of("gg", weight_OPD).flatten(1).T)
        return torch.cat(own_CK, dim=1) @ torch.cat(weight_KO) + fixed

    def _of(self, kind: str, weight_OPD: Tensor) -> Tensor:
        return weight_OPD.index_select(1, self.get_buffer(kind))

    def _products(self, kind: str, left_nID: Tensor, right_nJD: Tensor) -> Tensor:
        first_Q, second_Q = self.get_buffer(f"{kind}_left"), self.get_buffer(f"{kind}_right")
        return (left_nID.index_select(1, first_Q) * right_nJD.index_select(1, second_Q)).flatten(1)


def _affine(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """What a batch norm with fixed statistics multiplies by, and then adds."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale_X = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale_X, norm.bias - norm.running_mean * scale_X


def _read_by(request_1RD: Tensor, weight_OGRD: Tensor) -> Tensor:
    """The weights [D * G, O] of the item's fields, once they are multiplied by the request's and summed over those."""
    # Batched over D as plain products: an einsum over the weights as they lie costs more than all it saves.
    weight_DXR = weight_OGRD.permute(3, 1, 0, 2).flatten(1, 2)
    read_DX1 = weight_DXR @ request_1RD.permute(2, 1, 0)
    return read_DX1.reshape(-1, weight_OGRD.shape[0])
