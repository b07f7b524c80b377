"""DynInt: Y. Yan and L. Li, "DynInt: Dynamic Interaction Modeling for Large-scale Click-Through Rate Prediction".

DLP-KDD 2022, arXiv 2301.08139; its static base PIN is "xDeepInt" (2020) by the same authors. D1..D11 are the
ambiguities listed in models.md section 5.7.
"""

# U requests, C candidates, n: U or C; F flat fields (R of the request first, G of the item), D width
# S subspaces, W = D / S, P = S * F crossed rows; L layers, K kernel size or latent rank
# H inside of a gate, O numbers that a layer's gate gives

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.artifact.explanation import BIAS, CANDIDATE, Axis, Explanation, numbered, of_fields
from models.features.schema import Schema
from models.layers.base import CTRModel, Inputs, UserState
from models.layers.config import Config, Count, Weight, Within
from models.layers.embeddings import FieldEmbeddings
from models.layers.folding import of_weights
from models.layers.intermediates import is_recording, record
from models.layers.request_matmul import of_request


@dataclass(frozen=True, kw_only=True)
class DynIntConfig(Config):
    """Which weights each input gets: pin, the same for all; da, gated; dgp, low-rank and generated; dwp, rescaled."""

    emb_dim: Count = 16
    mode: Literal["pin", "da", "dgp", "dwp"] = "dgp"
    layers: Annotated[int, Within(low=0)] = 3  # 0: logistic regression on the summed embeddings
    subspaces: Count = 4  # D2: 1 is vector-wise, emb_dim bit-wise
    residual: bool = True  # false: no identity, and the output reads every order
    reduction: Count = 4  # how much narrower a gate is inside
    gate_scope: Literal["all", "request"] = "all"  # D11: request is ours, so that gates are made once per request
    detach_gate_input: bool = True
    da_gate: Literal["element", "row"] = "element"  # D1
    kernel_size: Count = 16  # K of dgp; above the number of crossed rows it has more directions than rank (D9)
    dgp_sigma: Literal["sigmoid", "linear"] = "sigmoid"  # D3: sigmoid is doubled
    latent_rank: Count = 2  # K of dwp
    dwp_offset: Literal["inv_sqrt", "inv"] = "inv_sqrt"  # D4: inv is the printed one; G then starts at 1/K, not at 1
    orth_lambda: Weight = 0.0
    orth_on: Literal["before", "after"] = "before"  # D5: dwp's u and v without their offset, or with it as printed
    orth_reduction: Literal["sum", "mean"] = "sum"  # over the pairs of vectors
    l2_emb: Weight = 0.0  # (weight / 2) * sum of squares of the tables

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.emb_dim % self.subspaces:
            raise ValueError(f"option subspaces: {self.subspaces} do not divide emb_dim {self.emb_dim}")


