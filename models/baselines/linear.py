"""Weights and pairs: logistic regression and the factorisation machine."""

# U requests, C candidates, F flat fields (request's first), D embedding width; n: U or C

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.artifact.explanation import BIAS, CANDIDATE, REQUEST, Axis, Explanation, of_fields
from models.baselines.flat_model import FlatConfig, request_names
from models.features.schema import Schema
from models.layers.base import CTRModel, Inputs, UserState
from models.layers.config import Config, Weight
from models.layers.embeddings import FieldEmbeddings
from models.layers.initialisation import tiny_normal
from models.layers.intermediates import record


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
        fields = self.fields.request(inputs, use_history=self.config.use_history)
        if not fields:
            return {}
        weights_UF = torch.cat(fields, dim=1)
        record("request_contrib", weights_UF)
        return {"first_order": weights_UF.sum(dim=1)}

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        parts = [state["first_order"].index_select(0, inputs["user_index"])] if "first_order" in state else []
        items = self.fields.group("item", inputs)
        if items:
            weights_CF = torch.cat(items, dim=1)
            record("item_contrib", weights_CF)
            parts.append(weights_CF.sum(dim=1))
        record("bias", self.bias.squeeze)
        return torch.stack(parts).sum(dim=0) + self.bias

    def explanations(self) -> tuple[Explanation, ...]:
        schema, shown = self.fields.schema, []
        names = request_names(schema, use_history=self.config.use_history)
        if names:
            meaning = "What each field of the request adds to the logit of every candidate."
            axes = (REQUEST, Axis(name="field", labels=names))
            shown.append(Explanation(name="request_contrib", axes=axes, meaning=meaning))
        if schema.group("item"):
            meaning = "What each field of the candidate adds to its logit: with the request's and `bias`, all of it."
            axes = (CANDIDATE, of_fields(schema, ["item"]))
            shown.append(Explanation(name="item_contrib", axes=axes, meaning=meaning))
        return (*shown, BIAS)

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
        fields = self.fields.request(inputs, use_history=self.config.use_history)
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
