"""Weights and pairs: logistic regression and the factorisation machine."""

# U requests, C candidates, F flat fields (request's first), D embedding width; n: U or C

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.baselines.flat import FlatConfig, request_fields
from models.blocks import CTRModel, FieldEmbeddings, Inputs, UserState, tiny_normal
from models.config import Config, Weight
from models.schema import Schema


@dataclass(frozen=True, kw_only=True)
class LRConfig(Config):
    use_history: bool = False  # pool each sequence field into one more flat field
    l2_emb: Weight = 0.0  # (weight / 2) * sum of squares of the weights


@dataclass(frozen=True, kw_only=True)
class FMConfig(FlatConfig):
    pass


class LR(CTRModel):
    """z = b + sum_j w_{x_j}."""

    def __init__(self, config: LRConfig, schema: Schema) -> None:
        super().__init__()
        self.config = config
        self.fields = FieldEmbeddings(schema, 1, init=tiny_normal)
        self.bias = nn.Parameter(torch.zeros(1))

    def encode_user(self, inputs: Inputs) -> UserState:
        fields = request_fields(self.fields, inputs, use_history=self.config.use_history)
        return {"first_order": torch.cat(fields, dim=1).sum(dim=1)} if fields else {}

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        parts = [state["first_order"].index_select(0, inputs["user_index"])] if "first_order" in state else []
        items = self.fields.group("item", inputs)
        if items:
            parts.append(torch.cat(items, dim=1).sum(dim=1))
        return torch.stack(parts).sum(dim=0) + self.bias

    def penalty(self) -> Tensor:
        return self.fields.penalty(self.config.l2_emb)


class FM(CTRModel):
    """LR + sum_{i<j} <e_i, e_j>. S. Rendle, "Factorization Machines", ICDM 2010.

    The pairs are half of (sum e)^2 - sum e^2, and both sums split by fields.
    """

    def __init__(self, config: FMConfig, schema: Schema) -> None:
        super().__init__()
        self.config = config
        self.linear = LR(LRConfig(use_history=config.use_history, l2_emb=config.l2_emb), schema)
        self.fields = FieldEmbeddings(schema, config.emb_dim, init=tiny_normal)

    def encode_user(self, inputs: Inputs) -> UserState:
        fields = request_fields(self.fields, inputs, use_history=self.config.use_history)
        return self.linear.encode_user(inputs) | (_sums(torch.stack(fields, dim=1)) if fields else {})

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        parts = []
        if "sum" in state:
            parts.append({name: state[name].index_select(0, inputs["user_index"]) for name in ("sum", "squares")})
        items = self.fields.group("item", inputs)
        if items:
            parts.append(_sums(torch.stack(items, dim=1)))
        total = {name: torch.stack([part[name] for part in parts]).sum(dim=0) for name in ("sum", "squares")}
        pairs_C = (total["sum"].square() - total["squares"]).sum(dim=-1) / 2
        return self.linear.score(state, inputs) + pairs_C

    def penalty(self) -> Tensor:
        return self.fields.penalty(self.config.l2_emb) + self.linear.penalty()


def _sums(fields_nFD: Tensor) -> UserState:
    return {"sum": fields_nFD.sum(dim=1), "squares": fields_nFD.square().sum(dim=1)}
