"""DMR: Z. Lyu et al., "Deep Match to Rank Model for Personalized Click-Through Rate Prediction", AAAI 2020."""

# U requests, C candidates, T history length, I item fields, S sequence fields, D embedding width, E width of a click
# A attention width, H first hidden layer of the MLP; n: U or C

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.baselines.sequence_model import SequenceConfig, SequenceModel, sampled_loss
from models.features.field import input_name
from models.features.schema import Schema
from models.layers.attention import masked_softmax
from models.layers.base import Inputs, UserState, history_age, history_mask
from models.layers.config import Count, Weight
from models.layers.embeddings import FieldEmbeddings
from models.layers.initialisation import start_linears, tiny_normal
from models.layers.request_matmul import dot_by_request, of_request, vector_by_request


@dataclass(frozen=True, kw_only=True)
class DMRConfig(SequenceConfig):
    """The tables that `l2_emb` holds are the target's output tables too."""

    attention_dim: Count = 64
    aux_weight: Weight = 0.0  # of the auxiliary loss; the paper's is 0.1
    aux_negatives: Count = 4  # to one click


class DMR(SequenceModel):
    """How relevant the candidate is to the user, in two ways, beside the clicks that its attention picks.

    - user to item: a_t = z^T tanh(W [p_t; e_t] + b), u = PReLU(V sum_t softmax(a)_t e_t + c), r = u^T v, with v the
      candidate in output tables of its own. All but the last product is computed once per request.
    - item to item: the same attention, its own weights, reading the candidate too; its weighted sum of clicks, and
      as relevance the sum of its scores before the softmax.

    The auxiliary loss has the user vector of all clicks but the newest find that one among others, by the output
    tables; the terms of the others are added up. They are newest clicks of other requests in the batch, so an item
    comes as often as it is clicked.

    With `age_buckets` p_t is the place's vector plus the age's: there both attentions look for how recent a click is.
    """

    config: DMRConfig

    def __init__(self, config: DMRConfig, schema: Schema) -> None:
        width = len(schema.group("behaviour")) * config.emb_dim
        super().__init__(config, schema, interest_width=width + 2, paper="DMR")
        paired = [schema.field(str(f.of)) for f in schema.group("behaviour")]
        self.output_fields = FieldEmbeddings(schema, config.emb_dim, init=tiny_normal, fields=paired)
        # They are read in the schema's order; a click's fields stand in that of the sequences.
        stored = [f for f in schema.group("item") if f in paired]
        self.output_order = [stored.index(f) for f in paired]
        # Histories are left-padded, so position T - 1 is always the newest click.
        self.positions = nn.Parameter(torch.empty(schema.history_length, width))
        tiny_normal(self.positions.data)
        self.user_read = nn.Linear(2 * width, config.attention_dim)
        self.user_score = nn.Linear(config.attention_dim, 1, bias=False)
        self.user_out = nn.Sequential(nn.Linear(width, width), nn.PReLU(init=0.1))
        self.item_read = nn.Linear(2 * width, config.attention_dim)
        self.item_target = nn.Linear(width, config.attention_dim, bias=False)
        self.item_score = nn.Linear(config.attention_dim, 1, bias=False)
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        clicks_UTE, mask_UT = self.clicks(inputs), history_mask(inputs)
        ages_UTE = torch.zeros_like(clicks_UTE) if self.ages is None else self.ages(history_age(inputs))
        placed_UTX = torch.cat([ages_UTE + self.positions, clicks_UTE], dim=-1)
        scores_UT = self.user_score(torch.tanh(self.user_read(placed_UTX))).squeeze(-1)
        history = {
            "scores": scores_UT,
            "user": self._user(scores_UT, clicks_UTE, mask_UT),
            "clicks": clicks_UTE,
            "read": self.item_read(placed_UTX),
            "mask": mask_UT,
        }
        return self.read_request(inputs) | history

    def encode_items(self, inputs: Inputs) -> Tensor:
        """[C, A + E + H]: what the attention reads of the target; output embeddings; the MLP's first layer."""
        items_CID, outputs_CSD = self.fields.item(inputs), self.output_fields.item(inputs)
        output_CE = torch.cat([outputs_CSD[:, index] for index in self.output_order], dim=-1)
        target_CA = self.item_target(self.target(items_CID))
        return torch.cat([target_CA, output_CE, self.read_item(items_CID)], dim=-1)

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        widths = [self.config.attention_dim, self.event_width, self.mlp.first.out_features]
        target_CA, output_CE, deep_CH = torch.split(items_CW, widths, dim=-1)
        read_CTA, mask_CT = (of_request(state[name], user_index) for name in ("read", "mask"))
        user_relevance_C = dot_by_request(output_CE, state["user"], user_index)
        scores_CT = self.item_score(torch.tanh(read_CTA + target_CA.unsqueeze(1))).squeeze(-1)
        weights_CT = masked_softmax(scores_CT, mask_CT)
        interest_CE = vector_by_request(weights_CT, state["clicks"], user_index)
        relevances_C2 = torch.stack([user_relevance_C, (scores_CT * mask_CT).sum(dim=-1)], dim=-1)
        return self.finish(state, deep_CH, torch.cat([interest_CE, relevances_C2], dim=-1), user_index)

    def auxiliary_loss(self, state: UserState, inputs: Inputs) -> Tensor:
        if not self.config.aux_weight:
            return super().auxiliary_loss(state, inputs)
        scores_UT, clicks_UTE, mask_UT = (state[name] for name in ("scores", "clicks", "mask"))
        before_UE = self._user(scores_UT[:, :-1], clicks_UTE[:, :-1], mask_UT[:, :-1])
        sequences = self.fields.schema.group("behaviour")
        newest = [
            self.output_fields.embed(self.fields.schema.field(str(f.of)), inputs[input_name(f)][:, -1])
            for f in sequences
        ]
        newest_UE = torch.cat(newest, dim=-1)
        known_U = mask_UT[:, -1] & mask_UT[:, :-1].any(dim=1)
        draws = range(self.config.aux_negatives)
        drawn_KU = torch.stack([torch.randperm(len(newest_UE), device=newest_UE.device) for _ in draws])
        others_KUE = newest_UE[drawn_KU]
        other_KU = known_U & mask_UT[drawn_KU, -1] & (others_KUE != newest_UE).any(dim=-1)
        scores_U, missed_KU = (before_UE * newest_UE).sum(dim=-1), (before_UE * others_KUE).sum(dim=-1)
        loss = sampled_loss(scores_U, missed_KU, known_U, other_KU, negatives=self.config.aux_negatives)
        return self.config.aux_weight * loss

    def _user(self, scores_nT: Tensor, clicks_nTE: Tensor, mask_nT: Tensor) -> Tensor:
        """The user vector [n, E]."""
        pooled_nE = (masked_softmax(scores_nT, mask_nT).unsqueeze(1) @ clicks_nTE).squeeze(1)
        user_nE: Tensor = self.user_out(pooled_nE)
        return user_nE

    def penalty(self) -> Tensor:
        return super().penalty() + self.output_fields.penalty(self.config.l2_emb)
