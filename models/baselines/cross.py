"""Explicit crosses beside an MLP: DCN, DCNv2 and xDeepFM."""

# U requests, C candidates, R request fields, I item fields, F = R + I (request's first), D embedding width
# X = F * D, Y = I * D, H first hidden layer, K rows of a CIN layer, Z inputs of a cross layer's last product; n: U, C

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.baselines.flat_model import DeepConfig, FlatModel, add_request
from models.baselines.linear import LR, LRConfig
from models.features.schema import Schema
from models.layers.base import Inputs, UserState
from models.layers.config import Count
from models.layers.folding import of_weights
from models.layers.initialisation import start_linears
from models.layers.request_matmul import dot_by_request, of_request
from models.layers.split_linear import SplitLinear, item_product, request_product


@dataclass(frozen=True, kw_only=True)
class DCNConfig(DeepConfig):
    cross_layers: Count = 3


@dataclass(frozen=True, kw_only=True)
class DCNv2Config(DeepConfig):
    cross_layers: Count = 3
    structure: Literal["parallel", "stacked"] = "parallel"  # the MLP beside the crosses, or after them
    rank: Count | None = None  # DCN-Mix: each W_l a mixture of experts of this rank
    experts: Count = 4  # with a rank


@dataclass(frozen=True, kw_only=True)
class XDeepFMConfig(DeepConfig):
    cin: tuple[Count, ...] = (64,)  # rows of each CIN layer

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cin:
            raise ValueError("option cin: expected at least one layer, got none")


class DCN(FlatModel):
    """x_{l+1} = x_0 (x_l^T w_l) + b_l + x_l, then a linear map of [x_L; MLP(e)].

    R. Wang et al., "Deep & Cross Network for Ad Click Predictions", ADKDD 2017.

    x_l = a_l x_0 + c_l with a number a_l and the sum c_l of the biases before it, so of a candidate only the numbers
    w_l^T x_0 and w_out^T x_0 are needed, and each is the request's part plus the item's.
    """

    def __init__(self, config: DCNConfig, schema: Schema) -> None:
        super().__init__(config, schema)
        widths = (self.request_width, self.item_width)
        layers = range(config.cross_layers)
        self.weights = nn.ModuleList(SplitLinear(*widths, 1, bias=False) for _ in layers)
        self.biases = nn.ParameterList(torch.zeros(sum(widths)) for _ in layers)
        self.deep = self.make_mlp(config)
        # x_L's columns of the last map; the MLP's logit brings the rest.
        self.out = SplitLinear(*widths, 1, bias=False)
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        fields_URD = self.request_fields(inputs)
        return {} if fields_URD is None else {"first": request_product(fields_URD.flatten(1), *self._first())}

    def encode_items(self, inputs: Inputs) -> Tensor:
        """[C, L + 1 + H]: the item's part of every w_l^T x_0, of w_out^T x_0 and of the MLP's first layer."""
        return item_product(self.fields.item(inputs).flatten(1), *self._first())

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        first_CW = add_request(items_CW, state, "first", user_index)
        *products, out_C1, deep_CH = torch.split(first_CW, [layer.out_features for layer in self._first()], dim=-1)
        scale_C1 = torch.ones_like(out_C1)
        *shifts, out_shift = self._shifts()
        for product_C1, shift in zip(products, shifts, strict=True):
            scale_C1 = scale_C1 + scale_C1 * product_C1 + shift
        crossed_C1 = scale_C1 * out_C1 + out_shift
        return crossed_C1.squeeze(-1) + self.deep.finish(deep_CH)

    @of_weights
    def _shifts(self) -> tuple[Tensor, ...]:
        """Every w_l^T c_l, and w_out^T c_L."""
        shift_X, shifts = torch.zeros_like(self.biases[0]), []
        for weight, bias_X in zip(self.weights, self.biases, strict=True):
            shifts.append(weight(shift_X))
            shift_X = shift_X + bias_X
        return (*shifts, self.out(shift_X))

    def _first(self) -> tuple[SplitLinear, ...]:
        """All that reads x_0."""
        weights = [layer for layer in self.weights if isinstance(layer, SplitLinear)]
        return (*weights, self.out, self.deep.first)


