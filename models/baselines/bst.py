"""BST: Q. Chen et al., "Behavior Sequence Transformer for E-commerce Recommendation in Alibaba", DLP-KDD 2019.

arXiv 1905.06874.
"""

# U requests, C candidates, T history length, S = T + 1 with the candidate last, E width of a click, H heads
# d = E / H, K and O inner and outer dimension of a product; in items' rows H is the MLP's first hidden layer

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.artifact.explanation import ATTENDED_EVENT, CANDIDATE, EVENT, Explanation, numbered
from models.baselines.sequence_model import SequenceConfig, SequenceModel
from models.features.schema import Schema
from models.layers.attention import SelfAttention, mask_bias, split_heads
from models.layers.base import Inputs, UserState, history_age, history_mask
from models.layers.config import Count
from models.layers.initialisation import start_linears, tiny_normal
from models.layers.intermediates import record
from models.layers.request_matmul import matmul_by_request, of_request


@dataclass(frozen=True, kw_only=True)
class BSTConfig(SequenceConfig):
    heads: Count = 8
    blocks: Count = 1
    ffn_mult: Count = 4


class BST(SequenceModel):
    """A Transformer over [clicks; candidate] with learned positions, all of whose outputs the MLP reads.

    A position is the place in the sequence or, with `age_buckets`, what it is in the paper: the time between the click
    and the request, which for the candidate is none.

    The clicks attend to the candidate too, but in the first block what they find among themselves is shared by the
    request's candidates, see `MergedAttention`; the rest is each candidate's.
    """

    def __init__(self, config: BSTConfig, schema: Schema) -> None:
        length = schema.history_length + 1
        width = len(schema.group("behaviour")) * config.emb_dim
        super().__init__(config, schema, interest_width=length * width, paper="BST")
        if width % config.heads:
            raise ValueError(
                f"a click is {width} wide ({len(self.paired)} sequence fields of {config.emb_dim}),"
                f" which {config.heads} heads do not divide; change heads or emb_dim"
            )
        if self.ages is None:
            # Histories are left-padded, so position T - 1 is always the newest click; T is the candidate's.
            self.positions = nn.Parameter(torch.empty(length, width))
            tiny_normal(self.positions.data)
        self.heads = config.heads
        self.blocks = nn.ModuleList(Block(config, width) for _ in range(config.blocks))
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        positions = self.positions[:-1] if self.ages is None else self.ages(history_age(inputs))
        x_UTE, mask_UT = self.clicks(inputs) + positions, history_mask(inputs)
        attention = self._block(0).attention
        return self.read_request(inputs) | {"clicks": x_UTE, "mask": mask_UT} | attention.read(x_UTE, mask_UT)

    def encode_items(self, inputs: Inputs) -> Tensor:
        """[C, 4 E + H]: the target in its place; its query, key and value in the first block; the MLP's first layer."""
        items_CID = self.fields.item(inputs)
        x_CE = self.target(items_CID) + (self.positions[-1] if self.ages is None else self.ages.table[0])
        attention = self._block(0).attention
        parts = [layer(x_CE) for layer in (attention.query, attention.key, attention.value)]
        return torch.cat([x_CE, *parts, self.read_item(items_CID)], dim=-1)

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        widths = [*[self.event_width] * 4, self.mlp.first.out_features]
        x_CE, query_CE, key_CE, value_CE, deep_CH = torch.split(items_CW, widths, dim=-1)
        num_candidates = x_CE.shape[0]
        clicks_CTE, mask_CT = (of_request(state[name], user_index, num_candidates) for name in ("clicks", "mask"))
        mask_CS = F.pad(mask_CT, (0, 1), value=True)
        x_CSE = torch.cat([clicks_CTE, x_CE.unsqueeze(1)], dim=1)
        block = self._block(0)
        x_CSE = block.finish(x_CSE, block.attention.merge(state, query_CE, key_CE, value_CE, user_index))
        for index in range(1, len(self.blocks)):
            x_CSE = self._block(index)(x_CSE, mask_CS)
        return self.finish(state, deep_CH, (x_CSE * mask_CS.unsqueeze(-1)).flatten(1), user_index)

    def _block(self, index: int) -> "Block":
        block = self.blocks[index]
        assert isinstance(block, Block)
        return block

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
        self.attention = MergedAttention(width, config.heads, dropout=0.0)
        self.ffn = nn.Sequential(nn.Linear(width, inner), nn.LeakyReLU(0.01), nn.Linear(inner, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_CSE: Tensor, mask_CS: Tensor) -> Tensor:
        return self.finish(x_CSE, self.attention(x_CSE, mask_CS))

    def finish(self, x_CSE: Tensor, attended_CSE: Tensor) -> Tensor:
        norm_1, norm_2 = self.norms
        y_CSE = norm_1(x_CSE + self.dropout(attended_CSE))
        z_CSE: Tensor = norm_2(y_CSE + self.dropout(self.ffn(y_CSE)))
        return z_CSE


class MergedAttention(SelfAttention):
    """Self-attention over [clicks; candidate] in which the clicks' attention to each other is made once per request.

    Let o_t be what click t finds among the clicks, and l_t the log of the sum of its exponentiated scores there. With
    the candidate's score s_t, the softmax over both gives the candidate a share of w_t = sigmoid(s_t - l_t), and click
    t finds o_t + w_t (v - o_t). No dropout on the weights.
    """

    def read(self, x_UTE: Tensor, mask_UT: Tensor) -> UserState:
        """Queries, keys and values of the clicks by head, o and l."""
        query_UHTd = split_heads(self.query(x_UTE) / self.scale, self.heads)
        key_UHTd = split_heads(self.key(x_UTE), self.heads)
        value_UHTd = split_heads(self.value(x_UTE) * mask_UT.unsqueeze(-1), self.heads)
        bias_UT = mask_bias(mask_UT, x_UTE.dtype)
        scores_UHTT = query_UHTd @ key_UHTd.transpose(-1, -2) + bias_UT.unsqueeze(1).unsqueeze(1)
        state = {"queries": query_UHTd, "keys": key_UHTd, "values": value_UHTd, "bias": bias_UT, "scores": scores_UHTT}
        state["attended"] = (scores_UHTT.softmax(dim=-1) @ value_UHTd).transpose(1, 2)
        state["log_sums"] = scores_UHTT.logsumexp(dim=-1).transpose(1, 2)
        return state

    def merge(
        self, state: UserState, query_CE: Tensor, key_CE: Tensor, value_CE: Tensor, user_index: Tensor | None
    ) -> Tensor:
        """The attention's output [C, S, E] for the clicks that were `read` and these candidates."""
        query_CHd, key_CHd, value_CHd = (torch.unflatten(x, -1, (self.heads, -1)) for x in (query_CE, key_CE, value_CE))
        query_CHd = query_CHd / self.scale

        def by_request(name: str) -> Tensor:
            return of_request(state[name], user_index)

        by_clicks_CHT = _by_head(key_CHd, state["queries"].transpose(-1, -2), user_index)
        share_CTH = torch.sigmoid(by_clicks_CHT.transpose(1, 2) - by_request("log_sums"))
        attended_CTHd = by_request("attended")
        attended_CTHd = attended_CTHd + share_CTH.unsqueeze(-1) * (value_CHd.unsqueeze(1) - attended_CTHd)

        scores_CHT = _by_head(query_CHd, state["keys"].transpose(-1, -2), user_index) + by_request("bias").unsqueeze(1)
        itself_CH1 = (query_CHd * key_CHd).sum(dim=-1, keepdim=True)
        weights_CHS = torch.cat([scores_CHT, itself_CH1], dim=-1).softmax(dim=-1)
        length = scores_CHT.shape[-1]
        of_clicks_CHT, of_itself_CH1 = torch.split(weights_CHS, [length, 1], dim=-1)
        candidate_CHd = _by_head(of_clicks_CHT, state["values"], user_index) + of_itself_CH1 * value_CHd

        record(self.shown_as, lambda: _weights(by_request("scores"), share_CTH, weights_CHS, by_request("mask")))
        merged_CSE: Tensor = self.out(torch.cat([attended_CTHd, candidate_CHd.unsqueeze(1)], dim=1).flatten(2))
        return merged_CSE


def _weights(scores_CHTT: Tensor, share_CTH: Tensor, weights_CHS: Tensor, mask_CT: Tensor) -> Tensor:
    """All weights [C, H, S, S], as `SelfAttention` shows them: 0 where either event is padding."""
    share_CHT1 = share_CTH.transpose(1, 2).unsqueeze(-1)
    of_clicks_CHTS = torch.cat([scores_CHTT.softmax(dim=-1) * (1 - share_CHT1), share_CHT1], dim=-1)
    of_all_CHSS = torch.cat([of_clicks_CHTS, weights_CHS.unsqueeze(2)], dim=2)
    mask_CS = F.pad(mask_CT, (0, 1), value=True)
    return of_all_CHSS * (mask_CS.unsqueeze(1) & mask_CS.unsqueeze(2)).unsqueeze(1)


def _by_head(x_CHK: Tensor, matrix_UHKO: Tensor, user_index: Tensor | None) -> Tensor:
    """Each candidate's vectors times the matrices of its request, head by head: [C, H, O]."""
    if user_index is None:
        return (x_CHK.transpose(0, 1) @ matrix_UHKO[0]).transpose(0, 1)
    return matmul_by_request(x_CHK.unsqueeze(2), matrix_UHKO, user_index).squeeze(2)
