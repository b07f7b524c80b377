"""FinalMLP: K. Mao et al., "FinalMLP: An Enhanced Two-Stream MLP Model for CTR Prediction".

AAAI 2023, arXiv 2304.00902.
"""

# U requests, C candidates, R request fields, I item fields, D embedding width, Z = R * D, Y = I * D, X = Z + Y
# A, B widths of the two streams' outputs, H heads or a first layer's width; n: 1, U or C

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from models.baselines.flat_model import FlatConfig, FlatModel, add_request
from models.features.field import Group
from models.features.schema import Schema
from models.layers.base import Inputs, UserState
from models.layers.config import Count, Share
from models.layers.embeddings import FieldEmbeddings
from models.layers.folding import of_weights
from models.layers.initialisation import start_linears, tiny_normal
from models.layers.request_matmul import of_request
from models.layers.split_linear import SplitLinear

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

    z = b + w_1^T o_1 + w_2^T o_2 + sum_h o_1h^T W_h o_2h.

    A first layer is W_r (g_r * e_r) + W_i (g_i * e_i) + b. Each product is made once per request or once per ad where
    its gate permits: always with a learned gate or none; a gate of the request's fields leaves W_i (g_i * e_i) to
    every candidate, one of the item's fields W_r (g_r * e_r).
    """

    config: FinalMLPConfig

    def __init__(self, config: FinalMLPConfig, schema: Schema) -> None:
        super().__init__(config, schema)
        sides = {"user": "request", "context": "request", "item": "item", "learned": "nothing", "off": "nothing"}
        self.deciding = {
            k: sides[context] for k, context in ((1, config.gate_1), (2, config.gate_2))
        }  # on stream k's gate
        self.gates = nn.ModuleDict()
        for name, context in (("gate_1", config.gate_1), ("gate_2", config.gate_2)):
            if context != "off":
                width = self.request_width + self.item_width
                self.gates[name] = Gate(config, None if context == "learned" else context, schema, width)
        self.stream_1 = self._layers(config.hidden_1)
        self.stream_2 = self._layers(config.hidden_2)
        first, second = config.hidden_1[-1], config.hidden_2[-1]
        self.out_1 = nn.Linear(first, 1)
        self.out_2 = nn.Linear(second, 1, bias=False)
        self.fusion = nn.Parameter(torch.empty(config.heads, first // config.heads, second // config.heads))
        # FuxiCTR's start: Xavier's rule for the whole tensor as one column.
        nn.init.normal_(self.fusion, std=math.sqrt(2 / (self.fusion.numel() + 1)))
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        """By stream k: `first_k` [U, H], the request's part of its first layer, and `gate_k` [U, Y] if the request
        gates the item's features. `fields` [U, Z] if an item gates the request's.
        """
        fields_URD = self.request_fields(inputs)
        if fields_URD is None:
            return {}
        x_UZ, state = fields_URD.flatten(1), {}
        for k, deciding in self.deciding.items():
            if deciding == "item":
                state["fields"] = x_UZ
                continue
            gate_nX = self._gate(k, inputs)
            state[f"first_{k}"] = self._first(k).request(x_UZ * gate_nX[:, : self.request_width])
            if deciding == "request":
                state[f"gate_{k}"] = gate_nX[:, self.request_width :]
        return state

    def encode_items(self, inputs: Inputs) -> Tensor:
        """[C, W], by stream: the item's part of its first layer and, if the item gates the request's features, their
        gate; the embeddings if the request gates the item's.
        """
        x_CY = self.fields.item(inputs).flatten(1)
        parts = []
        for k, deciding in self.deciding.items():
            if deciding == "request":
                parts.append(x_CY)
                continue
            gate_nX = self._gate(k, inputs)
            parts.append(self._first(k).item(x_CY * gate_nX[:, self.request_width :]))
            if deciding == "item":
                parts.append(gate_nX[:, : self.request_width])
        return torch.cat(parts, dim=-1)

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        parts, outputs = iter(torch.split(items_CW, self._widths(), dim=-1)), []
        for k, deciding in self.deciding.items():
            z_CH = next(parts)
            if deciding == "request":
                z_CH = self._first(k).item(z_CH * of_request(state[f"gate_{k}"], user_index))
            if deciding == "item":
                gate_CZ = next(parts)
                if "fields" in state:
                    z_CH = z_CH + self._first(k).request(gate_CZ * of_request(state["fields"], user_index))
            z_CH = add_request(z_CH, state, f"first_{k}", user_index)
            outputs.append(self._stream(k)[1:](z_CH))
        return self._fuse(*outputs)

    def _widths(self) -> list[int]:
        """Of the parts of an item row."""
        widths = []
        for k, deciding in self.deciding.items():
            widths.append(self.item_width if deciding == "request" else self._first(k).out_features)
            if deciding == "item":
                widths.append(self.request_width)
        return widths

    def _fuse(self, one_CA: Tensor, two_CB: Tensor) -> Tensor:
        one_HCa = torch.unflatten(one_CA, -1, (self.config.heads, -1)).transpose(0, 1)
        two_HCb = torch.unflatten(two_CB, -1, (self.config.heads, -1)).transpose(0, 1)
        fused_C = ((one_HCa @ self.fusion) * two_HCb).sum(dim=-1).sum(dim=0)
        linear_C1: Tensor = self.out_1(one_CA) + self.out_2(two_CB)
        return linear_C1.squeeze(-1) + fused_C

    def penalty(self) -> Tensor:
        tables = [module for module in self.modules() if isinstance(module, FieldEmbeddings)]
        return torch.stack([fields.penalty(self.config.l2_emb) for fields in tables]).sum()

    def _gate(self, k: int, inputs: Inputs) -> Tensor:
        """Stream k's gate [n, X]; ones if it has none."""
        if self.deciding[k] == "nothing":
            return self._fixed_gate(k)
        gate_nX: Tensor = self.gates[f"gate_{k}"](inputs)
        return gate_nX

    @of_weights
    def _fixed_gate(self, k: int) -> Tensor:
        if f"gate_{k}" not in self.gates:
            return self.out_1.weight.new_ones(1, self.request_width + self.item_width)
        gate_1X: Tensor = self.gates[f"gate_{k}"]({})
        return gate_1X

    def _stream(self, k: int) -> nn.Sequential:
        return self.stream_1 if k == 1 else self.stream_2

    def _first(self, k: int) -> SplitLinear:
        layer = self._stream(k)[0]
        assert isinstance(layer, SplitLinear)
        return layer

    def _layers(self, hidden: Sequence[int]) -> nn.Sequential:
        layers = nn.Sequential()
        for width, following in pairwise((0, *hidden)):
            linear = (
                nn.Linear(width, following) if width else SplitLinear(self.request_width, self.item_width, following)
            )
            layers.append(linear)
            if self.config.batch_norm:
                layers.append(nn.BatchNorm1d(following))
            layers.extend([nn.ReLU(), nn.Dropout(self.config.dropout)])
        return layers


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
            self.fields = FieldEmbeddings(schema, config.emb_dim, init=tiny_normal, fields=fields)
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
            read = self.fields.item if self.group == "item" else self.fields.request
            context_nD = read(inputs).flatten(1)
        gate_nX: Tensor = 2 * torch.sigmoid(self.out(self.hidden(context_nD)))
        return gate_nX
