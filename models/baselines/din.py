"""DIN: G. Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018, arXiv 1706.06978."""

# U requests, C candidates, T history length, E width of a click, A width of an attention layer

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.baselines.sequence import SequenceConfig, SequenceModel
from models.blocks import Inputs, UserState, masked_softmax, start_linears
from models.config import Count
from models.explanation import BEHAVIOUR, CANDIDATE, Explanation
from models.schema import Schema
from models.taps import tap


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
        self.attention = TargetAttention(config, self.event_width)
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        clicks_UTE = self.clicks(inputs)
        history = {"clicks": clicks_UTE, "read": self.attention.read(clicks_UTE), "mask": inputs["hist_mask"]}
        return self.read_request(inputs) | history

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        user_index, items = inputs["user_index"], self.fields.group("item", inputs)
        clicks_CTE, read_CTA, mask_CT = (state[n].index_select(0, user_index) for n in ("clicks", "read", "mask"))
        weights_CT = self.attention(self.target(items), clicks_CTE, read_CTA, mask_CT)
        tap("alpha_behaviour", weights_CT)
        interest_CE = (weights_CT.unsqueeze(1) @ clicks_CTE).squeeze(1)
        return self.finish(state, items, interest_CE, user_index)

    def explanations(self) -> tuple[Explanation, ...]:
        bounds = "sums to 1 (to 0 where there is none)" if self.attention.softmax else "below 0 it is taken away"
        meaning = f"How much of each past click this candidate takes up; {bounds}."
        return (Explanation(name="alpha_behaviour", axes=(CANDIDATE, BEHAVIOUR), meaning=meaning),)


class TargetAttention(nn.Module):
    """The weights a_t of a history's clicks for a candidate.

    The first layer is linear in what it reads, W = [W_i W_t W_d W_p] of [e_i; e_t; e_i - e_t; e_i * e_t], so that
    (W_t - W_d) e_t is computed once per request and (W_i + W_d) e_i once per candidate.
    """

    def __init__(self, config: DINConfig, width: int) -> None:
        super().__init__()
        self.softmax = config.attention_softmax
        self.first = nn.Linear(4 * width, config.attention_hidden[0])
        self.rest = nn.Sequential()
        for this, following in pairwise((*config.attention_hidden, 1)):
            self.rest.append(Dice(this) if config.attention_activation == "dice" else nn.ReLU())
            self.rest.append(nn.Linear(this, following))

    def read(self, clicks_UTE: Tensor) -> Tensor:
        """What the clicks alone bring to the first layer, [U, T, A]."""
        _, of_click, of_difference, _ = self.first.weight.chunk(4, dim=1)
        return F.linear(clicks_UTE, of_click - of_difference)

    def forward(self, target_CE: Tensor, clicks_CTE: Tensor, read_CTA: Tensor, mask_CT: Tensor) -> Tensor:
        of_target, _, of_difference, of_product = self.first.weight.chunk(4, dim=1)
        target_C1A = F.linear(target_CE, of_target + of_difference, self.first.bias).unsqueeze(1)
        product_CTA = F.linear(target_CE.unsqueeze(1) * clicks_CTE, of_product)
        scores_CT: Tensor = self.rest(read_CTA + target_C1A + product_CTA).squeeze(-1)
        return masked_softmax(scores_CT, mask_CT) if self.softmax else scores_CT * mask_CT


class Dice(nn.Module):
    """p x + (1 - p) alpha x with p = sigmoid(x batch-normalised), eq. (3), over the last axis of [C, T, A].

    The statistics of training count padded places too, as FuxiCTR's do, whose epsilon and momentum these are.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=1e-9, momentum=0.01, affine=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x_CTA: Tensor) -> Tensor:
        # Channels last: over the [C, A, T] that BatchNorm1d documents, its backward pass takes ten times as long.
        p_CTA = torch.sigmoid(self.norm(x_CTA.flatten(0, 1)).unflatten(0, x_CTA.shape[:2]))
        return x_CTA * (self.alpha + (1 - self.alpha) * p_CTA)
