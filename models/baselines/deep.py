"""An MLP beside the linear model: Wide & Deep, and with all pairs DeepFM."""

# U requests, C candidates, R request fields, D embedding width, H first hidden layer

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.baselines.flat_model import DeepConfig, FlatModel, add_request
from models.baselines.linear import LR, LRConfig, sum_and_pairs
from models.features.schema import Schema
from models.layers.base import Inputs, UserState
from models.layers.initialisation import start_linears
from models.layers.request_matmul import dot_by_request


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
        self.deep = self.make_mlp(config)
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        state, fields_URD = self.linear.encode_user(inputs), self.request_fields(inputs)
        return state if fields_URD is None else state | {"deep": self.deep.first.request(fields_URD.flatten(1))}

    def encode_items(self, inputs: Inputs) -> Tensor:
        """[C, 1 + H]: LR's row; the item's part of the MLP's first layer."""
        deep_CH = self.deep.first.item(self.fields.item(inputs).flatten(1))
        return torch.cat([self.linear.encode_items(inputs), deep_CH], dim=-1)

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        linear_C1, deep_CH = torch.split(items_CW, [1, self.deep.first.out_features], dim=-1)
        logits_C = self.linear.score(state, linear_C1, user_index)
        return logits_C + self.deep.finish(add_request(deep_CH, state, "deep", user_index))

    def penalty(self) -> Tensor:
        return super().penalty() + self.linear.penalty()


class DeepFM(FlatModel):
    """LR + FM + MLP over the same embeddings. H. Guo et al., "DeepFM", IJCAI 2017."""

    def __init__(self, config: DeepFMConfig, schema: Schema) -> None:
        super().__init__(config, schema)
        self.linear = LR(LRConfig(use_history=config.use_history, l2_emb=config.l2_emb), schema)
        self.mlp = self.make_mlp(config)
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        """`sum` [U, D], `first_order` [U]: FM's; `deep` [U, H]: the request's part of the MLP's first layer."""
        state, fields_URD = self.linear.encode_user(inputs), self.request_fields(inputs)
        if fields_URD is None:
            return state
        sum_UD, pairs_U = sum_and_pairs(fields_URD)
        deep_UH = self.mlp.first.request(fields_URD.flatten(1))
        return {"sum": sum_UD, "first_order": state["first_order"] + pairs_U, "deep": deep_UH}

    def encode_items(self, inputs: Inputs) -> Tensor:
        """[C, 1 + D + H]: FM's row; the item's part of the MLP's first layer."""
        items_CID = self.fields.item(inputs)
        sum_CD, pairs_C = sum_and_pairs(items_CID)
        first_order_C1 = self.linear.encode_items(inputs) + pairs_C.unsqueeze(-1)
        return torch.cat([first_order_C1, sum_CD, self.mlp.first.item(items_CID.flatten(1))], dim=-1)

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        widths = [1, self.config.emb_dim, self.mlp.first.out_features]
        first_order_C1, sum_CD, deep_CH = torch.split(items_CW, widths, dim=-1)
        logits_C = self.linear.score(state, first_order_C1, user_index)
        if "sum" in state:
            logits_C = logits_C + dot_by_request(sum_CD, state["sum"], user_index)
        return logits_C + self.mlp.finish(add_request(deep_CH, state, "deep", user_index))

    def penalty(self) -> Tensor:
        return super().penalty() + self.linear.penalty()
