"""FESeq: Q. Yuan et al., "Feature-Interaction-Enhanced Sequential Transformer for Click-Through Rate Prediction".

Applied Sciences 14(7), 2024, doi 10.3390/app14072760. F1..F16 are the ambiguities of models.md section 3.3, "the code"
is the authors', whose form is the default.
"""

# U requests, C candidates, n: U or C; T history length, S = T + 1 with the candidate last
# F fields of an event, of which the request's are K, D width of a field, X = F * D; R request fields, I item fields
# M width of an event in the sequence, E = 2 * M; N heads, B = M / N; A width inside the pooling; H head's first layer

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.artifact.explanation import (
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
from models.features.schema import Schema
from models.layers.attention import masked_softmax, merge_heads, split_heads
from models.layers.base import CTRModel, Inputs, UserState, history_age, history_mask
from models.layers.config import Config, Count, Share, Weight, Within
from models.layers.embeddings import FieldEmbeddings
from models.layers.folding import of_weights
from models.layers.initialisation import l2, start_linears, tiny_normal
from models.layers.intermediates import record
from models.layers.request_matmul import of_request
from models.layers.target_attention import TargetAttention

NEVER = -1e9  # not -inf: models.md section 9, X1

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
    candidate is the last event: a sequence `of` an item field takes the item's value there, one `of` a field of the
    request its value now (the paper's stocks of coins and gadgets), and what only past events have is absent. Item
    fields that are in no sequence are known of no past click: like the request's fields they enter the head as they
    are, and like all item fields the pooling's query.

    No click sees a later event, so that the history is refined once per request, to the keys and values of sequence
    encoder and pooling; a candidate computes its own position alone. The query is the item's alone and so made once per
    version: an ad's row holds it beside the embeddings (models.md section 8.2).
    """

    earlier: Tensor
    itself: Tensor
    constant_fields: Tensor
    request_event_fields: Tensor
    paired_fields: Tensor
    unpaired_fields: Tensor
    event_order: Tensor

    def __init__(self, config: FESeqConfig, schema: Schema) -> None:
        super().__init__()
        _check_schema(schema)
        self.config = config
        self.sequences = [f.name for f in schema.history_sources]
        self.items = [f.name for f in schema.group("item")]
        requests = [f.name for f in (*schema.group("user"), *schema.group("context"))]
        self.constant = [name for name in requests if name not in self.sequences]
        self.unpaired = [name for name in self.items if name not in self.sequences]
        self.fields = FieldEmbeddings(schema, config.emb_dim, init=tiny_normal)

        self.event = self.sequences + (self.constant if config.nonseq_in_interaction else [])
        num_fields = len(self.event)
        num_encodings = config.use_pos + config.use_time if config.pos_time == "concat" else 0
        _check_heads(config, num_fields + num_encodings)
        self.width = width = (num_fields + num_encodings) * config.emb_dim
        self.length = length = schema.history_length
        self.places = PositionTimeEncoding(
            length,
            config.emb_dim if config.pos_time == "concat" else width,
            use_pos=config.use_pos,
            use_time=config.use_time,
            concatenated=config.pos_time == "concat",
            event_width=num_fields * config.emb_dim,
            unit_s=config.time_unit_s,
            buckets=config.time_buckets,
            log2=config.time_scale == "log2",
        )
        stack = partial(
            build_interaction,
            config.interaction,
            width=config.emb_dim,
            layer_norm=config.interact_ln,
            dropout=config.dropout_interact,
        )
        self.interaction = stack(config.interact_layers_in, num_fields)
        self.refiner = SequenceEncoder(
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

        paired = [name for name in self.sequences if name in self.items]
        of_request = [name for name in self.event if name in requests]
        of_past = [name for name in self.event if name not in (*self.items, *requests)]
        indices = {
            "constant_fields": [requests.index(name) for name in self.constant],
            "request_event_fields": [requests.index(name) for name in of_request],
            "paired_fields": [self.items.index(name) for name in paired],
            "unpaired_fields": [self.items.index(name) for name in self.unpaired],
            # A candidate's event has the item's fields, then the request's, then those that only past events have.
            "event_order": [(paired + of_request + of_past).index(name) for name in self.event],
        }
        for name, places in indices.items():
            self.register_buffer(name, torch.tensor(places, dtype=torch.int64), persistent=False)
        self.num_paired, self.num_past = len(paired), len(of_past)
        self.in_order = paired + of_request + of_past == self.event

    def encode_user(self, inputs: Inputs) -> UserState:
        mask_UT = history_mask(inputs)
        state: UserState = {"mask": torch.cat([mask_UT, torch.ones_like(mask_UT[:, :1])], dim=1)}
        head_UH = self.first.bias.expand(mask_UT.shape[0], -1)
        if self.fields.num_request:
            x_URD = self.fields.request(inputs)
            constant_UKD = x_URD.index_select(1, self.constant_fields)
            head_UH = head_UH + F.linear(constant_UKD.flatten(1), self._kernel("constant"))
            if self.num_paired + self.num_past < len(self.event):
                state["event"] = x_URD.index_select(1, self.request_event_fields)

        events_UTFD = self.fields.history(inputs)
        if self.constant and self.config.nonseq_in_interaction:
            repeated_UTKD = constant_UKD.unsqueeze(1).expand(-1, self.length, -1, -1)
            events_UTFD = torch.cat([events_UTFD, repeated_UTKD], dim=2)
        x_UTX = self.interaction(events_UTFD, "interact_attn_history").flatten(2)
        x_UTM = self.places(x_UTX, history_age(inputs))
        state["shown"] = self.refiner.read(x_UTM)
        if not self.config.causal:
            return state | {"events": x_UTM, "head": head_UH}
        if self.config.pool == "target":  # reads the candidate's position, which attends to clicks as they came
            return state | {"head": head_UH}
        refined_UTM = self.refiner(x_UTM, state["shown"], self._visible(mask_UT))
        return state | self._read(refined_UTM, mask_UT, head_UH)

    def encode_items(self, inputs: Inputs) -> Tensor:
        x_CID = self.fields.item(inputs)
        parts = [x_CID.index_select(1, self.paired_fields), x_CID.index_select(1, self.unpaired_fields)]
        if self.pooling is not None:
            parts.append(self.pooling.query_of(inputs))
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        num_candidates, width = items_CW.shape[0], self.config.emb_dim
        widths = [self.num_paired * width, len(self.unpaired) * width]
        paired_CX, unpaired_CX, query_CA = torch.split(items_CW, [*widths, items_CW.shape[1] - sum(widths)], dim=1)
        event_CFD = torch.unflatten(paired_CX, 1, (self.num_paired, width))
        if "event" in state:
            event_CFD = torch.cat([event_CFD, of_request(state["event"], user_index, num_candidates)], dim=1)
        if self.num_past:
            event_CFD = F.pad(event_CFD, (0, 0, 0, self.num_past))
        if not self.in_order:
            event_CFD = event_CFD.index_select(1, self.event_order)
        x_CX = self.interaction(event_CFD, "interact_attn_candidate").flatten(1)
        x_CM = self.places.of_candidate(x_CX)
        mask_CS = of_request(state["mask"], user_index)
        if self.config.causal:
            candidate_CM = self.refiner.last(x_CM, state["shown"], mask_CS, user_index)
            brought = ("head", "sum", "keys", "values", "met")
            read = {
                name: value[0] if user_index is None else value.index_select(0, user_index)
                for name, value in state.items()
                if name in brought
            }
        else:
            mask_CS = of_request(state["mask"], user_index, num_candidates)
            candidate_CM, read = self._refine_together(state, x_CM, mask_CS, user_index)

        if self.pooling is not None:
            u_CM: Tensor = self.pooling(read, mask_CS, candidate_CM, query_CA)
        elif "sum" in read:
            u_CM = read["sum"] + candidate_CM
            u_CM = u_CM / mask_CS.sum(dim=1, keepdim=True) if self.config.pool == "mean" else u_CM
        else:  # the head reads the candidate's position, and, with concat, the history by itself
            u_CM = candidate_CM
        z_CH = F.linear(torch.cat([unpaired_CX, u_CM], dim=1), self._kernel("unpaired", "pooled"))
        z_CH = z_CH + read["head"]
        logit_C1: Tensor = self.rest(z_CH)
        return logit_C1.squeeze(-1)

    def penalty(self) -> Tensor:
        return self.fields.penalty(self.config.l2_emb) + l2(self.config.l2_emb / 2, self.places.parameters())

    def explanations(self) -> tuple[Explanation, ...]:
        config, shown = self.config, []
        for name, layers in self._attending_layers().items():
            labels = tuple(self.items if name == "query" else self.event)
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

    @of_weights
    def _kernel(self, *parts: Literal["constant", "unpaired", "history", "pooled"]) -> Tensor:
        """The head's first layer where it reads constant fields, unpaired ones, the history (concat alone), or u."""
        columns = torch.split(self.first.weight, self.columns, dim=1)
        by_part = dict(zip(("constant", "unpaired", "history", "pooled"), columns, strict=True))
        return torch.cat([by_part[part] for part in parts], dim=1)

    def _refine_together(
        self, state: UserState, x_CM: Tensor, mask_CS: Tensor, user_index: Tensor | None
    ) -> tuple[Tensor, UserState]:
        """Each candidate's position [C, M] and what its history brings to the pooling, where clicks see candidates."""
        shared = {name: of_request(state[name], user_index, x_CM.shape[0]) for name in ("events", "shown", "head")}
        x_C1M = x_CM.unsqueeze(1)
        x_CSM = torch.cat([shared["events"], x_C1M], dim=1)
        shown_CSE = torch.cat([shared["shown"], self.refiner.read(x_C1M)], dim=1)
        refined_CSM = self.refiner(x_CSM, shown_CSE, self._visible(mask_CS))
        return refined_CSM[:, -1], self._read(refined_CSM[:, :-1], mask_CS[:, :-1], shared["head"])

    def _read(self, refined_nTM: Tensor, mask_nT: Tensor, head_nH: Tensor) -> UserState:
        """What a refined history brings to any candidate: to the pooling, and to the head's first layer."""
        if self.pooling is not None:
            return {"head": head_nH, **self.pooling.read(refined_nTM)}
        present_nTM = refined_nTM * mask_nT.unsqueeze(-1)
        if self.config.pool == "concat":
            return {"head": head_nH + F.linear(present_nTM.flatten(1), self._kernel("history"))}
        return {"head": head_nH} | ({"sum": present_nTM.sum(dim=1)} if self.config.pool != "target" else {})

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
    width, step = num_vectors * config.emb_dim, config.heads // math.gcd(num_vectors, config.heads)
    if width % config.heads == 0:
        return
    fitting = max(h for h in range(1, config.heads) if width % h == 0)
    raise ValueError(
        f"an event is {width} wide ({num_vectors} vectors of {config.emb_dim}), which {config.heads} heads do not"
        f" divide; take {fitting} heads, or emb_dim {-(-config.emb_dim // step) * step}"
    )


class FieldInteraction(nn.Module):
    """Layers over the fields of each event or item, [*, F, D] to [*, F, D]; none leave it as it is."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x0: Tensor, name: str) -> Tensor:
        """`name`: under which the weights of attending layers are shown."""
        x = x0
        for layer in self.layers:
            x = layer(x, name) if isinstance(layer, AutoIntLayer | DestineLayer) else layer(x, x0)
        return x


class AutoIntLayer(nn.Module):
    """AutoInt's layer with one head, ReLU(LN(softmax(Q K^T / sqrt(D)) V + X)); LN and scale are the code's (F7)."""

    def __init__(self, width: int, *, layer_norm: bool, dropout: float) -> None:
        super().__init__()
        self.scale = math.sqrt(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(width) if layer_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, name: str) -> Tensor:
        # The fields attended to are the rows at first: a softmax over a short last axis takes three times as long.
        weights = (x @ self._kernel() @ x.transpose(-1, -2)).softmax(dim=-2).transpose(-1, -2)
        record(name, weights)
        return F.relu(self.norm(self.dropout(weights) @ self.value(x) + x))

    @of_weights
    def _kernel(self) -> Tensor:
        """K Q^T / sqrt(D) = X (W_K^T W_Q / sqrt(D)) X^T: one product of X in place of two."""
        return self.key.weight.T @ self.query.weight / self.scale


class DestineLayer(nn.Module):
    """DESTINE's layer with one head: W_r X + (P + 1 u^T) V (Xu et al., CIKM 2021, and its authors' code).

    P = softmax((Q - mean Q) (K - mean K)^T / sqrt(D)) is what pairs of fields have to do with each other, whitened over
    the fields; u = softmax(X w) over the fields is what each counts for all alike. So its weights P + 1 u^T sum to 2.
    """

    def __init__(self, width: int, *, dropout: float) -> None:
        super().__init__()
        self.scale = math.sqrt(width)
        self.query, self.key, self.value, self.residual = (nn.Linear(width, width) for _ in range(4))
        self.unary = nn.Linear(width, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, name: str) -> Tensor:
        query, key = (part - part.mean(dim=-2, keepdim=True) for part in (self.query(x), self.key(x)))
        pairs = (query @ key.transpose(-1, -2) / self.scale).softmax(dim=-1)
        weights = pairs + self.unary(x).softmax(dim=-2).transpose(-1, -2)
        record(name, weights)
        out: Tensor = self.dropout(weights) @ self.value(x) + self.residual(x)
        return out


class FinalLayer(nn.Module):
    """FINAL's layer over the F * D numbers of an event, ReLU(h_2 + h_1 * h_2) with [h_2; h_1] = W x + b.

    Zhu et al., SIGIR 2023. Its batch norm is left out: padded events would count in it.
    """

    def __init__(self, width: int, *, dropout: float) -> None:
        super().__init__()
        self.kernel = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, _x0: Tensor) -> Tensor:
        second, first = self.kernel(x.flatten(-2)).chunk(2, dim=-1)
        return torch.unflatten(self.dropout(F.relu(second + first * second)), -1, (-1, x.shape[-1]))


class CrossLayer(nn.Module):
    """DCN's layer over the F * D numbers of an event, x_0 (x^T w) + b + x, or DCNv2's, x_0 * (W x + b) + x."""

    def __init__(self, width: int, *, full: bool) -> None:
        super().__init__()
        self.kernel = nn.Linear(width, width if full else 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(width))
        self.full = full

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        flat, flat0 = x.flatten(-2), x0.flatten(-2)
        crossed = flat0 * (self.kernel(flat) + self.bias) if self.full else flat0 * self.kernel(flat) + self.bias
        return torch.unflatten(crossed + flat, -1, (-1, x.shape[-1]))


def build_interaction(
    kind: str, layers: int, num_fields: int, width: int, *, layer_norm: bool, dropout: float
) -> FieldInteraction:
    """That many layers of autoint, crossnet, crossnetv2, destine or final."""
    make: dict[str, Callable[[], nn.Module]] = {
        "autoint": lambda: AutoIntLayer(width, layer_norm=layer_norm, dropout=dropout),
        "crossnet": lambda: CrossLayer(num_fields * width, full=False),
        "crossnetv2": lambda: CrossLayer(num_fields * width, full=True),
        "destine": lambda: DestineLayer(width, dropout=dropout),
        "final": lambda: FinalLayer(num_fields * width, dropout=dropout),
    }
    return FieldInteraction(nn.ModuleList(make[kind]() for _ in range(layers)))


class PositionTimeEncoding(nn.Module):
    """What an event's position and its age bring to it: a table of vectors each, concatenated or added (F2).

    Age is cut into buckets of `unit_s` seconds (F8) or, with log2, at unit_s, twice that, four times that, so that few
    of them reach over years and each is met in training. The last bucket holds whatever is older.
    """

    ends: Tensor

    def __init__(
        self,
        length: int,
        width: int,
        *,
        use_pos: bool,
        use_time: bool,
        concatenated: bool,
        event_width: int,
        unit_s: int,
        buckets: int,
        log2: bool,
    ) -> None:
        super().__init__()
        # Histories are left-padded, so position T - 1 is always the newest click; T is the candidate's.
        self.positions = nn.Parameter(torch.randn(length + 1, width)) if use_pos else None
        self.times = nn.Parameter(torch.randn(buckets, width)) if use_time else None
        self.width, self.event_width = width, event_width
        self.concatenated, self.unit_s, self.buckets, self.log2 = concatenated, unit_s, buckets, log2
        ends = torch.tensor([unit_s << k for k in range(buckets - 1)] if log2 else [], dtype=torch.int64)
        self.register_buffer("ends", ends, persistent=False)

    def forward(self, x_UTX: Tensor, age_UT: Tensor) -> Tensor:
        """The clicks, [U, T, X] to [U, T, M]; ages in whole seconds."""
        encodings = []
        if self.positions is not None:
            encodings.append(self.positions[:-1].expand(x_UTX.shape[0], -1, -1))
        if self.times is not None:
            encodings.append(F.embedding(self._bucket(age_UT), self.times))
        return torch.cat([x_UTX, *encodings], dim=-1) if self.concatenated else sum(encodings, start=x_UTX)

    def of_candidate(self, x_CX: Tensor) -> Tensor:
        """The candidates, [C, X] to [C, M]: their position is the last, their age 0."""
        encodings = [table[row] for table, row in ((self.positions, -1), (self.times, 0)) if table is not None]
        if not self.concatenated:
            return sum(encodings, start=x_CX)
        if not encodings:
            return x_CX
        encoding_Z = torch.cat(encodings)
        return F.pad(x_CX, (0, self.width * len(encodings))) + F.pad(encoding_Z, (self.event_width, 0))

    def _bucket(self, age_nT: Tensor) -> Tensor:
        """Whole numbers all the way: seconds since 1970 do not fit a float32 (models.md X14)."""
        if self.log2:
            return (age_nT.unsqueeze(-1) >= self.ends).sum(dim=-1)
        return age_nT.clamp(0, self.unit_s * self.buckets - 1) // self.unit_s


class SequenceEncoder(nn.Module):
    """One Transformer layer without LayerNorm: Y = E + MHA(E), then Y + W_2 LeakyReLU(W_1 Y + b_1) + b_2 (F3, F6)."""

    def __init__(self, width: int, heads: int, *, attention_dropout: float, dropout: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, math.sqrt(width / heads)
        self.query, self.shown, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(0.01), nn.Linear(width, width))
        self.attention_dropout, self.dropout = nn.Dropout(attention_dropout), nn.Dropout(dropout)

    def read(self, x_nTM: Tensor) -> Tensor:
        """What each event shows to those that attend to it, [n, T, E]: its key and its value."""
        shown_nTE: Tensor = self.shown(x_nTM)
        return shown_nTE

    def forward(self, x_nSM: Tensor, shown_nSE: Tensor, visible_nSS: Tensor) -> Tensor:
        """A whole sequence refined; each event must see at least one."""
        key_nNSB, value_nNSB = (split_heads(part, self.heads) for part in shown_nSE.chunk(2, dim=-1))
        query_nNSB = split_heads(self.query(x_nSM) / self.scale, self.heads)
        hidden_n1SS = torch.where(visible_nSS, 0.0, NEVER).to(x_nSM.dtype).unsqueeze(1)
        weights_nNSS = (query_nNSB @ key_nNSB.transpose(-1, -2) + hidden_n1SS).softmax(dim=-1)
        record("self_attn", weights_nNSS)
        return self._finish(x_nSM, merge_heads(self.attention_dropout(weights_nNSS) @ value_nNSB))

    def last(self, x_CM: Tensor, shown_UTE: Tensor, mask_CS: Tensor, user_index: Tensor | None) -> Tensor:
        """The last event of each sequence refined, which sees itself and those shown of its request before it.

        The mask may be that of a single request, [1, S].
        """
        query_CNB = torch.unflatten(self.query(x_CM) / self.scale, 1, (self.heads, -1))
        key_CNB, value_CNB = torch.unflatten(self.read(x_CM), 1, (2, self.heads, -1)).unbind(1)
        key_UTNB, value_UTNB = torch.unflatten(shown_UTE, 2, (2, self.heads, -1)).unbind(2)
        scores_CNT = _scores_by_head(query_CNB, key_UTNB, user_index)
        scores_CNS = torch.cat([scores_CNT, (query_CNB * key_CNB).sum(dim=-1, keepdim=True)], dim=-1)
        weights_CNS = (scores_CNS + torch.where(mask_CS, 0.0, NEVER).to(x_CM.dtype).unsqueeze(1)).softmax(dim=-1)
        record("refiner_attn", weights_CNS)
        weights_CNT, weights_CN1 = self.attention_dropout(weights_CNS).split([shown_UTE.shape[1], 1], dim=-1)
        attended_CNB = _sum_by_head(weights_CNT, value_UTNB, user_index) + weights_CN1 * value_CNB
        return self._finish(x_CM, attended_CNB.flatten(1))

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        y = x + self.dropout(self.out(attended))
        refined: Tensor = y + self.dropout(self.ffn(y))
        return refined


def _scores_by_head(query_CNB: Tensor, key_UTNB: Tensor, user_index: Tensor | None) -> Tensor:
    """Each candidate's queries times the keys of its own request, [C, N, T]."""
    if user_index is None:
        return (query_CNB.transpose(0, 1) @ key_UTNB[0].permute(1, 2, 0)).transpose(0, 1)
    # Products of so thin matrices, one a candidate and head, take longer than this.
    return (query_CNB.unsqueeze(1) * key_UTNB.index_select(0, user_index)).sum(dim=-1).transpose(1, 2)


def _sum_by_head(weights_CNT: Tensor, value_UTNB: Tensor, user_index: Tensor | None) -> Tensor:
    """The values of each candidate's own request, weighed and summed over its events, [C, N, B]."""
    if user_index is None:
        return (weights_CNT.transpose(0, 1) @ value_UTNB[0].transpose(0, 1)).transpose(0, 1)
    return (weights_CNT.transpose(1, 2).unsqueeze(-1) * value_UTNB.index_select(0, user_index)).sum(dim=1)


class AttentionPooling(nn.Module):
    """u = PReLU(W_o sum_t alpha_t V_t + b_o), alpha the softmax of how each position's key meets the item's query.

    The query comes from tables of the item's own, which every item field has, and their own interacting layers. Scores
    are K_t W q / sqrt(A) (F10), K_t q with `dot`, or DIN's small MLP of K_t and q (F11).
    """

    def __init__(
        self,
        schema: Schema,
        interaction: FieldInteraction,
        *,
        emb_dim: int,
        width: int,
        inner: int,
        scorer: str,
        softmax: bool,
        scale: bool,
        attention_dropout: float,
        dropout: float,
    ) -> None:
        """`interaction` is that of the item's fields, `width` an event's, `inner` that of query, key and value."""
        super().__init__()
        items = schema.group("item")
        item_schema = Schema(user_key=None, item_key=None, history_length=0, fields=items)
        self.fields = FieldEmbeddings(item_schema, emb_dim, init=nn.init.normal_)
        self.interaction = interaction
        self.query = nn.Linear(len(items) * emb_dim, inner, bias=False)
        self.key, self.value = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.out = nn.Linear(inner, width)
        self.activation = nn.PReLU(init=0.1)  # one slope for all of them: the code's
        self.kernel = nn.Parameter(torch.eye(inner)) if scorer == "bilinear" else None
        self.meeting = TargetAttention(inner, (512, 256, 128), softmax=softmax) if scorer == "din" else None
        self.softmax, self.scale = softmax, math.sqrt(inner) if scale else 1.0
        self.attention_dropout, self.dropout = nn.Dropout(attention_dropout), nn.Dropout(dropout)

    def query_of(self, inputs: Inputs) -> Tensor:
        """What each item meets the keys with, [C, A]: its query q, or W q, over the scale."""
        item_CID = self.interaction(self.fields.item(inputs), "interact_attn_query")
        query_CA: Tensor = self.dropout(self.activation(self.query(item_CID.flatten(1))))
        if self.meeting is not None:
            return query_CA
        return (query_CA if self.kernel is None else F.linear(query_CA, self.kernel)) / self.scale

    def read(self, events_nTM: Tensor) -> UserState:
        """What these positions bring to any query."""
        key_nTA, value_nTA = self._keys_and_values(events_nTM)
        state = {"keys": key_nTA, "values": value_nTA}
        return state if self.meeting is None else state | {"met": self.meeting.read(key_nTA)}

    def forward(self, read: UserState, mask_CS: Tensor, candidate_CM: Tensor, query_CA: Tensor) -> Tensor:
        """The pooled sequence u [C, M], of what was `read` of a history and the candidate's position.

        A history is [C, T, A], each candidate's, or [T, A], that of all.
        """
        key_CA, value_CA = self._keys_and_values(candidate_CM)
        if self.meeting is not None:
            alpha_CS = self._meet(query_CA, read, key_CA, mask_CS)
        else:
            scores_CT = (query_CA.unsqueeze(1) @ read["keys"].transpose(-1, -2)).squeeze(1)
            scores_CS = torch.cat([scores_CT, (query_CA * key_CA).sum(dim=-1, keepdim=True)], dim=-1)
            alpha_CS = masked_softmax(scores_CS, mask_CS) if self.softmax else scores_CS * mask_CS
        record("pool_score", alpha_CS)
        alpha_CT, alpha_C1 = self.attention_dropout(alpha_CS).split([read["values"].shape[-2], 1], dim=-1)
        pooled_CA = (alpha_CT.unsqueeze(1) @ read["values"]).squeeze(1)
        u_CM: Tensor = self.activation(self.out(pooled_CA + alpha_C1 * value_CA))
        return u_CM

    def _keys_and_values(self, events: Tensor) -> tuple[Tensor, Tensor]:
        """[*, M] to keys and values, [*, A] each."""
        keys, values = self.dropout(self.activation(F.linear(events, self._key_and_value()))).chunk(2, dim=-1)
        return keys, values

    @of_weights
    def _key_and_value(self) -> Tensor:
        return torch.cat([self.key.weight, self.value.weight])

    def _meet(self, query_CA: Tensor, read: UserState, key_CA: Tensor, mask_CS: Tensor) -> Tensor:
        assert self.meeting is not None
        key_C1A = key_CA.unsqueeze(1)
        last = {"keys": key_C1A, "met": self.meeting.read(key_C1A)}
        of_each = {n: read[n] if read[n].dim() == 3 else read[n].expand(query_CA.shape[0], -1, -1) for n in last}
        keys_CSA, met_CSA = (torch.cat([of_each[name], last[name]], dim=1) for name in last)
        weights_CS: Tensor = self.meeting(query_CA, keys_CSA, met_CSA, mask_CS)
        return weights_CS
