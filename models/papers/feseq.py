"""FESeq: Q. Yuan et al., "Feature-Interaction-Enhanced Sequential Transformer for Click-Through Rate Prediction".

Applied Sciences 14(7), 2024, doi 10.3390/app14072760. F1..F16 are the ambiguities of models.md section 3.3, "the code"
is the authors', whose form is the default.
"""

# U requests, C candidates, n: U or C; T history length, S = T + 1 with the candidate last
# F fields of an event, D width of a field, X = F * D; M width of an event in the sequence, E = 2 * M
# A width inside the pooling
# R request fields and K clock fields, F fields of an event, D width of a field, X = F * D; M width of an event
# H first layer of the head

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import gcd
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
from models.layers.base import CTRModel, Inputs, UserState
from models.layers.config import Config, Count, Share, Weight, Within
from models.layers.embeddings import FieldEmbeddings
from models.layers.initialisation import l2, start_linears, tiny_normal
from models.layers.intermediates import record
from models.layers.request_matmul import matmul_by_request
from models.layers.target_attention import TargetAttention

NEVER = -1e9  # not -inf: models.md section 9, X1
ATTENDED_TO = ("shown", "keys", "values", "met")  # of a history; its candidates need no copies of them


class Interaction(nn.Module):
    """Layers over the fields of each event or item, [*, F, D] to [*, F, D]; none leave it as it is."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x0: Tensor, name: str) -> Tensor:
        """`name`: under which the weights of attending layers are shown."""
        x = x0
        for layer in self.layers:
            x = layer(x, name) if isinstance(layer, Interacting | Disentangled) else layer(x, x0)
        return x


class Interacting(nn.Module):
    """AutoInt's layer with one head, ReLU(LN(softmax(Q K^T / sqrt(D)) V + X)); LN and scale are the code's (F7)."""

    def __init__(self, width: int, *, layer_norm: bool, dropout: float) -> None:
        super().__init__()
        self.scale = math.sqrt(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(width) if layer_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, name: str) -> Tensor:
        # The fields attended to are the rows at first: a softmax over a short last axis takes three times as long.
        weights = (self.key(x) @ (self.query(x) / self.scale).transpose(-1, -2)).softmax(dim=-2).transpose(-1, -2)
        record(name, weights)
        return F.relu(self.norm(self.dropout(weights) @ self.value(x) + x))


class Disentangled(nn.Module):
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


class Factorized(nn.Module):
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


class Cross(nn.Module):
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


def interaction(
    kind: str, layers: int, num_fields: int, width: int, *, layer_norm: bool, dropout: float
) -> Interaction:
    """That many layers of autoint, crossnet, crossnetv2, destine or final."""
    make: dict[str, Callable[[], nn.Module]] = {
        "autoint": lambda: Interacting(width, layer_norm=layer_norm, dropout=dropout),
        "crossnet": lambda: Cross(num_fields * width, full=False),
        "crossnetv2": lambda: Cross(num_fields * width, full=True),
        "destine": lambda: Disentangled(width, dropout=dropout),
        "final": lambda: Factorized(num_fields * width, dropout=dropout),
    }
    return Interaction(nn.ModuleList(make[kind]() for _ in range(layers)))


class Places(nn.Module):
    """What an event's position and its age bring to it, [n, T, X] to [n, T, M]: tables of a vector each (F2).

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
        unit_s: int,
        buckets: int,
        log2: bool,
    ) -> None:
        super().__init__()
        # Histories are left-padded, so position T - 1 is always the newest click; T is the candidate's.
        self.positions = nn.Parameter(torch.randn(length + 1, width)) if use_pos else None
        self.times = nn.Parameter(torch.randn(buckets, width)) if use_time else None
        self.concatenated, self.unit_s, self.buckets, self.log2 = concatenated, unit_s, buckets, log2
        ends = torch.tensor([unit_s << k for k in range(buckets - 1)] if log2 else [], dtype=torch.int64)
        self.register_buffer("ends", ends, persistent=False)

    def forward(self, flat_nTX: Tensor, where: slice, age_nT: Tensor) -> Tensor:
        """`where` these events stand in the sequence; ages in whole seconds."""
        places = []
        if self.positions is not None:
            places.append(self.positions[where].expand(flat_nTX.shape[0], -1, -1))
        if self.times is not None:
            places.append(F.embedding(self._bucket(age_nT), self.times))
        if self.concatenated:
            return torch.cat([flat_nTX, *places], dim=-1)
        return sum(places, start=flat_nTX)

    def _bucket(self, age_nT: Tensor) -> Tensor:
        """Whole numbers all the way: seconds since 1970 do not fit a float32 (models.md X14)."""
        if self.log2:
            return (age_nT.unsqueeze(-1) >= self.ends).sum(dim=-1)
        return age_nT.clamp(0, self.unit_s * self.buckets - 1) // self.unit_s


