"""How DynInt maps its input: the terms t_l of PIN, DA, DGP and DWP, and the gate that chooses their weights.

Equations are those of models.md section 5 (arXiv 2301.08139); D1..D11 its ambiguities.
"""

# C candidates, n: requests or candidates; F flat fields (request's first), G some of them, D width
# S subspaces, W = D / S, P = S * F crossed rows, L layers, K kernel size or latent rank
# H inside of a gate, O numbers a layer's gate gives

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import UserState
from models.explanation import CANDIDATE, Axis, Explanation, numbered
from models.taps import tap


class Maps(nn.Module):
    """The maps t_1 .. t_L, [C, W, L, P], in two halves: what is linear in the fields, by fields, then the terms.

    What each kind of map defines for itself raises here.
    """

    gate_width = 0
    """How many numbers a layer's gate gives."""

    def read(self, rows_nWSG: Tensor, fields: slice) -> UserState:
        raise NotImplementedError

    def forward(self, read: UserState) -> Tensor:
        raise NotImplementedError

    def show(self, read: UserState) -> None:
        """Taps what `explanations` promises."""
        raise NotImplementedError

    def weights(self, gate_nLO: Tensor) -> Tensor:
        """The weights [n, L, P, P] that a gate makes, so that t_l is their product with X_0. DA's are not such."""
        raise NotImplementedError

    def explanations(self, fields: Sequence[str]) -> tuple[Explanation, ...]:
        """What the map shows of itself, given the names of the flat fields."""
        raise NotImplementedError


class PIN(Maps):
    """t_l = W_l X_0: weights that are the same for every row, xDeepInt's."""

    def __init__(self, layers: int, num_rows: int) -> None:
        super().__init__()
        self.kernel_LPP = _glorot(layers, num_rows, num_rows)

    def read(self, rows_nWSG: Tensor, fields: slice) -> UserState:
        return {"map": apply_kernel(self.kernel_LPP, rows_nWSG, fields)}

    def forward(self, read: UserState) -> Tensor:
        return read["map"]

    def show(self, read: UserState) -> None:  # noqa: ARG002  # its weights are nobody's own
        tap("effective_weight", self.kernel_LPP)

    def explanations(self, fields: Sequence[str]) -> tuple[Explanation, ...]:
        layers, num_rows, _ = self.kernel_LPP.shape
        return (_effective_weight((numbered("layer", layers), *_rows(fields, num_rows))),)


class DA(PIN):
    """t_l = G_l * (W_l X_0) with G_l = 2 sigmoid(gate): the row's own emphasis on each product (D1)."""

    def __init__(self, layers: int, num_rows: int, *, subspaces: int, width: int, by_element: bool) -> None:
        super().__init__(layers, num_rows)
        self.subspaces, self.width, self.by_element = subspaces, width, by_element
        self.gate_width = num_rows // subspaces * width if by_element else num_rows

    def forward(self, read: UserState) -> Tensor:
        gate = self._gate(read["gate"])
        if not self.by_element:
            return gate.unsqueeze(1) * read["map"]
        gate_CLWP = cross(gate, self.subspaces).flatten(3)
        return gate_CLWP.transpose(1, 2) * read["map"]

    def show(self, read: UserState) -> None:
        tap("gate", self._gate(read["gate"]))

    def _gate(self, gate_CLO: Tensor) -> Tensor:
        """[C, L, F, D], or by row [C, L, P]."""
        gate_CLO = 2 * torch.sigmoid(gate_CLO)
        return torch.unflatten(gate_CLO, -1, (-1, self.width)) if self.by_element else gate_CLO

    def explanations(self, fields: Sequence[str]) -> tuple[Explanation, ...]:
        layers, num_rows, _ = self.kernel_LPP.shape
        rows, _ = _rows(fields, num_rows)
        gated = (Axis(name="field", labels=tuple(fields)), numbered("dimension", self.width))
        meaning = "What this row multiplies each product by: 1 is neutral, less suppresses it, up to 2 amplifies it."
        axes = (CANDIDATE, numbered("layer", layers), *(gated if self.by_element else (rows,)))
        return (Explanation(name="gate", axes=axes, meaning=meaning),)


