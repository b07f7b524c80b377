"""DIEN: G. Zhou et al., "Deep Interest Evolution Network for Click-Through Rate Prediction", AAAI 2019.

arXiv 1809.03672.
"""

# U requests, C candidates, T history length, E width of a click and of a state, G = 3 E; n: U or C

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.artifact.explanation import BEHAVIOUR, CANDIDATE, Explanation
from models.baselines.sequence_model import SequenceConfig, SequenceModel, sampled_loss
from models.features.schema import Schema
from models.layers.attention import masked_softmax
from models.layers.base import Inputs, UserState
from models.layers.config import Weight
from models.layers.initialisation import start_linears
from models.layers.intermediates import record


@dataclass(frozen=True, kw_only=True)
class DIENConfig(SequenceConfig):
    aux_weight: Weight = 0.0  # of the auxiliary loss; the authors' code has 1


class DIEN(SequenceModel):
    """Interests h_t = GRU(e_t); alpha = softmax_t(h_t^T W e_i), eq. (8); the last state of an AUGRU over them.

    The interests do not depend on the candidate and are computed once per request; their evolution does.

    The auxiliary loss, eq. (6), has each interest tell the next click from one that was not made: here one that another
    request of the batch has in the same place, so that an item comes as often as it is clicked.
    """

    config: DIENConfig

    def __init__(self, config: DIENConfig, schema: Schema) -> None:
        super().__init__(config, schema, found=len(schema.group("behaviour")) * config.emb_dim, paper="DIEN")
        self.extraction = GRU(self.event_width)
        self.relevance = nn.Linear(self.event_width, self.event_width, bias=False)  # W^T
        self.evolution = GRU(self.event_width)
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        mask_UT = inputs["hist_mask"]
        clicks_UTE = self.clicks(inputs)
        interests_UTE = torch.stack(self.extraction(self.extraction.read(clicks_UTE), mask_UT), dim=1)
        history = {
            "clicks": clicks_UTE,
            "interests": interests_UTE,
            "keys": self.relevance(interests_UTE),
            "read": self.evolution.read(interests_UTE),
            "mask": mask_UT,
        }
        return self.read_request(inputs) | history

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        user_index, items = inputs["user_index"], self.fields.group("item", inputs)
        keys_CTE, read_CTG, mask_CT = (state[n].index_select(0, user_index) for n in ("keys", "read", "mask"))
        scores_CT = (keys_CTE @ self.target(items).unsqueeze(-1)).squeeze(-1)
        attention_CT = masked_softmax(scores_CT, mask_CT)
        record("alpha_behaviour", attention_CT)
        evolved_CE = self.evolution(read_CTG, mask_CT, attention_CT)[-1]
        return self.finish(state, items, evolved_CE, user_index)

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
        """The state [n, E] after each of the T steps."""
        h_nE = torch.zeros_like(read_nTG[:, 0].chunk(3, dim=-1)[0])
        states = []
        open_nT = mask_nT.to(read_nTG.dtype) if attention_nT is None else attention_nT * mask_nT
        for x_nG, open_n in zip(read_nTG.unbind(1), open_nT.unbind(1), strict=True):
            of_update, of_reset, of_state = x_nG.chunk(3, dim=-1)
            by_update, by_reset, by_state = self.state(h_nE).chunk(3, dim=-1)
            update_nE = torch.sigmoid(of_update + by_update) * open_n.unsqueeze(-1)
            fresh_nE = torch.tanh(of_state + torch.sigmoid(of_reset + by_reset) * by_state)
            h_nE = (1 - update_nE) * h_nE + update_nE * fresh_nE
            states.append(h_nE)
        return states
