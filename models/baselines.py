"""The models the papers compare with: logistic regression and DeepFM (models.md section 7)."""

# U requests, C candidates, F flat fields (request's first), D embedding width

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import MLP, CTRModel, FieldEmbeddings, Inputs, UserState, start_linears, tiny_normal
from models.config import Config, Count, Share, Weight
from models.schema import Schema


@dataclass(frozen=True, kw_only=True)
class LRConfig(Config):
    use_history: bool = False  # pool each sequence field into one more flat field
    l2_emb: Weight = 0.0  # (weight / 2) * sum of squares of the weights


@dataclass(frozen=True, kw_only=True)
class DeepFMConfig(Config):
    emb_dim: Count = 16
    hidden: tuple[Count, ...] = (400, 400)
    batch_norm: bool = False
    dropout: Share = 0.0
    use_history: bool = True  # pool each sequence field into one more flat field, where the schema has any
    l2_emb: Weight = 0.0  # (weight / 2) * sum of squares of the tables and first-order weights


class LR(CTRModel):
    """z = b + sum_j w_{x_j}."""

    def __init__(self, config: LRConfig, schema: Schema) -> None:
        super().__init__()
        self.config = config
        self.fields = FieldEmbeddings(schema, 1, init=tiny_normal)
        self.bias = nn.Parameter(torch.zeros(1))

    def encode_user(self, inputs: Inputs) -> UserState:
        fields = _request_fields(self.fields, inputs, use_history=self.config.use_history)
        return {"sum": torch.cat(fields, dim=1).sum(dim=1)} if fields else {}

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        parts = [sum_U.index_select(0, inputs["user_index"]) for sum_U in state.values()]
        items = self.fields.group("item", inputs)
        if items:
            parts.append(torch.cat(items, dim=1).sum(dim=1))
        return torch.stack(parts).sum(dim=0) + self.bias

    def penalty(self) -> Tensor:
        return self.fields.penalty(self.config.l2_emb)


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
        state = {f"linear.{name}": value for name, value in self.linear.encode_user(inputs).items()}
        fields = _request_fields(self.fields, inputs, use_history=self.config.use_history)
        if fields:
            state |= self._read(torch.stack(fields, dim=1), self.mlp.first.weight[:, : self.request_width])
        return state

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        user_index = inputs["user_index"]
        linear = {name.removeprefix("linear."): v for name, v in state.items() if name.startswith("linear.")}
        logit_C = self.linear.score(linear, inputs)
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
        return logit_C + pairs_C + self.mlp.finish(total["deep"] + self.mlp.first.bias)

    def penalty(self) -> Tensor:
        return self.fields.penalty(self.config.l2_emb) + self.linear.penalty()

    def _read(self, fields_nFD: Tensor, weight: Tensor) -> UserState:
        return {
            "sum": fields_nFD.sum(dim=1),
            "squares": fields_nFD.square().sum(dim=1),
            "deep": F.linear(fields_nFD.flatten(1), weight),
        }


def _request_fields(fields: FieldEmbeddings, inputs: Inputs, *, use_history: bool) -> list[Tensor]:
    """The vectors [U, D] that all candidates of a request share."""
    flat = fields.group("user", inputs) + fields.group("context", inputs)
    if use_history and fields.schema.group("behaviour"):
        flat += fields.pooled_history(inputs)
    return flat
