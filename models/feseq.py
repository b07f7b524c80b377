"""FESeq: Q. Yuan et al., "Feature-Interaction-Enhanced Sequential Transformer for Click-Through Rate Prediction".

Applied Sciences 14(7), 2024, doi 10.3390/app14072760. F1..F16 are the ambiguities of models.md section 3.3, "the code"
is the authors', whose form is the default.
"""

# U requests, C candidates, n: U or C; T history length, S = T + 1 with the candidate last
# R request fields and K clock fields, F fields of an event, D width of a field, X = F * D; M width of an event
# H first layer of the head

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import gcd
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import CTRModel, FieldEmbeddings, Inputs, UserState, l2, start_linears, tiny_normal
from models.config import Config, Count, Share, Weight, Within
from models.explanation import (
    ATTENDED,
    ATTENDED_EVENT,
    BEHAVIOUR,
    CANDIDATE,
    EVENT,
    LOOKS,
    REQUEST,
    Axis,
    Explanation,
    numbered,
)
from models.feseq_layers import ATTENDED_TO, AttentionPooling, Places, Refiner, interaction
from models.schema import Schema

Layers = Annotated[int, Within(low=0, below=4)]


@dataclass(frozen=True, kw_only=True)
class FESeqConfig(Config):
    """The code's model; options named F.. settle what the paper leaves open (models.md section 3.3)."""

    emb_dim: Count = 16
    interaction: Literal["autoint", "crossnet", "crossnetv2", "destine", "final"] = "autoint"
    interact_layers_in: Layers = 2
    interact_layers_item: Layers = 2
    interact_ln: bool = True  # F7
    nonseq_in_interaction: bool = True  # false: request fields stand in no event, only before the head
    use_pos: bool = True
    use_time: bool = True
    pos_time: Literal["concat", "add"] = "concat"  # F2
    time_unit_s: Count = 3600  # F8: the first bucket; the last one holds whatever is older
    time_buckets: Count = 4000
    time_scale: Literal["linear", "log2"] = "linear"  # log2: each bucket ends at twice the age of the one before (F12)
    causal: bool = True  # false: past clicks see the candidate, and all is computed once per candidate
    heads: Count = 8
    pool: Literal["attention", "target", "mean", "sum", "concat"] = "attention"
    pool_attn: Literal["bilinear", "dot", "din"] = "bilinear"  # F11
    pool_softmax: bool = True  # F4
    pool_scale: bool = True  # not with din, which has no scale
    pool_width: Count = 128
    hidden: tuple[Count, ...] = (1024, 512, 256)
    dropout_attention: Share = 0.1  # of the weights of refiner and pooling
    dropout_interact: Share = 0.1  # of the interacting layers' weights
    dropout_net: Share = 0.0  # everywhere else
    l2_emb: Weight = 0.0  # (weight / 2) * sum of squares of the input, position and time tables

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_scale == "log2" and self.time_buckets > 65 - self.time_unit_s.bit_length():
            raise ValueError(
                f"option time_buckets: expected at most {65 - self.time_unit_s.bit_length()} with time_scale log2 and"
                f" time_unit_s {self.time_unit_s}, where an age of 64 bits ends, got {self.time_buckets}"
            )