class DynInt(CTRModel):
    """Products of the input with maps of itself, X_l = X_{l-1} * (1 + t_l(X_0)), whose weights the input may choose.

    Flat fields only: the history is not read (D10). The paper's fields are all categorical; a number enters here as
    its value times a direction, as in every model (models.md section 1).

    All maps read X_0 and most are linear in it, as are the gates' first layers, so that the request's part is computed
    once per request and the ad's once per version (models.md section 8.4). With `gate_scope` request so are the gates,
    and, where all candidates are of one request, the weights that dwp makes of them.
    """

    def __init__(self, config: DynIntConfig, schema: Schema) -> None:
        super().__init__()
        self.config = config
        self.num_request = len(schema.group("user")) + len(schema.group("context"))
        self.num_fields = self.num_request + len(schema.group("item"))
        _check_schema(config, self.num_request, self.num_fields)
        self.fields = FieldEmbeddings(schema, config.emb_dim, init=_truncated_normal)
        self.maps = _maps(config, self.num_fields) if config.layers else None
        self.gate: Gate | None = None
        if self.maps is not None and config.mode != "pin":
            self.gate = Gate(
                config.layers,
                self.num_request if config.gate_scope == "request" else self.num_fields,
                config.emb_dim,
                reduction=config.reduction,
                out=self.maps.gate_width,
                order=self.maps.gate_order(),
                detach=config.detach_gate_input,
            )
        self.out = nn.Linear(self.num_fields * (1 if config.residual else config.layers + 1), 1)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self._overlap: Tensor | None = None

    def encode_user(self, inputs: Inputs) -> UserState:
        if not self.num_request:
            return {}
        fields = slice(0, self.num_request)
        state = self._read(self.fields.request(inputs), fields)
        if self.maps is not None:
            state |= self.maps.read(state["rows"], fields)
        if self.gate is not None and self.config.gate_scope == "request":
            state["gate"] = self.gate(state["gate"])
        return state

    def encode_items(self, inputs: Inputs) -> Tensor:
        fields = slice(self.num_request, self.num_fields)
        state = self._read(self.fields.item(inputs), fields)
        if isinstance(self.maps, DGP):
            state |= self.maps.read(state["rows"], fields)
        return torch.cat([state[name].flatten(1) for name in self._row_shapes()], dim=1)

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        item = self._split(items_CW)
        if isinstance(self.maps, PIN):  # its part of W_l X_0 is L times as wide as the rows that it is made of
            item |= self.maps.read(item["rows"], slice(self.num_request, self.num_fields))
        rows_CWSF = item["rows"]
        if state:
            rows_CWSR = of_request(state["rows"], user_index, items_CW.shape[0])
            rows_CWSF = torch.cat([rows_CWSR, rows_CWSF], dim=-1)
        rows_CWP = rows_CWSF.flatten(2)
        shares_weights = isinstance(self.maps, DWP) and self.config.gate_scope == "request" and user_index is None
        if shares_weights and not (self.training or is_recording()):
            assert isinstance(self.maps, DWP)
            terms = self.maps.of_one_request(state["gate"], state["rows"], item["rows"])
            return self._read_out(rows_CWP, terms)
        read = {"rows": rows_CWP}
        for name in ("map", "gate"):
            if name in state and name in item:
                read[name] = of_request(state[name], user_index) + item[name]
            elif name in state:
                read[name] = of_request(state[name], user_index, items_CW.shape[0] if is_recording() else None)
            elif name in item:
                read[name] = item[name]
        return self._read_out(rows_CWP, self._terms(read))

    def _read(self, x_nGD: Tensor, fields: slice) -> UserState:
        """The crossed rows of these fields, and their part of the gates' first layers."""
        state = {"rows": cross(x_nGD, self.config.subspaces)}
        if self.gate is not None and fields.stop <= self.gate.num_fields:  # else a gate that reads the request alone
            state["gate"] = self.gate.read(x_nGD, fields)
        return state

    def _row_shapes(self) -> dict[str, tuple[int, ...]]:
        """What stands in an ad's row, side by side."""
        config = self.config
        width = config.emb_dim // config.subspaces
        shapes: dict[str, tuple[int, ...]] = {"rows": (width, config.subspaces, self.num_fields - self.num_request)}
        if isinstance(self.maps, DGP):
            shapes["map"] = (width, config.layers, config.kernel_size)
        if self.gate is not None and config.gate_scope == "all":
            shapes["gate"] = tuple(self.gate.squeeze_bias_LH.shape)
        return shapes

    def _split(self, items_CW: Tensor) -> UserState:
        shapes = self._row_shapes()
        parts = torch.split(items_CW, [math.prod(shape) for shape in shapes.values()], dim=1)
        return {
            name: torch.unflatten(part, 1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def _terms(self, read: UserState) -> tuple[Tensor, ...]:
        """t_1 .. t_L, each [C, W, P]."""
        if self.maps is None:
            return ()
        if self.gate is not None and self.config.gate_scope == "all":
            read["gate"] = self.gate(read["gate"])
        if isinstance(self.maps, DWP) and self.training and self.config.orth_lambda:
            before, mean = self.config.orth_on == "before", self.config.orth_reduction == "mean"
            self._overlap = self.maps.overlap(read["gate"], before=before, mean=mean)
        if is_recording():
            self.maps.show(read)
        terms: tuple[Tensor, ...] = self.maps(read)
        return terms

    def _read_out(self, x_CWP: Tensor, terms: tuple[Tensor, ...]) -> Tensor:
        """The logits [C], given X_0 and the terms t_1 .. t_L."""
        orders = [x_CWP]
        for t_CWP in terms:
            x_CWP = x_CWP * (1 + t_CWP) if self.config.residual else x_CWP * t_CWP
            orders.append(x_CWP)
        # A field has one weight in each order that is read, whatever the subspace and the place in it.
        kernel_OSF = self.out.weight.view(-1, 1, self.num_fields).expand(-1, self.config.subspaces, -1)
        read_CWX = torch.cat(orders[-1:] if self.config.residual else orders, dim=-1)
        if is_recording():
            contributions_CX = read_CWX.sum(dim=1) * kernel_OSF.flatten()
            record("field_contrib", torch.unflatten(contributions_CX, -1, (-1, self.num_fields)).sum(dim=1))
            record("bias", self.out.bias.squeeze())
        kernel_1X = kernel_OSF.reshape(1, -1).repeat(1, read_CWX.shape[1])
        return F.linear(read_CWX.flatten(1), kernel_1X, self.out.bias).squeeze(-1)

    def explanations(self) -> tuple[Explanation, ...]:
        fields = of_fields(self.fields.schema)
        meaning = "What each field's row of the last layer adds to the logit: with `bias`, exactly all of it."
        contributions = Explanation(name="field_contrib", axes=(CANDIDATE, fields), meaning=meaning)
        return (contributions, BIAS, *(self.maps.explanations(fields.labels or ()) if self.maps is not None else ()))

    def penalty(self) -> Tensor:
        """The tables' L2, and with `orth_lambda` how far dgp's or dwp's vectors are from orthogonal (section 5.4).

        dwp makes its vectors from the input: the term is that of the last batch scored in training mode.
        """
        penalty = self.fields.penalty(self.config.l2_emb)
        if isinstance(self.maps, DGP) and self.config.orth_lambda:
            overlap = self.maps.overlap(mean=self.config.orth_reduction == "mean")
            penalty = penalty + self.config.orth_lambda * overlap
        if self._overlap is not None:
            penalty = penalty + self.config.orth_lambda * self._overlap
        return penalty

    def __getstate__(self) -> dict[str, object]:
        # A copy is a model of its own: it scored no batch, and a tensor inside a graph cannot be copied.
        return {**self.__dict__, "_overlap": None}


class Maps(nn.Module):
    """The maps t_1 .. t_L, each [C, W, P], in two steps: what is linear in the fields, by fields, then the terms.

    What each kind of map defines for itself raises here.
    """

    gate_width = 0
    """How many numbers a layer's gate gives."""

    def gate_order(self) -> Tensor | None:
        """In which order the terms take these numbers, where it is not that of the gate's weights."""
        return None

    def read(self, rows_nWSG: Tensor, fields: slice) -> UserState:
        """`map`: the part of these fields in what is linear in all."""
        raise NotImplementedError

    def forward(self, read: UserState) -> tuple[Tensor, ...]:
        """The terms, given the `rows` [C, W, P], the `map` and the `gate` of each candidate.

        Gates that are alike for all candidates may come once, as [1, L, O].
        """
        raise NotImplementedError

    def shared_weights(self) -> Tensor:
        """The weights [L, P, P] of all rows, before a row scales them."""
        raise NotImplementedError

    def show(self, read: UserState) -> None:
        """Records what `explanations` promises."""
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

    def forward(self, read: UserState) -> tuple[Tensor, ...]:
        return read["map"].unbind(dim=2)

    def shared_weights(self) -> Tensor:
        return self.kernel_LPP

    def show(self, read: UserState) -> None:  # noqa: ARG002  # its weights are the same for all
        record("effective_weight", self.kernel_LPP)

    def explanations(self, fields: Sequence[str]) -> tuple[Explanation, ...]:
        layers, num_rows, _ = self.kernel_LPP.shape
        return (_effective_weight((numbered("layer", layers), *_rows(fields, num_rows))),)


class DA(PIN):
    """t_l = G_l * (W_l X_0) with G_l = 2 sigmoid(gate): the row's own emphasis on each product (D1)."""

    def __init__(self, layers: int, num_rows: int, *, subspaces: int, width: int, by_element: bool) -> None:
        super().__init__(layers, num_rows)
        self.subspaces, self.width, self.by_element = subspaces, width, by_element
        self.gate_width = num_rows // subspaces * width if by_element else num_rows

    def gate_order(self) -> Tensor | None:
        """By element the gate's weights go by fields, the products by crossed rows."""
        if not self.by_element:
            return None
        return cross(torch.arange(self.gate_width).view(1, -1, self.width), self.subspaces).flatten()

    def forward(self, read: UserState) -> tuple[Tensor, ...]:
        gate_CLZ = 2 * torch.sigmoid(read["gate"])  # Z: W * P by element, P by row
        gates = torch.unflatten(gate_CLZ, -1, (-1, self.kernel_LPP.shape[1])).unbind(dim=1)
        return tuple(gate * map_CWP for gate, map_CWP in zip(gates, read["map"].unbind(dim=2), strict=True))

    def show(self, read: UserState) -> None:
        gate_CLZ = 2 * torch.sigmoid(read["gate"])
        if self.by_element:  # back to [C, L, F, D]
            gate_CLWSF = torch.unflatten(gate_CLZ, -1, (self.width // self.subspaces, self.subspaces, -1))
            gate_CLZ = gate_CLWSF.permute(0, 1, 4, 3, 2).flatten(3)
        record("gate", gate_CLZ)

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

    def forward(self, read: UserState) -> tuple[Tensor, ...]:
        scaled_LCWK = (self._sigma(read["gate"]).unsqueeze(1) * read["map"]).permute(2, 0, 1, 3)
        terms_LXP = scaled_LCWK.flatten(1, 2) @ self.left_LKP
        return torch.unflatten(terms_LXP, 1, scaled_LCWK.shape[1:3]).unbind(dim=0)

    def shared_weights(self) -> Tensor:
        return self.left_LKP.transpose(1, 2) @ self.right_LKP

    def show(self, read: UserState) -> None:
        record("sigma", self._sigma(read["gate"]))
        weights_CLPP = (self.left_LKP.transpose(1, 2) * self._sigma(read["gate"]).unsqueeze(2)) @ self.right_LKP
        record("effective_weight", weights_CLPP)

    def _sigma(self, gate_nLK: Tensor) -> Tensor:
        return gate_nLK if self.linear else 2 * torch.sigmoid(gate_nLK)

    def explanations(self, fields: Sequence[str]) -> tuple[Explanation, ...]:
        layers, kernel_size, num_rows = self.left_LKP.shape
        axes = (CANDIDATE, numbered("layer", layers))
        meaning = "The strength this row gives each of the kernel's directions U_k V_k^T."
        sigma = Explanation(name="sigma", axes=(*axes, numbered("kernel", kernel_size)), meaning=meaning)
        return sigma, _effective_weight((*axes, *_rows(fields, num_rows)))

    def overlap(self, *, mean: bool) -> Tensor:
        """How far the columns of every U_l, and of every V_l, are from orthogonal: section 5.4.

        Of K columns of P numbers no more than P are orthogonal: with K > P each sum is at least (K^2 / P - K) / 2.
        """
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

    def forward(self, read: UserState) -> tuple[Tensor, ...]:
        u_LCKP, v_LCKP = (half.transpose(0, 1) for half in self.factors(read["gate"]))
        scaled_LCWKP = read["rows"].unsqueeze(2) * v_LCKP.unsqueeze(2)
        mapped_LXP = scaled_LCWKP.flatten(1, 3) @ self.kernel_LPP.transpose(1, 2)
        mapped_LCWKP = torch.unflatten(mapped_LXP, 1, scaled_LCWKP.shape[1:4])
        return (u_LCKP.unsqueeze(2) * mapped_LCWKP).sum(dim=3).unbind(dim=0)

    def of_one_request(self, gate_1LO: Tensor, rows_1WSR: Tensor, rows_CWSG: Tensor) -> tuple[Tensor, ...]:
        """The terms of candidates that have their gates in common, and so the weights [L, P, P]."""
        (weights_LPP,) = self._weights(gate_1LO)
        num_request = rows_1WSR.shape[-1]
        of_request_1WLP = apply_kernel(weights_LPP, rows_1WSR, slice(0, num_request))
        return (of_request_1WLP + apply_kernel(weights_LPP, rows_CWSG, slice(num_request, None))).unbind(dim=2)

    def shared_weights(self) -> Tensor:
        return self.kernel_LPP

    def show(self, read: UserState) -> None:
        u_CLKP, v_CLKP = self.factors(read["gate"])
        record("u", u_CLKP)
        record("v", v_CLKP)
        record("effective_weight", self._weights(read["gate"]))

    def _weights(self, gate_nLO: Tensor) -> Tensor:
        """G_l * W_l [n, L, P, P]."""
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

    def __init__(
        self,
        layers: int,
        num_fields: int,
        width: int,
        *,
        reduction: int,
        out: int,
        order: Tensor | None,
        detach: bool,
    ) -> None:
        """`order`: in which the gate's numbers come, where not in that of their weights."""
        super().__init__()
        self.num_fields, self.detach = num_fields, detach
        inner = max(1, num_fields * width // reduction)
        self.squeeze_LHX = _glorot(layers, inner, num_fields * width)
        self.squeeze_bias_LH = nn.Parameter(torch.zeros(layers, inner))
        self.excite_LHO = _glorot(layers, inner, out)
        self.excite_bias_LO = nn.Parameter(torch.zeros(layers, out))
        self.order: Tensor | None
        self.register_buffer("order", order, persistent=False)

    def read(self, x_nGD: Tensor, fields: slice) -> Tensor:
        """These fields' part in the first layer, [n, L, H]."""
        if self.detach:
            x_nGD = x_nGD.detach()
        weight_LHFD = torch.unflatten(self.squeeze_LHX, -1, (self.num_fields, -1))
        read_nX = F.linear(x_nGD.flatten(1), weight_LHFD[:, :, fields].flatten(2).flatten(0, 1))
        return torch.unflatten(read_nX, -1, self.squeeze_bias_LH.shape)

    def forward(self, read_nLH: Tensor) -> Tensor:
        """The gates [n, L, O], given the first layer's product."""
        excite_LHO, excite_bias_LO = self._excite()
        hidden_LnH = F.relu(read_nLH + self.squeeze_bias_LH).transpose(0, 1)
        return (hidden_LnH @ excite_LHO).transpose(0, 1) + excite_bias_LO

    @of_weights
    def _excite(self) -> tuple[Tensor, Tensor]:
        """The second layer's weights and biases, in the order of its numbers."""
        if self.order is None:
            return self.excite_LHO, self.excite_bias_LO
        return self.excite_LHO.index_select(2, self.order), self.excite_bias_LO.index_select(1, self.order)


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


def _maps(config: DynIntConfig, num_fields: int) -> Maps:
    layers, num_rows, rank = config.layers, num_fields * config.subspaces, config.latent_rank
    if config.mode == "pin":
        return PIN(layers, num_rows)
    if config.mode == "da":
        by_element = config.da_gate == "element"
        return DA(layers, num_rows, subspaces=config.subspaces, width=config.emb_dim, by_element=by_element)
    if config.mode == "dgp":
        return DGP(layers, num_rows, kernel_size=config.kernel_size, linear=config.dgp_sigma == "linear")
    return DWP(layers, num_rows, rank=rank, offset=1 / (math.sqrt(rank) if config.dwp_offset == "inv_sqrt" else rank))


def _truncated_normal(tensor: Tensor) -> None:
    """The authors' rule for tables: normal with deviation 1 / sqrt(D), cut at two deviations."""
    std = 1 / math.sqrt(tensor.shape[-1])
    nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


def _check_schema(config: DynIntConfig, num_request: int, num_fields: int) -> None:
    if not num_fields:
        raise ValueError("DynInt multiplies fields; the schema has none outside the history")
    if config.mode != "pin" and config.gate_scope == "request" and not num_request:
        raise ValueError("gate_scope request reads user and context fields; the schema has none")
