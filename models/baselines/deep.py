"""An MLP beside the linear model: Wide & Deep, and with all pairs DeepFM."""

# U requests, C candidates, F flat fields (request's first), D embedding width; n: U or C

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.baselines.flat_model import Deep, DeepConfig, FlatModel
from models.baselines.linear import LR, LRConfig
from models.features.schema import Schema
from models.layers.base import CTRModel, Inputs, UserState
from models.layers.embeddings import FieldEmbeddings
from models.layers.initialisation import start_linears, tiny_normal
from models.layers.mlp import MLP


@dataclass(frozen=True, kw_only=True)
class WideDeepConfig(DeepConfig):
    """The wide part is the plain linear model: crossed columns, if any, are fields of the data."""


@dataclass(frozen=True, kw_only=True)
class DeepFMConfig(DeepConfig):
    pass


class WideDeep(FlatModel):
    """LR + MLP. H.-T. Cheng et al., "Wide & Deep Learning for Recommender Systems", DLRS 2016."""

    def __init__(self, config: WideDeepConfig, schema: Schema) -> None:
        super().__init__(config, schema)
        self.linear = LR(LRConfig(use_history=config.use_history, l2_emb=config.l2_emb), schema)
        self.deep = Deep(self, config)
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        return self.linear.encode_user(inputs) | self.deep.read(self.look_up(inputs))

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        items = self.fields.group("item", inputs)
        return self.linear.score(state, inputs) + self.deep.score(state, items, inputs["user_index"])

    def penalty(self) -> Tensor:
        return super().penalty() + self.linear.penalty()


class DeepFM(CTRModel):
    """LR + FM + MLP over the same embeddings. H. Guo et al., "DeepFM", IJCAI 2017.

    FM's pairs are half of (sum e)^2 - sum e^2, and both sums, like the MLP's first layer, split by fields.
    """

    def __init__(self, config: DeepFMConfig, schema: Schema) -> None:
        super().__init__()
        self.config = config
        self.linear = LR(LRConfig(use_history=config.use_history, l2_emb=config.l2_emb), schema)
        self.fields = FieldEmbeddings(schema, config.emb_dim, init=tiny_normal)
        flat = [f for f in schema.fields if f.group != "behaviour" or config.use_history]
        self.mlp = MLP(len(flat) * config.emb_dim, config.hidden, dropout=config.dropout, batch_norm=config.batch_norm)
        self.request_width = sum(f.group != "item" for f in flat) * config.emb_dim
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        state = self.linear.encode_user(inputs)
        fields = self.fields.request(inputs, use_history=self.config.use_history)
        if fields:
            state |= self._read(torch.stack(fields, dim=1), self.mlp.first.weight[:, : self.request_width])
        return state

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        user_index = inputs["user_index"]
        parts = (
            [{name: state[name].index_select(0, user_index) for name in ("sum", "squares", "deep")}]
            if "sum" in state
            else []
        )
        items = self.fields.group("item", inputs)
        if items:
            parts.append(self._read(torch.stack(items, dim=1), self.mlp.first.weight[:, self.request_width :]))
        total = {name: torch.stack([part[name] for part in parts]).sum(dim=0) for name in parts[0]}
        pairs_C = (total["sum"].square() - total["squares"]).sum(dim=-1) / 2
        return self.linear.score(state, inputs) + pairs_C + self.mlp.finish(total["deep"] + self.mlp.first.bias)

    def penalty(self) -> Tensor:
        return self.fields.penalty(self.config.l2_emb) + self.linear.penalty()

    def _read(self, fields_nFD: Tensor, weight: Tensor) -> UserState:
        return {
            "sum": fields_nFD.sum(dim=1),
            "squares": fields_nFD.square().sum(dim=1),
            "deep": F.linear(fields_nFD.flatten(1), weight),
        }
