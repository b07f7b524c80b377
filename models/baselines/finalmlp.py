"""FinalMLP: K. Mao et al., "FinalMLP: An Enhanced Two-Stream MLP Model for CTR Prediction".

AAAI 2023, arXiv 2304.00902.
"""

# U requests, C candidates, F flat fields (request's first), D embedding width, X = F * D, H heads
# A, B widths of the two streams' outputs; n: 1, U or C

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from models.baselines.flat_model import FlatConfig, FlatModel
from models.features.field import Group
from models.features.schema import Schema
from models.layers.base import Inputs, UserState
from models.layers.config import Count, Share
from models.layers.embeddings import FieldEmbeddings
from models.layers.initialisation import start_linears, tiny_normal

Context: TypeAlias = Literal["off", "learned", "user", "context", "item"]


@dataclass(frozen=True, kw_only=True)
class FinalMLPConfig(FlatConfig):
    """The tables that `l2_emb` holds are the gates' too."""

    hidden_1: tuple[Count, ...] = (400, 400)
    hidden_2: tuple[Count, ...] = (400, 400)
    batch_norm: bool = False
    dropout: Share = 0.0
    heads: Count = 1
    gate_1: Context = "learned"  # what decides on stream 1's features: a group of fields, or a vector of its own
    gate_2: Context = "learned"  # off: no feature selection, the paper's ablation
    gate_hidden: tuple[Count, ...] = (64,)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, hidden in (("hidden_1", self.hidden_1), ("hidden_2", self.hidden_2)):
            if not hidden:
                raise ValueError(f"option {name}: expected at least one layer, got none")
            if hidden[-1] % self.heads:
                raise ValueError(f"option heads: {self.heads} do not divide the last layer of {name}, {hidden[-1]}")


class FinalMLP(FlatModel):
    """Two MLPs over gated features, o_k = MLP_k(g_k * e) with g_k = 2 sigmoid(MLP(ctx_k)), and a bilinear fusion.

    z = b + w_1^T o_1 + w_2^T o_2 + sum_h o_1h^T W_h o_2h. A gate of the request's fields is computed once per request.
    """

    config: FinalMLPConfig

    def __init__(self, config: FinalMLPConfig, schema: Schema) -> None:
        super().__init__(config, schema)
        width = self.num_fields * config.emb_dim
        self.gates = nn.ModuleDict()
        for name, context in (("gate_1", config.gate_1), ("gate_2", config.gate_2)):
            if context != "off":
                self.gates[name] = Gate(config, None if context == "learned" else context, schema, width)
        self.stream_1 = _layers(width, config.hidden_1, config)
        self.stream_2 = _layers(width, config.hidden_2, config)
        first, second = config.hidden_1[-1], config.hidden_2[-1]
        self.out_1 = nn.Linear(first, 1)
        self.out_2 = nn.Linear(second, 1, bias=False)
        self.fusion = nn.Parameter(torch.empty(config.heads, first // config.heads, second // config.heads))
        # FuxiCTR's start: Xavier's rule for the whole tensor as one column.
        nn.init.normal_(self.fusion, std=math.sqrt(2 / (self.fusion.numel() + 1)))
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        state = self.look_up(inputs)
        for name, gate in self.gates.items():
            if gate.group in ("user", "context"):
                state[name] = gate(inputs)
        return state

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        x_CX = self.join(state, self.fields.group("item", inputs), inputs["user_index"]).flatten(1)
        one_CA: Tensor = self.stream_1(self._gated("gate_1", x_CX, state, inputs))
        two_CB: Tensor = self.stream_2(self._gated("gate_2", x_CX, state, inputs))
        one_HCa = torch.unflatten(one_CA, -1, (self.config.heads, -1)).transpose(0, 1)
        two_HCb = torch.unflatten(two_CB, -1, (self.config.heads, -1)).transpose(0, 1)
        fused_C = ((one_HCa @ self.fusion) * two_HCb).sum(dim=-1).sum(dim=0)
        linear_C1: Tensor = self.out_1(one_CA) + self.out_2(two_CB)
        return linear_C1.squeeze(-1) + fused_C

    def penalty(self) -> Tensor:
        tables = [module for module in self.modules() if isinstance(module, FieldEmbeddings)]
        return torch.stack([fields.penalty(self.config.l2_emb) for fields in tables]).sum()

    def _gated(self, name: str, x_CX: Tensor, state: UserState, inputs: Inputs) -> Tensor:
        if name not in self.gates:
            return x_CX
        if name in state:
            return x_CX * state[name].index_select(0, inputs["user_index"])
        gate_nX: Tensor = self.gates[name](inputs)
        return x_CX * gate_nX


class Gate(nn.Module):
    """g = 2 sigmoid(MLP(ctx)): a weight for each number of e. Context fields have tables of the gate's own."""

    def __init__(self, config: FinalMLPConfig, group: Group | None, schema: Schema, width: int) -> None:
        """`group`: the fields that are the context; None for one learned vector."""
        super().__init__()
        self.group = group
        num_fields = 1
        if group is None:
            self.vector = nn.Parameter(torch.zeros(1, config.emb_dim))
        else:
            fields = schema.group(group)
            if not fields:
                raise ValueError(f"a gate reads {group} fields and the schema has none; set it to learned")
            read = Schema(user_key=None, item_key=None, history_length=0, fields=fields)
            self.fields = FieldEmbeddings(read, config.emb_dim, init=tiny_normal)
            num_fields = len(fields)
        widths = (num_fields * config.emb_dim, *config.gate_hidden)
        self.hidden = nn.Sequential()
        for this, following in pairwise(widths):
            self.hidden.extend([nn.Linear(this, following), nn.ReLU()])
        self.out = nn.Linear(widths[-1], width)

    def forward(self, inputs: Inputs) -> Tensor:
        if self.group is None:
            context_nD: Tensor = self.vector
        else:
            context_nD = torch.cat(self.fields.group(self.group, inputs), dim=1)
        gate_nX: Tensor = 2 * torch.sigmoid(self.out(self.hidden(context_nD)))
        return gate_nX


def _layers(width: int, hidden: Sequence[int], config: FinalMLPConfig) -> nn.Sequential:
    layers = nn.Sequential()
    for this, following in pairwise((width, *hidden)):
        layers.append(nn.Linear(this, following))
        if config.batch_norm:
            layers.append(nn.BatchNorm1d(following))
        layers.extend([nn.ReLU(), nn.Dropout(config.dropout)])
    return layers