class DCNv2(FlatModel):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, then a linear map of [x_L; MLP(e)], or stacked: MLP(x_L).

    R. Wang et al., "DCN V2: Improved Deep & Cross Network", WWW 2021.

    The linear map w of the last layer's x_0 * (W x + b) is (w * x_0)^T (W x + b). Its request's rows are, with
    v = w_r * x_r, the dot product of x with v^T W_r, one vector per request: a candidate needs the item's rows only.
    """

    config: DCNv2Config

    def __init__(self, config: DCNv2Config, schema: Schema) -> None:
        super().__init__(config, schema)
        widths = (self.request_width, self.item_width)
        self.layers = nn.ModuleList(
            Cross(*widths, sum(widths)) if config.rank is None else Mixture(*widths, config.rank, config.experts)
            for _ in range(config.cross_layers)
        )
        self.deep = self.make_mlp(config)
        self.out = SplitLinear(*widths, 1, bias=False) if config.structure == "parallel" else None
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        """`fields` [U, R * D]; `first`, the request's part of all that reads x_0; `last` [U, Z] and `last_bias` [U]."""
        fields_URD = self.request_fields(inputs)
        if fields_URD is None:
            return {}
        x_UX = fields_URD.flatten(1)
        state = {"fields": x_UX, "first": request_product(x_UX, *self._first())}
        if self.out is not None and len(self.layers) > 1:
            last = self._cross(-1).last
            weighted_UX = self.out.part(0) * x_UX
            state["last"] = weighted_UX @ last.weight[: self.request_width]
            state["last_bias"] = weighted_UX @ last.bias[: self.request_width]
        return state

    def encode_items(self, inputs: Inputs) -> Tensor:
        """[C, Y + ...]: the embeddings; the item's part of all that reads x_0."""
        x_CY = self.fields.item(inputs).flatten(1)
        return torch.cat([x_CY, item_product(x_CY, *self._first())], dim=-1)

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        first_width = sum(layer.out_features for layer in self._cross(0).first)
        deep_width = self.deep.first.out_features if self.out is not None else 0
        x_CY, first_CW = torch.split(items_CW, [self.item_width, first_width + deep_width], dim=-1)
        first_CW = add_request(first_CW, state, "first", user_index)
        x0_CX = self.join(state, x_CY, user_index)
        if self.out is None:
            x_CX = self._crossed(x0_CX, first_CW, len(self.layers))
            logits_C: Tensor = self.deep(x_CX)
            return logits_C
        first_CW, deep_CH = torch.split(first_CW, [first_width, deep_width], dim=-1)
        x_CX = self._crossed(x0_CX, first_CW, max(len(self.layers) - 1, 1))
        crossed_C: Tensor = self.out(x_CX).squeeze(-1)
        if len(self.layers) > 1:
            crossed_C = crossed_C + self._last_cross(state, x_CX, x_CY, user_index)
        return crossed_C + self.deep.finish(deep_CH)

    def _first(self) -> tuple[SplitLinear, ...]:
        """All that reads x_0."""
        return self._cross(0).first if self.out is None else (*self._cross(0).first, self.deep.first)

    def _crossed(self, x0_CX: Tensor, first_CW: Tensor, num_layers: int) -> Tensor:
        """X after so many layers; `first` is what the first of them makes of x_0."""
        x_CX = x0_CX * self._cross(0).finish(first_CW) + x0_CX
        for layer in range(1, num_layers):
            x_CX = x0_CX * self._cross(layer)(x_CX) + x_CX
        return x_CX

    def _last_cross(self, state: UserState, x_CX: Tensor, x_CY: Tensor, user_index: Tensor | None) -> Tensor:
        """What the linear map makes of the last layer's x_0 * (W x + b)."""
        assert self.out is not None
        layer = self._cross(-1)
        z_CZ, last = layer.last_input(x_CX), layer.last
        rows_CY = F.linear(z_CZ, last.weight[self.request_width :], last.bias[self.request_width :])
        crossed_C = (self.out.part(1) * x_CY * rows_CY).sum(dim=-1)
        if "last" not in state:
            return crossed_C
        return crossed_C + dot_by_request(z_CZ, state["last"], user_index) + of_request(state["last_bias"], user_index)

    def _cross(self, index: int) -> "Cross | Mixture":
        layer = self.layers[index]
        assert isinstance(layer, Cross | Mixture)
        return layer