class DGP(Maps):
    """t_l = U_l diag(s_l) V_l^T X_0 with s_l = 2 sigmoid(gate): a low-rank kernel whose spectrum the row chooses."""

    def __init__(self, layers: int, num_rows: int, *, kernel_size: int, linear: bool) -> None:
        super().__init__()
        self.linear, self.gate_width = linear, kernel_size
        self.left_LKP = _glorot(layers, kernel_size, num_rows)
        self.right_LKP = _glorot(layers, kernel_size, num_rows)

    def read(self, rows_nWSG: Tensor, fields: slice) -> UserState:
        return {"map": apply_kernel(self.right_LKP, rows_nWSG, fields)}

    def forward(self, read: UserState) -> Tensor:
        sigma_CLK = self._sigma(read["gate"])
        scaled_LCWK = (sigma_CLK.unsqueeze(1) * read["map"]).permute(2, 0, 1, 3)
        terms_LXP = scaled_LCWK.flatten(1, 2) @ self.left_LKP
        return torch.unflatten(terms_LXP, 1, (-1, read["rows"].shape[1])).permute(1, 2, 0, 3)

    def show(self, read: UserState) -> None:
        tap("sigma", self._sigma(read["gate"]))
        tap("effective_weight", self.weights(read["gate"]))

    def weights(self, gate_nLO: Tensor) -> Tensor:
        return (self.left_LKP.transpose(1, 2) * self._sigma(gate_nLO).unsqueeze(2)) @ self.right_LKP

    def _sigma(self, gate_nLK: Tensor) -> Tensor:
        return gate_nLK if self.linear else 2 * torch.sigmoid(gate_nLK)

    def explanations(self, fields: Sequence[str]) -> tuple[Explanation, ...]:
        layers, kernel_size, num_rows = self.left_LKP.shape
        axes = (CANDIDATE, numbered("layer", layers))
        meaning = "The strength this row gives each of the kernel's directions U_k V_k^T."
        sigma = Explanation(name="sigma", axes=(*axes, numbered("kernel", kernel_size)), meaning=meaning)
        return sigma, _effective_weight((*axes, *_rows(fields, num_rows)))

    def overlap(self, *, mean: bool) -> Tensor:
        """How far the columns of every U_l, and of every V_l, are from orthogonal: section 5.4."""
        return (_overlap(self.left_LKP, mean=mean) + _overlap(self.right_LKP, mean=mean)).sum()


class DWP(Maps):
    """t_l = (G_l * W_l) X_0 with G_l = sum_p u_p v_p^T made by the gate: each static weight rescaled for the row (D4).

    v_p multiplies the input before W_l does, so that only the gate's first layer splits by fields.
    """

    def __init__(self, layers: int, num_rows: int, *, rank: int, offset: float) -> None:
        super().__init__()
        self.rank, self.offset, self.gate_width = rank, offset, 2 * rank * num_rows
        self.kernel_LPP = _glorot(layers, num_rows, num_rows)

    def read(self, rows_nWSG: Tensor, fields: slice) -> UserState:  # noqa: ARG002  # its rows are read scaled
        return {}

    def forward(self, read: UserState) -> Tensor:
        u_CLKP, v_CLKP = self.factors(read["gate"])
        scaled_LCWKP = (read["rows"].unsqueeze(1).unsqueeze(3) * v_CLKP.unsqueeze(2)).transpose(0, 1)
        mapped_LXP = scaled_LCWKP.flatten(1, 3) @ self.kernel_LPP.transpose(1, 2)
        mapped_LCWKP = torch.unflatten(mapped_LXP, 1, (-1, read["rows"].shape[1], self.rank))
        return (u_CLKP.transpose(0, 1).unsqueeze(2) * mapped_LCWKP).sum(dim=3).permute(1, 2, 0, 3)

    def show(self, read: UserState) -> None:
        u_CLKP, v_CLKP = self.factors(read["gate"])
        tap("u", u_CLKP)
        tap("v", v_CLKP)
        tap("effective_weight", self.weights(read["gate"]))

    def weights(self, gate_nLO: Tensor) -> Tensor:
        u_nLKP, v_nLKP = self.factors(gate_nLO)
        return (u_nLKP.transpose(2, 3) @ v_nLKP) * self.kernel_LPP

    def explanations(self, fields: Sequence[str]) -> tuple[Explanation, ...]:
        layers, num_rows, _ = self.kernel_LPP.shape
        rows, mapped = _rows(fields, num_rows)
        axes = (CANDIDATE, numbered("layer", layers))
        ranks = numbered("rank", self.rank)
        u = "What this row multiplies the output side of the static weights by, in each rank; see `effective_weight`."
        v = "The same for the input side: the weights are multiplied by the sum over ranks of u v^T."
        return (
            Explanation(name="u", axes=(*axes, ranks, rows), meaning=u),
            Explanation(name="v", axes=(*axes, ranks, mapped), meaning=v),
            _effective_weight((*axes, rows, mapped)),
        )

    def factors(self, gate_CLO: Tensor) -> tuple[Tensor, Tensor]:
        """The u and v of each row and layer, each [C, L, K, P]; their products sum to G, which starts near 1."""
        return self._halves(gate_CLO + self.offset)

    def overlap(self, gate_CLO: Tensor, *, before: bool, mean: bool) -> Tensor:
        """The same of the u and of the v, mean over the rows; `before`: without their offset (D5)."""
        u_CLKP, v_CLKP = self._halves(gate_CLO) if before else self.factors(gate_CLO)
        return (_overlap(u_CLKP, mean=mean) + _overlap(v_CLKP, mean=mean)).sum(dim=1).mean()

    def _halves(self, both_CLO: Tensor) -> tuple[Tensor, Tensor]:
        both_CL2KP = torch.unflatten(both_CLO, -1, (2, self.rank, -1))
        return both_CL2KP[:, :, 0], both_CL2KP[:, :, 1]