class FESeq(CTRModel):
    """Fields interact inside every event, events attend to each other, and the candidate's own tables pool them.

    An event holds the values of the sequence fields; the request's other fields are repeated in each of them. The
    candidate is the last event: a sequence `of` an item field takes the item's value there, one `of` a clock field the
    request's. Item fields that are in no sequence are known of no past click: like the request's fields they enter the
    head as they are, and like all item fields the pooling's query.

    No click sees a later event, so that the history is refined once per request, to the keys and values of refiner and
    pooling; a candidate computes its own position alone (models.md section 8.2).
    """

    earlier: Tensor
    itself: Tensor

    def __init__(self, config: FESeqConfig, schema: Schema) -> None:
        super().__init__()
        _check_schema(schema)
        self.config = config
        self.sequences = [str(f.of) for f in schema.group("behaviour")]
        self.items = [f.name for f in schema.group("item")]
        self.requests = [f.name for f in (*schema.group("user"), *schema.group("context"))]
        self.constant = [name for name in self.requests if name not in self.sequences]
        self.unpaired = [name for name in self.items if name not in self.sequences]
        self.fields = FieldEmbeddings(schema, config.emb_dim, init=tiny_normal)

        num_fields = len(self.sequences) + (len(self.constant) if config.nonseq_in_interaction else 0)
        num_places = config.use_pos + config.use_time if config.pos_time == "concat" else 0
        _check_heads(config, num_fields + num_places)
        self.width = width = (num_fields + num_places) * config.emb_dim
        self.length = length = schema.history_length
        self.places = Places(
            length,
            config.emb_dim if config.pos_time == "concat" else width,
            use_pos=config.use_pos,
            use_time=config.use_time,
            concatenated=config.pos_time == "concat",
            unit_s=config.time_unit_s,
            buckets=config.time_buckets,
            log2=config.time_scale == "log2",
        )
        stack = partial(
            interaction,
            config.interaction,
            width=config.emb_dim,
            layer_norm=config.interact_ln,
            dropout=config.dropout_interact,
        )
        self.interaction = stack(config.interact_layers_in, num_fields)
        self.refiner = Refiner(
            width, config.heads, attention_dropout=config.dropout_attention, dropout=config.dropout_net
        )
        self.pooling: AttentionPooling | None = None
        if config.pool == "attention":
            self.pooling = AttentionPooling(
                schema,
                stack(config.interact_layers_item, len(self.items)),
                emb_dim=config.emb_dim,
                width=width,
                inner=config.pool_width,
                scorer=config.pool_attn,
                softmax=config.pool_softmax,
                scale=config.pool_scale,
                attention_dropout=config.dropout_attention,
                dropout=config.dropout_net,
            )

        self.columns = [len(names) * config.emb_dim for names in (self.constant, self.unpaired)]
        self.columns += [length * width if config.pool == "concat" else 0, width]
        widths = (*config.hidden, 1)
        self.first = nn.Linear(sum(self.columns), widths[0])
        self.rest = nn.Sequential()
        for this, following in pairwise(widths):
            self.rest.extend([nn.LeakyReLU(0.01), nn.Dropout(config.dropout_net), nn.Linear(this, following)])
        start_linears(self, nn.init.xavier_normal_)

        size = length if config.causal else length + 1
        every = torch.ones(size, size, dtype=torch.bool)
        self.register_buffer("earlier", every.tril() if config.causal else every, persistent=False)
        self.register_buffer("itself", torch.eye(size, dtype=torch.bool), persistent=False)

    def encode_user(self, inputs: Inputs) -> UserState:
        fields = self.fields.group("user", inputs) + self.fields.group("context", inputs)
        vectors = dict(zip(self.requests, fields, strict=True))
        state: UserState = {"mask": inputs["hist_mask"]}
        if self.constant:
            state["constant"] = torch.stack([vectors[name] for name in self.constant], dim=1)
            state["head"] = F.linear(state["constant"].flatten(1), self._kernel(0))
        state |= {f"clock.{name}": vectors[name] for name in self.sequences if name in vectors}

        events_UTFD = torch.stack(self.fields.history(inputs), dim=2)
        if self.constant and self.config.nonseq_in_interaction:
            repeated_UTRD = state["constant"].unsqueeze(1).expand(-1, self.length, -1, -1)
            events_UTFD = torch.cat([events_UTFD, repeated_UTRD], dim=2)
        x_UTX = self.interaction(events_UTFD, "interact_attn_history").flatten(2)
        x_UTM = self.places(x_UTX, slice(0, self.length), inputs["hist_age"])
        state["shown"] = self.refiner.read(x_UTM)
        if not self.config.causal:
            return state | {"events": x_UTM}
        if self.config.pool == "target":  # reads the candidate's position, which attends to clicks as they came
            return state
        refined_UTM = self.refiner(x_UTM, state["shown"], self._visible(state["mask"]))
        return state | self._read(refined_UTM, state["mask"])

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        index_C = inputs["user_index"]
        own = {name: value.index_select(0, index_C) for name, value in state.items() if name not in ATTENDED_TO}
        items = dict(zip(self.items, self.fields.group("item", inputs), strict=True))
        x_CFD = torch.stack([items[n] if n in items else own[f"clock.{n}"] for n in self.sequences], dim=1)
        if self.constant and self.config.nonseq_in_interaction:
            x_CFD = torch.cat([x_CFD, own["constant"]], dim=1)
        x_CX = self.interaction(x_CFD, "interact_attn_candidate").flatten(1)
        now_C1 = torch.zeros_like(index_C).unsqueeze(1)
        x_C1M = self.places(x_CX.unsqueeze(1), slice(self.length, None), now_C1)
        mask_CT = own["mask"]
        mask_CS = torch.cat([mask_CT, torch.ones_like(mask_CT[:, :1])], dim=1)
        if self.config.causal:
            candidate_CM = self.refiner.last(x_C1M.squeeze(1), state["shown"], mask_CS, index_C)
            read = state
        else:
            x_CSM = torch.cat([own["events"], x_C1M], dim=1)
            shown_CTE = state["shown"].index_select(0, index_C)
            shown_CSE = torch.cat([shown_CTE, self.refiner.read(x_C1M)], dim=1)
            refined_CSM = self.refiner(x_CSM, shown_CSE, self._visible(mask_CS))
            candidate_CM = refined_CSM[:, -1]
            own |= self._read(refined_CSM[:, :-1], mask_CT)
            read, index_C = own, torch.arange(index_C.shape[0], device=index_C.device)

        if self.pooling is not None:
            u_CM: Tensor = self.pooling(read, index_C, mask_CS, candidate_CM, inputs)
        else:
            u_CM = self._pool(own, mask_CS, candidate_CM)
        z_CH = F.linear(u_CM, self._kernel(3), self.first.bias)
        if self.unpaired:
            z_CH = z_CH + F.linear(torch.cat([items[name] for name in self.unpaired], dim=-1), self._kernel(1))
        z_CH = sum((own[part] for part in ("head", "history") if part in own), start=z_CH)
        logit_C1: Tensor = self.rest(z_CH)
        return logit_C1.squeeze(-1)

    def penalty(self) -> Tensor:
        return self.fields.penalty(self.config.l2_emb) + l2(self.config.l2_emb / 2, self.places.parameters())

    def explanations(self) -> tuple[Explanation, ...]:
        config, shown = self.config, []
        for name, layers in self._attending_layers().items():
            event = self.sequences + (self.constant if config.nonseq_in_interaction else [])
            labels = tuple(self.items if name == "query" else event)
            fields = [Axis(name=axis, labels=labels) for axis in ("field", "attended_field")]
            rows = (REQUEST, layers, BEHAVIOUR) if name == "history" else (CANDIDATE, layers)
            meaning = f"Inside {_INSIDE[name]}. {LOOKS if config.interaction == 'autoint' else _LOOKS_TWICE}"
            shown.append(Explanation(name=f"interact_attn_{name}", axes=(*rows, *fields), meaning=meaning))
        heads = numbered("head", config.heads)
        if config.causal:
            axes = (REQUEST, heads, BEHAVIOUR, ATTENDED)
            if config.pool != "target":
                shown.append(Explanation(name="self_attn", axes=axes, meaning=_SELF.format("or an earlier one")))
            meaning = "Which events the candidate attends to before any are pooled; sums to 1."
            shown.append(Explanation(name="refiner_attn", axes=(CANDIDATE, heads, EVENT), meaning=meaning))
        else:
            axes = (CANDIDATE, heads, EVENT, ATTENDED_EVENT)
            shown.append(Explanation(name="self_attn", axes=axes, meaning=_SELF.format("or any other")))
        if self.pooling is not None:
            meaning = "How much of each event, the candidate being the last, the pooling takes up; " + (
                "sums to 1." if config.pool_softmax else "below 0 it is taken away."
            )
            shown.append(Explanation(name="pool_score", axes=(CANDIDATE, EVENT), meaning=meaning))
        return tuple(shown)

    def _attending_layers(self) -> dict[str, Axis]:
        """The interacting layers whose weights can be shown, by what they stand inside of."""
        inside = {"history": self.config.interact_layers_in, "candidate": self.config.interact_layers_in}
        inside["query"] = self.config.interact_layers_item if self.pooling is not None else 0
        attend = self.config.interaction in ("autoint", "destine")
        return {name: numbered("layer", layers) for name, layers in inside.items() if layers and attend}

    def _kernel(self, part: int) -> Tensor:
        """The head's first layer where it reads constant fields, unpaired ones, the history (concat alone), or u."""
        return torch.split(self.first.weight, self.columns, dim=1)[part]

    def _read(self, refined_nTM: Tensor, mask_nT: Tensor) -> UserState:
        """What a refined history brings to the pooling of any candidate; to `target`'s, nothing."""
        if self.pooling is not None:
            return self.pooling.read(refined_nTM)
        present_nTM = refined_nTM * mask_nT.unsqueeze(-1)
        if self.config.pool == "concat":
            return {"history": F.linear(present_nTM.flatten(1), self._kernel(2))}
        return {"sum": present_nTM.sum(dim=1)} if self.config.pool != "target" else {}

    def _pool(self, own: UserState, mask_CS: Tensor, candidate_CM: Tensor) -> Tensor:
        """What the head reads, u [C, M]; for `concat`, whose history goes there by itself, the candidate's position."""
        if "sum" not in own:
            return candidate_CM
        sum_CM = own["sum"] + candidate_CM
        return sum_CM / mask_CS.sum(dim=1, keepdim=True) if self.config.pool == "mean" else sum_CM

    def _visible(self, present_nS: Tensor) -> Tensor:
        """[n, S, S]: which event (a column) each event (a row) sees; itself always, so that none sees nothing."""
        return (present_nS.unsqueeze(1) & self.earlier) | self.itself


_LOOKS_TWICE = "How each field (a row, which sums to 2) attends to the fields: half by its own choice, half as all do."
_INSIDE = {
    "history": "each past click",
    "candidate": "the candidate's event",
    "query": "the item that asks the pooling",
}
_SELF = "Which events each event (a row, which sums to 1) attends to: itself {}."


def _check_schema(schema: Schema) -> None:
    if not schema.group("behaviour"):
        raise ValueError("FESeq refines a sequence of past clicks; the schema has no sequence field")
    if not schema.group("item"):
        raise ValueError("FESeq needs an item field; the schema has none")


def _check_heads(config: FESeqConfig, num_vectors: int) -> None:
    width, step = num_vectors * config.emb_dim, config.heads // gcd(num_vectors, config.heads)
    if width % config.heads == 0:
        return
    fitting = max(h for h in range(1, config.heads) if width % h == 0)
    raise ValueError(
        f"an event is {width} wide ({num_vectors} vectors of {config.emb_dim}), which {config.heads} heads do not"
        f" divide; take {fitting} heads, or emb_dim {-(-config.emb_dim // step) * step}"
    )