class Cross(SplitLinear):
    """W x + b, in the parts that `Mixture` has."""

    @property
    def first(self) -> tuple[SplitLinear, ...]:
        """The layers that read x."""
        return (self,)

    @property
    def last(self) -> nn.Linear:
        """The layer that gives the output."""
        return self

    def finish(self, first_CX: Tensor) -> Tensor:
        """The output, of what `first` gives."""
        return first_CX

    def last_input(self, x_CX: Tensor) -> Tensor:
        """What `last` reads."""
        return x_CX


class Mixture(nn.Module):
    """DCN-Mix's W_l x + b_l: sum_k g_k U_k tanh(C_k tanh(V_k^T x)) + b with g = softmax(G x), section 3.3."""

    def __init__(self, request_width: int, item_width: int, rank: int, experts: int) -> None:
        super().__init__()
        self.experts, self.rank = experts, rank
        self.gate = SplitLinear(request_width, item_width, experts, bias=False)
        self.into = SplitLinear(request_width, item_width, experts * rank, bias=False)  # V of every expert
        self.within = nn.ModuleList(nn.Linear(rank, rank, bias=False) for _ in range(experts))
        self.out_of = nn.Linear(experts * rank, request_width + item_width)  # U of every expert, and b

    def forward(self, x_CX: Tensor) -> Tensor:
        out_CX: Tensor = self.out_of(self.last_input(x_CX))
        return out_CX

    @property
    def first(self) -> tuple[SplitLinear, ...]:
        return (self.gate, self.into)

    @property
    def last(self) -> nn.Linear:
        return self.out_of

    def finish(self, first_CW: Tensor) -> Tensor:
        out_CX: Tensor = self.out_of(
            self._mix(*torch.split(first_CW, [self.experts, self.experts * self.rank], dim=-1))
        )
        return out_CX

    def last_input(self, x_CX: Tensor) -> Tensor:
        return self._mix(self.gate(x_CX), self.into(x_CX))

    def _mix(self, gate_CE: Tensor, into_CZ: Tensor) -> Tensor:
        """g_k tanh(C_k tanh(V_k^T x)) of every expert, side by side."""
        low_ECR = torch.tanh(torch.unflatten(into_CZ, -1, (self.experts, self.rank)).transpose(0, 1))
        low_CER = torch.tanh(low_ECR @ self._within()).transpose(0, 1)
        return (gate_CE.softmax(dim=-1).unsqueeze(-1) * low_CER).flatten(1)

    @of_weights
    def _within(self) -> Tensor:
        """C of every expert, transposed."""
        return torch.stack([layer.get_parameter("weight").T for layer in self.within])


