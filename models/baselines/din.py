"""DIN: G. Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv 1706.06978."""

# U requests, C candidates, T history length, E width of a click, A width of an attention layer

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from models.artifact.explanation import BEHAVIOUR, CANDIDATE, Explanation
from models.baselines.sequence_model import SequenceConfig, SequenceModel
from models.features.schema import Schema
from models.layers.base import Inputs, UserState
from models.layers.config import Count
from models.layers.initialisation import start_linears
from models.layers.intermediates import record
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
    """Each click weighted by how it meets the candidate: a_t = MLP([e_i; e_t; e_i - e_t; e_i * e_t]), sum_t a_t e_t."""

    def __init__(self, config: DINConfig, schema: Schema) -> None:
        super().__init__(config, schema, found=len(schema.group("behaviour")) * config.emb_dim, paper="DIN")
        self.attention = TargetAttention(
            self.event_width,
            config.attention_hidden,
            activation=config.attention_activation,
            softmax=config.attention_softmax,
        )
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        clicks_UTE = self.clicks(inputs)
        history = {"clicks": clicks_UTE, "read": self.attention.read(clicks_UTE), "mask": inputs["hist_mask"]}
        return self.read_request(inputs) | history

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        user_index, items = inputs["user_index"], self.fields.group("item", inputs)
        clicks_CTE, read_CTA, mask_CT = (state[n].index_select(0, user_index) for n in ("clicks", "read", "mask"))
        weights_CT = self.attention(self.target(items), clicks_CTE, read_CTA, mask_CT)
        record("alpha_behaviour", weights_CT)
        interest_CE = (weights_CT.unsqueeze(1) @ clicks_CTE).squeeze(1)
        return self.finish(state, items, interest_CE, user_index)

    def explanations(self) -> tuple[Explanation, ...]:
        bounds = "sums to 1 (to 0 where there is none)" if self.attention.softmax else "below 0 it is taken away"
        meaning = f"How much of each past click this candidate takes up; {bounds}."
        return (Explanation(name="alpha_behaviour", axes=(CANDIDATE, BEHAVIOUR), meaning=meaning),)