class Refiner(nn.Module):
    """One Transformer layer without LayerNorm: Y = E + MHA(E), then Y + W_2 LeakyReLU(W_1 Y + b_1) + b_2 (F3, F6)."""

    heads_HM: Tensor  # noqa: N815  # 1 where a place of M belongs to the head

    def __init__(self, width: int, heads: int, *, attention_dropout: float, dropout: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, math.sqrt(width / heads)
        self.query, self.shown, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, width), nn.LeakyReLU(0.01), nn.Linear(width, width))
        self.attention_dropout, self.dropout = nn.Dropout(attention_dropout), nn.Dropout(dropout)
        heads_HM = torch.eye(heads).repeat_interleave(width // heads, dim=1)
        self.register_buffer("heads_HM", heads_HM, persistent=False)

    def read(self, x_nTM: Tensor) -> Tensor:
        """What each event shows to those that attend to it, [n, T, E]: its key and its value."""
        shown_nTE: Tensor = self.shown(x_nTM)
        return shown_nTE

    def forward(self, x_nSM: Tensor, shown_nSE: Tensor, visible_nSS: Tensor) -> Tensor:
        """A whole sequence refined; each event must see at least one."""
        key_nHSW, value_nHSW = (split_heads(part, self.heads) for part in shown_nSE.chunk(2, dim=-1))
        query_nHSW = split_heads(self.query(x_nSM) / self.scale, self.heads)
        hidden_n1SS = torch.where(visible_nSS, 0.0, NEVER).to(x_nSM.dtype).unsqueeze(1)
        weights_nHSS = (query_nHSW @ key_nHSW.transpose(-1, -2) + hidden_n1SS).softmax(dim=-1)
        record("self_attn", weights_nHSS)
        return self._finish(x_nSM, merge_heads(self.attention_dropout(weights_nHSS) @ value_nHSW))

    def last(self, x_CM: Tensor, shown_UTE: Tensor, mask_CS: Tensor, user_index_C: Tensor) -> Tensor:
        """The last event of each sequence refined, which sees itself and those shown of its request before it.

        Queries stand apart by head in the full width, zeros around them: products of whole matrices, though of eight
        times the size, take half the time of as many more products of thin ones.
        """
        key_UTM, value_UTM = shown_UTE.chunk(2, dim=-1)
        key_C1M, value_C1M = self.read(x_CM).unsqueeze(1).chunk(2, dim=-1)
        query_CHM = (self.query(x_CM) / self.scale).unsqueeze(1) * self.heads_HM
        scores_CHT = matmul_by_request(query_CHM, key_UTM.transpose(-1, -2), user_index_C)
        scores_CHS = torch.cat([scores_CHT, query_CHM @ key_C1M.transpose(-1, -2)], dim=-1)
        weights_CHS = masked_softmax(scores_CHS, mask_CS.unsqueeze(1))
        record("refiner_attn", weights_CHS)
        weights_CHS = self.attention_dropout(weights_CHS)
        found_CHM = (
            matmul_by_request(weights_CHS[..., :-1], value_UTM, user_index_C) + weights_CHS[..., -1:] * value_C1M
        )
        return self._finish(x_CM, (found_CHM * self.heads_HM).sum(dim=1))

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        y = x + self.dropout(self.out(attended))
        refined: Tensor = y + self.dropout(self.ffn(y))
        return refined


class AttentionPooling(nn.Module):
    """u = PReLU(W_o sum_t alpha_t V_t + b_o), alpha the softmax of how each position's key meets the item's query.

    The query comes from tables of the item's own, which every item field has, and their own interacting layers. Scores
    are K_t W q / sqrt(A), W being folded into the keys (F10), K_t q with `dot`, or DIN's small MLP of K_t and q (F11).
    """

    def __init__(
        self,
        schema: Schema,
        interaction: Interaction,
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
        own = Schema(user_key=None, item_key=None, history_length=0, fields=items)
        self.fields = FieldEmbeddings(own, emb_dim, init=nn.init.normal_)
        self.interaction = interaction
        self.query = nn.Linear(len(items) * emb_dim, inner, bias=False)
        self.key, self.value = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.out = nn.Linear(inner, width)
        self.activation = nn.PReLU(init=0.1)  # one slope for all of them: the code's
        self.kernel = nn.Parameter(torch.eye(inner)) if scorer == "bilinear" else None
        self.meeting = TargetAttention(inner, (512, 256, 128), softmax=softmax) if scorer == "din" else None
        self.softmax, self.scale = softmax, math.sqrt(inner) if scale else 1.0
        self.attention_dropout, self.dropout = nn.Dropout(attention_dropout), nn.Dropout(dropout)

    def read(self, events_nTM: Tensor) -> UserState:
        """What these positions bring to any query."""
        key_nTA, value_nTA = (self.dropout(self.activation(layer(events_nTM))) for layer in (self.key, self.value))
        if self.meeting is not None:
            return {"keys": key_nTA, "values": value_nTA, "met": self.meeting.read(key_nTA)}
        return {"keys": key_nTA if self.kernel is None else key_nTA @ self.kernel, "values": value_nTA}

    def forward(
        self, read: UserState, index_C: Tensor, mask_CS: Tensor, candidate_CM: Tensor, inputs: Inputs
    ) -> Tensor:
        """The pooled sequence u [C, M], of what was `read` of the history that each candidate has, and its position."""
        last = self.read(candidate_CM.unsqueeze(1))
        item_CFD = self.interaction(torch.stack(self.fields.group("item", inputs), dim=1), "interact_attn_query")
        query_CA = self.dropout(self.activation(self.query(item_CFD.flatten(1))))
        alpha_CS = self._weigh(query_CA, read, last, index_C, mask_CS)
        record("pool_score", alpha_CS)
        alpha_C1S = self.attention_dropout(alpha_CS).unsqueeze(1)
        found_C1A = (
            matmul_by_request(alpha_C1S[..., :-1], read["values"], index_C) + alpha_C1S[..., -1:] * last["values"]
        )
        u_CM: Tensor = self.activation(self.out(found_C1A.squeeze(1)))
        return u_CM

    def _weigh(self, query_CA: Tensor, read: UserState, last: UserState, index_C: Tensor, mask_CS: Tensor) -> Tensor:
        if self.meeting is not None:
            keys, met = (torch.cat([read[n].index_select(0, index_C), last[n]], dim=1) for n in ("keys", "met"))
            weights_CS: Tensor = self.meeting(query_CA, keys, met, mask_CS)
            return weights_CS
        query_C1A = query_CA.unsqueeze(1) / self.scale
        scores_C1T = matmul_by_request(query_C1A, read["keys"].transpose(-1, -2), index_C)
        scores_CS = torch.cat([scores_C1T, query_C1A @ last["keys"].transpose(-1, -2)], dim=-1).squeeze(1)
        return masked_softmax(scores_CS, mask_CS) if self.softmax else scores_CS * mask_CS


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
