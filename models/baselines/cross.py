"""Explicit crosses beside an MLP: DCN, DCNv2 and xDeepFM."""

# U requests, C candidates, F flat fields (request's first), D embedding width, X = F * D, K rows of a CIN layer

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from models.baselines.flat_model import Deep, DeepConfig, FlatModel
from models.baselines.linear import LR, LRConfig
from models.features.schema import Schema
from models.layers.base import Inputs, UserState
from models.layers.config import Count
from models.layers.initialisation import start_linears


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
    """

    def __init__(self, config: DCNConfig, schema: Schema) -> None:
        super().__init__(config, schema)
        width = self.num_fields * config.emb_dim
        self.weights = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(config.cross_layers))
        self.biases = nn.ParameterList(torch.zeros(width) for _ in range(config.cross_layers))
        self.deep = Deep(self, config)
        self.out = nn.Linear(width, 1, bias=False)  # x_L's columns of the last map; the MLP's logit brings the rest
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        state = self.look_up(inputs)
        return state | self.deep.read(state)

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        user_index, items = inputs["user_index"], self.fields.group("item", inputs)
        x0_CX = self.join(state, items, user_index).flatten(1)
        x_CX = x0_CX
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x_CX = x0_CX * weight(x_CX) + bias + x_CX
        crossed_C: Tensor = self.out(x_CX).squeeze(-1)
        return crossed_C + self.deep.score(state, items, user_index)


class DCNv2(FlatModel):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, then a linear map of [x_L; MLP(e)], or stacked: MLP(x_L).

    R. Wang et al., "DCN V2: Improved Deep & Cross Network", WWW 2021.
    """

    config: DCNv2Config

    def __init__(self, config: DCNv2Config, schema: Schema) -> None:
        super().__init__(config, schema)
        width = self.num_fields * config.emb_dim
        self.layers = nn.ModuleList(
            nn.Linear(width, width) if config.rank is None else Mixture(width, config.rank, config.experts)
            for _ in range(config.cross_layers)
        )
        self.deep = Deep(self, config)
        self.out = nn.Linear(width, 1, bias=False) if config.structure == "parallel" else None
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        state = self.look_up(inputs)
        return state | self.deep.read(state) if self.config.structure == "parallel" else state

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        user_index, items = inputs["user_index"], self.fields.group("item", inputs)
        x0_CX = self.join(state, items, user_index).flatten(1)
        x_CX = x0_CX
        for layer in self.layers:
            x_CX = x0_CX * layer(x_CX) + x_CX
        if self.out is None:
            logits_C: Tensor = self.deep(x_CX)
            return logits_C
        crossed_C: Tensor = self.out(x_CX).squeeze(-1)
        return crossed_C + self.deep.score(state, items, user_index)


class Mixture(nn.Module):
    """DCN-Mix's W_l x + b_l: sum_k g_k U_k tanh(C_k tanh(V_k^T x)) + b with g = softmax(G x), section 3.3."""

    def __init__(self, width: int, rank: int, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.gate = nn.Linear(width, experts, bias=False)
        self.into = nn.Linear(width, experts * rank, bias=False)  # V of every expert
        self.within = nn.ModuleList(nn.Linear(rank, rank, bias=False) for _ in range(experts))
        self.out_of = nn.Linear(experts * rank, width)  # U of every expert, and b

    def forward(self, x_CX: Tensor) -> Tensor:
        gates = self.gate(x_CX).softmax(dim=-1).chunk(self.experts, dim=-1)
        parts = torch.tanh(self.into(x_CX)).chunk(self.experts, dim=-1)
        mixed = [g * torch.tanh(within(x)) for g, within, x in zip(gates, self.within, parts, strict=True)]
        out_CX: Tensor = self.out_of(torch.cat(mixed, dim=-1))
        return out_CX


class XDeepFM(FlatModel):
    """LR + CIN + MLP. J. Lian et al., "xDeepFM", KDD 2018.

    Compressed interaction network: X^k_h = sum_ij W^{k,h}_ij (X^{k-1}_i * X^0_j), and a linear map of every layer's
    rows summed over D. No activation and no split between layers, as the paper's best and the benchmarks' are.
    """

    def __init__(self, config: XDeepFMConfig, schema: Schema) -> None:
        super().__init__(config, schema)
        self.linear = LR(LRConfig(use_history=config.use_history, l2_emb=config.l2_emb), schema)
        rows = (self.num_fields, *config.cin)
        self.layers = nn.ModuleList(
            nn.Linear(this * self.num_fields, following, bias=False) for this, following in pairwise(rows)
        )
        self.deep = Deep(self, config)
        self.out = nn.Linear(sum(config.cin), 1, bias=False)
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        state = self.look_up(inputs)
        return state | self.deep.read(state) | self.linear.encode_user(inputs)

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        user_index, items = inputs["user_index"], self.fields.group("item", inputs)
        x0_CFD = self.join(state, items, user_index)
        x_CKD, pooled = x0_CFD, []
        for layer in self.layers:
            pairs_CKFD = x_CKD.unsqueeze(2) * x0_CFD.unsqueeze(1)
            # One matrix product, as layer(pairs) is: the pairs are its columns, D and C its rows.
            x_CKD = layer(pairs_CKFD.flatten(1, 2).transpose(1, 2)).transpose(1, 2)
            pooled.append(x_CKD.sum(dim=-1))
        crossed_C: Tensor = self.out(torch.cat(pooled, dim=1)).squeeze(-1)
        return crossed_C + self.linear.score(state, inputs) + self.deep.score(state, items, user_index)

    def penalty(self) -> Tensor:
        return super().penalty() + self.linear.penalty()
