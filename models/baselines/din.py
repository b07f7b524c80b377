"""DIN: G. Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv 1706.06978."""

# U requests, C candidates, T history length, I item fields, D embedding width, E width of a click
# H first hidden layer of the MLP

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.artifact.explanation import BEHAVIOUR, CANDIDATE, Explanation
from models.baselines.sequence_model import SequenceConfig, SequenceModel
from models.features.schema import Schema
from models.layers.base import Inputs, UserState, history_mask
from models.layers.config import Count
from models.layers.initialisation import start_linears
from models.layers.intermediates import record
from models.layers.request_matmul import of_request, vector_by_request
from models.layers.target_attention import TargetAttention


@dataclass(frozen=True, kw_only=True)
class DINConfig(SequenceConfig):
    attention_hidden: tuple[Count, ...] = (64, 32)
    attention_activation: Literal["dice", "relu"] = "dice"
    attention_softmax: bool = False  # the paper keeps the weights' sum: it says how strong the interest is

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.attention_hidden:
            raise ValueError("option attention_hidden: expected at least one layer, got none")


class DIN(SequenceModel):
    """Each click weighted by how it meets the candidate: a_t = MLP([e_i; e_t; e_i - e_t; e_i * e_t]), sum_t a_t e_t.

    With `age_buckets` e_t has the click's age in it: without, the model knows neither age nor order.
    """

    def __init__(self, config: DINConfig, schema: Schema) -> None:
        super().__init__(config, schema, interest_width=len(schema.group("behaviour")) * config.emb_dim, paper="DIN")
        self.attention = TargetAttention(
            self.event_width,
            config.attention_hidden,
            activation=config.attention_activation,
            softmax=config.attention_softmax,
        )
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        clicks_UTE = self.aged_clicks(inputs)
        history = {"clicks": clicks_UTE, "read": self.attention.read(clicks_UTE), "mask": history_mask(inputs)}
        return self.read_request(inputs) | history

    def encode_items(self, inputs: Inputs) -> Tensor:
        """[C, E + H]: the target; the item's part of the MLP's first layer."""
        items_CID = self.fields.item(inputs)
        return torch.cat([self.target(items_CID), self.read_item(items_CID)], dim=-1)

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        target_CE, deep_CH = torch.split(items_CW, [self.event_width, self.mlp.first.out_features], dim=-1)
        history = [state[name] for name in ("clicks", "read", "mask")]
        if user_index is None:
            weights_CT = self.attention.of_one_request(target_CE, *(tensor[0] for tensor in history))
        else:
            weights_CT = self.attention(target_CE, *(of_request(tensor, user_index) for tensor in history))
        record("alpha_behaviour", weights_CT)
        interest_CE = vector_by_request(weights_CT, state["clicks"], user_index)
        return self.finish(state, deep_CH, interest_CE, user_index)

    def explanations(self) -> tuple[Explanation, ...]:
        bounds = "sums to 1 (to 0 where there is none)" if self.attention.softmax else "below 0 it is taken away"
        meaning = f"How much of each past click this candidate takes up; {bounds}."
        return (Explanation(name="alpha_behaviour", axes=(CANDIDATE, BEHAVIOUR), meaning=meaning),)
