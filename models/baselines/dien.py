"""DIEN: G. Zhou et al., "Deep Interest Evolution Network for Click-Through Rate Prediction", AAAI 2019.

arXiv 1809.03672.
"""

# U requests, C candidates, T history length, I item fields, D embedding width, E width of a click and of a state
# G = 3 E, X = 2 E, H first hidden layer of the MLP; n: U or C

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.artifact.explanation import BEHAVIOUR, CANDIDATE, Explanation
from models.baselines.sequence_model import SequenceConfig, SequenceModel, sampled_loss
from models.features.schema import Schema
from models.layers.attention import masked_softmax
from models.layers.base import Inputs, UserState, history_mask
from models.layers.config import Weight
from models.layers.initialisation import start_linears
from models.layers.intermediates import record
from models.layers.request_matmul import of_request, vector_by_request


@dataclass(frozen=True, kw_only=True)
class DIENConfig(SequenceConfig):
    aux_weight: Weight = 0.0  # of the auxiliary loss; the authors' code has 1


class DIEN(SequenceModel):
    """Interests h_t = GRU(e_t); alpha = softmax_t(h_t^T W e_i), eq. (8); the last state of an AUGRU over them.

    The interests do not depend on the candidate and are computed once per request; their evolution does.

    The auxiliary loss, eq. (6), has each interest tell the next click from one that was not made: here one that another
    request of the batch has in the same place, so that an item comes as often as it is clicked.

    With `age_buckets` the first GRU reads each click's age with it; the clicks that the auxiliary loss tells apart have
    none, as their ages alone would do.
    """

    config: DIENConfig

    def __init__(self, config: DIENConfig, schema: Schema) -> None:
        width = len(schema.group("behaviour")) * config.emb_dim
        super().__init__(config, schema, interest_width=width, paper="DIEN")
        self.extraction = GRU(self.event_width)
        self.relevance = nn.Linear(self.event_width, self.event_width, bias=False)  # W^T
        self.evolution = GRU(self.event_width)
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        mask_UT = history_mask(inputs)
        read_UTG = self.extraction.read(self.aged_clicks(inputs))
        interests_UTE = torch.stack(self.extraction(read_UTG, mask_UT), dim=1)
        history = {
            "clicks": self.clicks(inputs),
            "interests": interests_UTE,
            "keys": self.relevance(interests_UTE),
            "read": self.evolution.read(interests_UTE),
            "mask": mask_UT,
        }
        return self.read_request(inputs) | history

    def encode_items(self, inputs: Inputs) -> Tensor:
        """[C, E + H]: the target; the item's part of the MLP's first layer."""
        items_CID = self.fields.item(inputs)
        return torch.cat([self.target(items_CID), self.read_item(items_CID)], dim=-1)

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        target_CE, deep_CH = torch.split(items_CW, [self.event_width, self.mlp.first.out_features], dim=-1)
        keys_UET = state["keys"].transpose(-1, -2)
        scores_CT = vector_by_request(target_CE, keys_UET, user_index)
        read_CTG, mask_CT = (of_request(state[name], user_index) for name in ("read", "mask"))
        attention_CT = masked_softmax(scores_CT, mask_CT)
        record("alpha_behaviour", attention_CT)
        evolved_CE = self.evolution(read_CTG, mask_CT, attention_CT)[-1]
        return self.finish(state, deep_CH, evolved_CE, user_index)

    def auxiliary_loss(self, state: UserState, inputs: Inputs) -> Tensor:
        if not self.config.aux_weight:
            return super().auxiliary_loss(state, inputs)
        interests_UXE, clicks_UXE = state["interests"][:, :-1], state["clicks"][:, 1:]  # X = T - 1
        both_UX = state["mask"][:, 1:] & state["mask"][:, :-1]
        drawn_U = torch.randperm(len(clicks_UXE), device=clicks_UXE.device)
        others_UXE = clicks_UXE[drawn_U]
        other_UX = both_UX & both_UX[drawn_U] & (others_UXE != clicks_UXE).any(dim=-1)
        scores_UX, missed_UX = ((interests_UXE * x_UXE).sum(dim=-1) for x_UXE in (clicks_UXE, others_UXE))
        return self.config.aux_weight * sampled_loss(scores_UX, missed_UX, both_UX, other_UX)

    def explanations(self) -> tuple[Explanation, ...]:
        meaning = "How far each past click may move this candidate's state; sums to 1 (to 0 where there is none)."
        return (Explanation(name="alpha_behaviour", axes=(CANDIDATE, BEHAVIOUR), meaning=meaning),)


class GRU(nn.Module):
    """h_t = (1 - u_t) h_{t-1} + u_t tanh(W x_t + r_t (U h_{t-1}) + b), eq. (2)-(5); with attention, u_t = a_t u_t.

    Written out step by step: the runtimes' own GRU has no attentional update gate. Where the mask is false the state
    stays what it was, so that padding on the left does nothing.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 3 * width)  # update, reset, candidate state
        self.state = nn.Linear(width, 3 * width, bias=False)

    def read(self, x_nTE: Tensor) -> Tensor:
        """What the inputs alone bring to the three gates of every step."""
        read_nTG: Tensor = self.input(x_nTE)
        return read_nTG

    def forward(self, read_nTG: Tensor, mask_nT: Tensor, attention_nT: Tensor | None = None) -> list[Tensor]:
        """The state [n, E] after each of the T steps; with attention, `read` may be of n = 1 for all candidates."""
        open_nT = mask_nT.to(read_nTG.dtype) if attention_nT is None else attention_nT * mask_nT
        width = self.state.in_features
        # [1, E], not as many as there are rows: a traced size is read off the ads' ids, which a scoring graph has not.
        h_nE = read_nTG.new_zeros(1, width)
        states = []
        for x_nG, open_n1 in zip(read_nTG.unbind(1), torch.split(open_nT, 1, dim=1), strict=True):
            of_gates_nX, of_state_nE = torch.split(x_nG, [2 * width, width], dim=-1)
            by_gates_nX, by_state_nE = torch.split(self.state(h_nE), [2 * width, width], dim=-1)
            update_nE, reset_nE = torch.sigmoid(of_gates_nX + by_gates_nX).chunk(2, dim=-1)
            fresh_nE = torch.tanh(of_state_nE + reset_nE * by_state_nE)
            h_nE = h_nE + update_nE * open_n1 * (fresh_nE - h_nE)
            states.append(h_nE)
        return states
