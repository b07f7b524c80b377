"""Weights and pairs: logistic regression and the factorisation machine."""

# U requests, C candidates, R request fields, I item fields, F: R or I, D embedding width; n: U or C

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.artifact.explanation import BIAS, CANDIDATE, REQUEST, Axis, Explanation, of_fields
from models.baselines.flat_model import FlatConfig, FlatModel, add_request, request_fields, request_names
from models.features.schema import Schema
from models.layers.base import CTRModel, Inputs, UserState
from models.layers.config import Config, Weight
from models.layers.embeddings import FieldEmbeddings
from models.layers.initialisation import tiny_normal
from models.layers.intermediates import record
from models.layers.request_matmul import dot_by_request


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
        weights_UR1 = request_fields(self.fields, inputs, use_history=self.config.use_history)
        if weights_UR1 is None:
            return {}
        weights_UR = weights_UR1.squeeze(-1)
        record("request_contrib", weights_UR)
        return {"first_order": weights_UR.sum(dim=1)}

    def encode_items(self, inputs: Inputs) -> Tensor:
        """[C, 1]: the sum of the item's weights, and b."""
        weights_CI = self.fields.item(inputs).squeeze(-1)
        if self.fields.num_item:
            record("item_contrib", weights_CI)
        record("bias", self.bias.squeeze)
        return weights_CI.sum(dim=1, keepdim=True) + self.bias

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        return add_request(items_CW.squeeze(-1), state, "first_order", user_index)

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


class FM(FlatModel):
    """LR + sum_{i<j} <e_i, e_j>. S. Rendle, "Factorization Machines", ICDM 2010.

    With s the sum of a side's vectors, the pairs are those within the request, those within the item, <s_r, s_i>.
    """

    def __init__(self, config: FMConfig, schema: Schema) -> None:
        super().__init__(config, schema)
        self.linear = LR(LRConfig(use_history=config.use_history, l2_emb=config.l2_emb), schema)

    def encode_user(self, inputs: Inputs) -> UserState:
        """`sum` s_r [U, D]; `first_order` [U]: weights and the pairs within the request."""
        state, fields_URD = self.linear.encode_user(inputs), self.request_fields(inputs)
        if fields_URD is None:
            return state
        sum_UD, pairs_U = sum_and_pairs(fields_URD)
        return {"sum": sum_UD, "first_order": state["first_order"] + pairs_U}

    def encode_items(self, inputs: Inputs) -> Tensor:
        """[C, 1 + D]: weights, b and the pairs within the item; s_i."""
        sum_CD, pairs_C = sum_and_pairs(self.fields.item(inputs))
        return torch.cat([self.linear.encode_items(inputs) + pairs_C.unsqueeze(-1), sum_CD], dim=-1)

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        first_order_C1, sum_CD = torch.split(items_CW, [1, self.config.emb_dim], dim=-1)
        logits_C = self.linear.score(state, first_order_C1, user_index)
        return logits_C + dot_by_request(sum_CD, state["sum"], user_index) if "sum" in state else logits_C

    def penalty(self) -> Tensor:
        return super().penalty() + self.linear.penalty()


def sum_and_pairs(fields_nFD: Tensor) -> tuple[Tensor, Tensor]:
    """The sum [n, D] of a side's vectors and the sum [n] of the products of each two of them."""
    sum_nD = fields_nFD.sum(dim=1)
    return sum_nD, (sum_nD.square() - fields_nFD.square().sum(dim=1)).sum(dim=-1) / 2