class Gate(nn.Module):
    """Per layer a two-layer net of the flattened input, whose gradient stops there: the layer's weights for one row."""

    def __init__(self, layers: int, num_fields: int, width: int, *, reduction: int, out: int, detach: bool) -> None:
        super().__init__()
        self.num_fields, self.detach = num_fields, detach
        inner = max(1, num_fields * width // reduction)
        self.squeeze_LHX = _glorot(layers, inner, num_fields * width)
        self.squeeze_bias_LH = nn.Parameter(torch.zeros(layers, inner))
        self.excite_LHO = _glorot(layers, inner, out)
        self.excite_bias_LO = nn.Parameter(torch.zeros(layers, out))

    def read(self, x_nGD: Tensor, fields: slice) -> Tensor:
        """These fields' part in the first layer, [n, L, H]."""
        if self.detach:
            x_nGD = x_nGD.detach()
        weight_LHFD = torch.unflatten(self.squeeze_LHX, -1, (self.num_fields, -1))
        read_nX = F.linear(x_nGD.flatten(1), weight_LHFD[:, :, fields].flatten(2).flatten(0, 1))
        return torch.unflatten(read_nX, -1, self.squeeze_bias_LH.shape)

    def forward(self, read_nLH: Tensor) -> Tensor:
        """The gates [n, L, O], given the first layer's product."""
        hidden_LnH = F.relu(read_nLH + self.squeeze_bias_LH).transpose(0, 1)
        return (hidden_LnH @ self.excite_LHO).transpose(0, 1) + self.excite_bias_LO


def cross(x_nFD: Tensor, subspaces: int) -> Tensor:
    """[n, F, D] cut into S slices of D, as [n, W, S, F]: flattened, row s * F + j is slice s of field j (D2).

    Rows last, so that a map over them is one matrix product.
    """
    return torch.unflatten(x_nFD, -1, (subspaces, -1)).transpose(-3, -1)


def _rows(fields: Sequence[str], num_rows: int) -> tuple[Axis, Axis]:
    """The crossed rows by field and, where there are several, subspace: those multiplied, and those read."""
    subspaces = num_rows // len(fields)
    labels = tuple(f"{field}.{s + 1}" if subspaces > 1 else field for s in range(subspaces) for field in fields)
    return Axis(name="row", labels=labels), Axis(name="read_row", labels=labels)


def _effective_weight(axes: tuple[Axis, ...]) -> Explanation:
    meaning = "The weight with which each row (of a field, in a subspace) is multiplied by each row of the input."
    return Explanation(name="effective_weight", axes=axes, meaning=meaning)


def apply_kernel(kernel_LKP: Tensor, rows_nWSG: Tensor, fields: slice) -> Tensor:
    """Each layer's kernel times the crossed rows of these fields, [n, W, L, K]."""
    columns_LKSG = torch.unflatten(kernel_LKP, -1, (rows_nWSG.shape[2], -1))[..., fields]
    mapped_nWX = F.linear(rows_nWSG.flatten(2), columns_LKSG.flatten(2).flatten(0, 1))
    return torch.unflatten(mapped_nWX, -1, kernel_LKP.shape[:2])


def _overlap(vectors_KX: Tensor, *, mean: bool) -> Tensor:
    """sum_{p>q} |cos(x_p, x_q)| of K vectors, or its mean over the pairs; 0 for a single one."""
    unit_KX = F.normalize(vectors_KX, dim=-1)
    cosines_KK = (unit_KX @ unit_KX.transpose(-1, -2)).tril(diagonal=-1).abs()
    num = vectors_KX.shape[-2]
    return cosines_KK.sum(dim=(-1, -2)) / (max(1, num * (num - 1) // 2) if mean else 1)


def _glorot(layers: int, rows: int, columns: int) -> nn.Parameter:
    """One matrix per layer, started uniform by Glorot's rule."""
    kernels = torch.empty(layers, rows, columns)
    for kernel in kernels:
        nn.init.xavier_uniform_(kernel)
    return nn.Parameter(kernels)
