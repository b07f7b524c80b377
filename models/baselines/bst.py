"""BST: Q. Chen et al., "Behavior Sequence Transformer for E-commerce Recommendation in Alibaba", DLP-KDD 2019.

arXiv 1905.06874.
"""

# U requests, C candidates, T history length, S = T + 1 with the candidate last, E width of a click

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.artifact.explanation import ATTENDED_EVENT, CANDIDATE, EVENT, Explanation, numbered
from models.baselines.sequence_model import SequenceConfig, SequenceModel
from models.features.schema import Schema
from models.layers.attention import SelfAttention
from models.layers.base import Inputs, UserState
from models.layers.config import Count
from models.layers.initialisation import start_linears, tiny_normal


@dataclass(frozen=True, kw_only=True)
class BSTConfig(SequenceConfig):
    heads: Count = 8
    blocks: Count = 1
    ffn_mult: Count = 4


class BST(SequenceModel):
    """A Transformer over [clicks; candidate] with learned positions, all of whose outputs the MLP reads.

    The clicks attend to the candidate, so their embeddings are all that a request's candidates share.
    """

    def __init__(self, config: BSTConfig, schema: Schema) -> None:
        length = schema.history_length + 1
        width = len(schema.group("behaviour")) * config.emb_dim
        super().__init__(config, schema, found=length * width, paper="BST")
        if width % config.heads:
            raise ValueError(
                f"a click is {width} wide ({len(self.paired)} sequence fields of {config.emb_dim}),"
                f" which {config.heads} heads do not divide; change heads or emb_dim"
            )
        # Histories are left-padded, so position T - 1 is always the newest click; T is the candidate's.
        self.positions = nn.Parameter(torch.empty(length, width))
        tiny_normal(self.positions.data)
        self.heads = config.heads
        self.blocks = nn.ModuleList(Block(config, width) for _ in range(config.blocks))
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        return self.read_request(inputs) | {"clicks": self.clicks(inputs), "mask": inputs["hist_mask"]}

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        user_index, items = inputs["user_index"], self.fields.group("item", inputs)
        clicks_CTE, mask_CT = (state[name].index_select(0, user_index) for name in ("clicks", "mask"))
        x_CSE = torch.cat([clicks_CTE, self.target(items).unsqueeze(1)], dim=1) + self.positions
        present_C1 = torch.ones_like(user_index, dtype=torch.bool).unsqueeze(1)
        mask_CS = torch.cat([mask_CT, present_C1], dim=1)
        for block in self.blocks:
            x_CSE = block(x_CSE, mask_CS)
        return self.finish(state, items, (x_CSE * mask_CS.unsqueeze(-1)).flatten(1), user_index)

    def explanations(self) -> tuple[Explanation, ...]:
        layers = (numbered("block", len(self.blocks)), numbered("head", self.heads))
        meaning = "Which events (past clicks, then the candidate) each event (a row, which sums to 1) attends to."
        axes = (CANDIDATE, *layers, EVENT, ATTENDED_EVENT)
        return (Explanation(name="self_attn", axes=axes, meaning=meaning),)


class Block(nn.Module):
    """S' = LN(S + dropout(attention(S))), F = LN(S' + dropout(LeakyReLU(S' W1 + b1) W2 + b2)), eq. (5)-(7)."""

    def __init__(self, config: BSTConfig, width: int) -> None:
        super().__init__()
        inner = config.ffn_mult * width
        self.attention = SelfAttention(width, config.heads, dropout=0.0)
        self.ffn = nn.Sequential(nn.Linear(width, inner), nn.LeakyReLU(0.01), nn.Linear(inner, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_CSE: Tensor, mask_CS: Tensor) -> Tensor:
        norm_1, norm_2 = self.norms
        y_CSE = norm_1(x_CSE + self.dropout(self.attention(x_CSE, mask_CS)))
        z_CSE: Tensor = norm_2(y_CSE + self.dropout(self.ffn(y_CSE)))
        return z_CSE