class XDeepFM(FlatModel):
    """LR + CIN + MLP. J. Lian et al., "xDeepFM", KDD 2018.

    Compressed interaction network: X^k_h = sum_ij W^{k,h}_ij (X^{k-1}_i * X^0_j), and a linear map of every layer's
    rows summed over D. No activation and no split between layers, as the paper's best and the benchmarks' are.

    Of the last layer only the map's sum is needed, sum_ij V_ij <X_i, X^0_j> with V = sum_h w_h W^h. Where it is the
    only one, X being X^0, the sum splits into pairs within the request, within the item, and across:
    <q_j, e_j> with q_j = sum_i (V_ij + V_ji) r_i, made once per request.
    """

    config: XDeepFMConfig

    def __init__(self, config: XDeepFMConfig, schema: Schema) -> None:
        super().__init__(config, schema)
        self.linear = LR(LRConfig(use_history=config.use_history, l2_emb=config.l2_emb), schema)
        rows = (self.num_fields, *config.cin)
        self.layers = nn.ModuleList(
            nn.Linear(this * self.num_fields, following, bias=False) for this, following in pairwise(rows)
        )
        self.deep = self.make_mlp(config)
        self.out = nn.Linear(sum(config.cin), 1, bias=False)
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        """`first_order` [U], `deep` [U, H]; `across` [U, I * D] for one CIN layer, `fields` [U, R, D] for more."""
        state, fields_URD = self.linear.encode_user(inputs), self.request_fields(inputs)
        if fields_URD is None:
            return state
        state["deep"] = self.deep.first.request(fields_URD.flatten(1))
        if len(self.layers) > 1:
            return state | {"fields": fields_URD}
        within_RR, across_IR = self._request_pairs()
        state["first_order"] = state["first_order"] + _pairs(within_RR, fields_URD, fields_URD)
        return state | {"across": (across_IR @ fields_URD).flatten(1)}

    def encode_items(self, inputs: Inputs) -> Tensor:
        """[C, 1 + Y + H]: LR's row, with the pairs within the item for one CIN layer; embeddings; MLP."""
        items_CID, first_order_C1 = self.fields.item(inputs), self.linear.encode_items(inputs)
        if len(self.layers) == 1:
            within_II = self._last_pairs()[self.num_request :, self.num_request :]
            first_order_C1 = first_order_C1 + _pairs(within_II, items_CID, items_CID).unsqueeze(-1)
        x_CY = items_CID.flatten(1)
        return torch.cat([first_order_C1, x_CY, self.deep.first.item(x_CY)], dim=-1)

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        widths = [1, self.item_width, self.deep.first.out_features]
        first_order_C1, x_CY, deep_CH = torch.split(items_CW, widths, dim=-1)
        logits_C = self.linear.score(state, first_order_C1, user_index)
        logits_C = logits_C + self.deep.finish(add_request(deep_CH, state, "deep", user_index))
        if len(self.layers) > 1:
            return logits_C + self._compressed(state, x_CY, user_index)
        return logits_C + dot_by_request(x_CY, state["across"], user_index) if "across" in state else logits_C

    def _compressed(self, state: UserState, x_CY: Tensor, user_index: Tensor | None) -> Tensor:
        """The linear map of all CIN layers' rows, summed over D."""
        items_CID = torch.unflatten(x_CY, -1, (self.num_item, self.config.emb_dim))
        x0_CFD = self.join(state, items_CID, user_index)
        *weights_K, _ = torch.split(self.out.weight[0], list(self.config.cin))
        x_CKD, sums = x0_CFD, []
        for layer, weight_K in zip(self.layers, weights_K, strict=False):
            pairs_CKFD = x_CKD.unsqueeze(2) * x0_CFD.unsqueeze(1)
            # One matrix product, as layer(pairs) is: the pairs are its columns, D and C its rows.
            x_CKD = layer(pairs_CKFD.flatten(1, 2).transpose(1, 2)).transpose(1, 2)
            sums.append(x_CKD.sum(dim=-1) @ weight_K)
        return torch.stack([*sums, _pairs(self._last_pairs().T, x0_CFD, x_CKD)]).sum(dim=0)

    @of_weights
    def _request_pairs(self) -> tuple[Tensor, Tensor]:
        """V [R, R] within the request, and what it has across, item by request: [I, R]."""
        pairs_FF, num_request = self._last_pairs(), self.num_request
        across_IR = pairs_FF[num_request:, :num_request] + pairs_FF[:num_request, num_request:].T
        return pairs_FF[:num_request, :num_request], across_IR

    @of_weights
    def _last_pairs(self) -> Tensor:
        """V [rows of the layer before, F]."""
        num_rows = self.config.cin[-1]
        pairs_X = self.out.weight[0, -num_rows:] @ self.layers[-1].get_parameter("weight")
        return pairs_X.view(-1, self.num_fields)

    def penalty(self) -> Tensor:
        return super().penalty() + self.linear.penalty()


def _pairs(matrix_FK: Tensor, left_nFD: Tensor, right_nKD: Tensor) -> Tensor:
    """sum_ij M_ij <left_i, right_j>: [n]."""
    return (left_nFD * (matrix_FK @ right_nKD)).sum(dim=(1, 2))
