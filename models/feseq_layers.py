"""What FESeq is made of: how the fields of one event interact, how events attend to each other, how they are pooled.

F1..F16 are the ambiguities of models.md section 3.3, "the code" is the authors'.
"""

# U requests, C candidates, n: U or C; T history length, S = T + 1 with the candidate last
# F fields of an event, D width of a field, X = F * D; M width of an event in the sequence, E = 2 * M
# A width inside the pooling

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.baselines.din import DINConfig, TargetAttention
from models.blocks import FieldEmbeddings, Inputs, UserState, masked_softmax, merge_heads, split_heads
from models.own import matmul_own
from models.schema import Schema
from models.taps import tap

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
        tap(name, weights)
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
        tap(name, weights)
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
        tap("self_attn", weights_nHSS)
        return self._finish(x_nSM, merge_heads(self.attention_dropout(weights_nHSS) @ value_nHSW))

    def last(self, x_CM: Tensor, shown_UTE: Tensor, mask_CS: Tensor, user_index_C: Tensor) -> Tensor:
        """The last event of each sequence refined, which sees itself and those shown of its request before it.

        Queries stand apart by head in the full width, zeros around them: products of whole matrices, though of eight
        times the size, take half the time of as many more products of thin ones.
        """
        key_UTM, value_UTM = shown_UTE.chunk(2, dim=-1)
        key_C1M, value_C1M = self.read(x_CM).unsqueeze(1).chunk(2, dim=-1)
        query_CHM = (self.query(x_CM) / self.scale).unsqueeze(1) * self.heads_HM
        scores_CHT = matmul_own(query_CHM, key_UTM.transpose(-1, -2), user_index_C)
        scores_CHS = torch.cat([scores_CHT, query_CHM @ key_C1M.transpose(-1, -2)], dim=-1)
        weights_CHS = masked_softmax(scores_CHS, mask_CS.unsqueeze(1))
        tap("refiner_attn", weights_CHS)
        weights_CHS = self.attention_dropout(weights_CHS)
        found_CHM = matmul_own(weights_CHS[..., :-1], value_UTM, user_index_C) + weights_CHS[..., -1:] * value_C1M
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
        din = DINConfig(attention_hidden=(512, 256, 128), attention_softmax=softmax)
        self.meeting = TargetAttention(din, inner) if scorer == "din" else None
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
        tap("pool_score", alpha_CS)
        alpha_C1S = self.attention_dropout(alpha_CS).unsqueeze(1)
        found_C1A = matmul_own(alpha_C1S[..., :-1], read["values"], index_C) + alpha_C1S[..., -1:] * last["values"]
        u_CM: Tensor = self.activation(self.out(found_C1A.squeeze(1)))
        return u_CM

    def _weigh(self, query_CA: Tensor, read: UserState, last: UserState, index_C: Tensor, mask_CS: Tensor) -> Tensor:
        if self.meeting is not None:
            keys, met = (torch.cat([read[n].index_select(0, index_C), last[n]], dim=1) for n in ("keys", "met"))
            weights_CS: Tensor = self.meeting(query_CA, keys, met, mask_CS)
            return weights_CS
        query_C1A = query_CA.unsqueeze(1) / self.scale
        scores_C1T = matmul_own(query_C1A, read["keys"].transpose(-1, -2), index_C)
        scores_CS = torch.cat([scores_C1T, query_C1A @ last["keys"].transpose(-1, -2)], dim=-1).squeeze(1)
        return masked_softmax(scores_CS, mask_CS) if self.softmax else scores_CS * mask_CS
