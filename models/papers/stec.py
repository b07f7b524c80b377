"""STEC: S. Dilbaz and H. Saribas, "STEC: See-Through Transformer-based Encoder for CTR Prediction".

arXiv 2308.15033. Equation numbers are the paper's; S1..S12 are the ambiguities listed in models.md section 4.3.
"""

# C candidates; R fields of the request, G of the item; D embedding width, P pairs of fields, O first layer of the head
# I, J one kind of field, R or G; Q pairs of two such; X = P * D; K numbers that are the candidate's own
# U requests, C candidates, n: U or C; F flat fields (R of the request first, G of the item), P pairs of fields
# X fields that attend, Y fields attended to; H heads, D embedding width, W = D / H; O first layer of the head

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.artifact.explanation import BIAS, CANDIDATE, LOOKS, Explanation, numbered, of_fields, of_pairs
from models.features.schema import Schema
from models.layers.attention import SelfAttention, merge_heads, split_heads
from models.layers.base import CTRModel, Inputs, UserState
from models.layers.config import Config, Count, Share, Weight
from models.layers.embeddings import FieldEmbeddings
from models.layers.initialisation import start_linears, tiny_normal
from models.layers.intermediates import is_recording, record
from models.layers.mlp import MLP
from models.layers.request_matmul import if_one_request


class PairReader(nn.Module):
    """Batch norm with fixed statistics, then the head's first layer, of b_ij = l_i * r_j of all pairs at all levels.

    Both are linear in b_ij, so a pair of two request fields is read once. A pair of both kinds is linear in the item's
    field: sum_i W_ij (l_i * r_j) = M_j r_j with M_j = sum_i W_ij diag(l_i), which is made once.
    """

    def __init__(self, first_P: Tensor, second_P: Tensor, num_request: int) -> None:
        super().__init__()
        kinds = {"rr": (True, True), "rg": (True, False), "gr": (False, True), "gg": (False, False)}
        self.num_pairs = {}
        for kind, (left, right) in kinds.items():
            places_Q = (((first_P < num_request) == left) & ((second_P < num_request) == right)).nonzero()[:, 0]
            self.num_pairs[kind] = len(places_Q)
            self.register_buffer(kind, places_Q, persistent=False)
            self.register_buffer(f"{kind}_left", first_P[places_Q] - num_request * (not left), persistent=False)
            self.register_buffer(f"{kind}_right", second_P[places_Q] - num_request * (not right), persistent=False)

    def forward(self, levels: Sequence[Sequence[Tensor]], norms: Sequence[nn.BatchNorm1d], first: nn.Linear) -> Tensor:
        """The first layer's output [C, O].

        `levels`: the request's l [1, R, D] and r [1, R, D], then the item's, [C, G, D] both, at each level.
        """
        weights_OX = torch.unflatten(first.weight, 1, (-1, norms[0].num_features)).unbind(1)
        if len(weights_OX) < len(levels):
            weights_OX *= len(levels)  # the levels are added up before the layer
        fixed: Tensor = first.bias
        own_CK, weight_KO = [], []
        for norm, weight_OX, level in zip(norms, weights_OX, levels, strict=True):
            left_1RD, right_1RD, left_CGD, right_CGD = level
            scale_X, shift_X = _affine(norm)
            weight_OPD = torch.unflatten(weight_OX * scale_X, 1, (-1, left_1RD.shape[-1]))
            of_request_1O = F.linear(self._products("rr", left_1RD, right_1RD), self._of("rr", weight_OPD).flatten(1))
            fixed = fixed + F.linear(shift_X, weight_OX) + of_request_1O
            weight_ORGD = torch.unflatten(self._of("rg", weight_OPD), 1, (left_1RD.shape[1], -1))
            own_CK.append(right_CGD.transpose(1, 2).flatten(1))
            weight_KO.append(_read_by(left_1RD, weight_ORGD.transpose(1, 2)))
            if self.num_pairs["gr"]:
                own_CK.append(left_CGD.transpose(1, 2).flatten(1))
                weight_OGRD = torch.unflatten(self._of("gr", weight_OPD), 1, (-1, left_1RD.shape[1]))
                weight_KO.append(_read_by(right_1RD, weight_OGRD))
            if self.num_pairs["gg"]:
                own_CK.append(self._products("gg", left_CGD, right_CGD))
                weight_KO.append(self._of("gg", weight_OPD).flatten(1).T)
        return torch.cat(own_CK, dim=1) @ torch.cat(weight_KO) + fixed

    def _of(self, kind: str, weight_OPD: Tensor) -> Tensor:
        return weight_OPD.index_select(1, self.get_buffer(kind))

    def _products(self, kind: str, left_nID: Tensor, right_nJD: Tensor) -> Tensor:
        first_Q, second_Q = self.get_buffer(f"{kind}_left"), self.get_buffer(f"{kind}_right")
        return (left_nID.index_select(1, first_Q) * right_nJD.index_select(1, second_Q)).flatten(1)


def _affine(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """What a batch norm with fixed statistics multiplies by, and then adds."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale_X = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale_X, norm.bias - norm.running_mean * scale_X


def _read_by(request_1RD: Tensor, weight_OGRD: Tensor) -> Tensor:
    """The weights [D * G, O] of the item's fields, once they are multiplied by the request's and summed over those."""
    # Batched over D as plain products: an einsum over the weights as they lie costs more than all it saves.
    weight_DXR = weight_OGRD.permute(3, 1, 0, 2).flatten(1, 2)
    read_DX1 = weight_DXR @ request_1RD.permute(2, 1, 0)
    return read_DX1.reshape(-1, weight_OGRD.shape[0])


@dataclass(frozen=True, kw_only=True)
class STECConfig(Config):
    """The paper's model with a linear head; options named S.. settle what the paper leaves open."""

    emb_dim: Count = 16
    blocks: Count = 2
    heads: Count = 2
    pairs: Literal["upper", "upper_diag", "all"] = "upper"  # S3
    bilinear: Literal["implicit", "explicit"] = "implicit"  # explicit: the ablation STEC_BL
    bilinear_form: Literal["merged", "qk", "blockdiag"] = "merged"  # S4
    interaction: Literal["vector", "scalar"] = "vector"  # S5
    block_norm: Literal["post", "pre", "none"] = "post"  # S6
    ffn: bool = True  # false with explicit: the ablation STEC_NF
    fusion: Literal["concat", "last", "add"] = "concat"  # last, add: the ablations STEC_LO and STEC_F
    field_mask: Literal["none", "user_first"] = "none"  # user_first: the request's fields do not attend to the item's
    hidden: tuple[Count, ...] = ()
    batch_norm: bool = False  # in the head's hidden layers too
    dropout: Share = 0.0
    l2_emb: Weight = 0.0  # (weight / 2) * sum of squares of the tables

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.emb_dim % self.heads:
            raise ValueError(f"option heads: {self.heads} do not divide emb_dim {self.emb_dim}")
        if self.field_mask == "user_first" and self.bilinear == "explicit":
            raise ValueError("option field_mask: user_first goes with bilinear implicit, got explicit")


class STEC(CTRModel):
    """A Transformer over the fields whose attention scores, before they are summed, are bilinear interactions.

    Flat fields only: the history is not read. From the first block on every field has attended to the candidate, so
    no more than the embeddings and the first level's pairs can be shared among a request's candidates (models.md
    section 8.3); sharing these pairs was tried, gained 1.06 to 1.19 times with two blocks, and was dropped. With
    `field_mask` user_first, another model and ours, the request's fields run through all blocks once and a candidate
    computes only its own; candidates of one request share their fields' part of the head, too (models/papers/stec.py).
    """

    def __init__(self, config: STECConfig, schema: Schema) -> None:
        super().__init__()
        self.config = config
        self.fields = FieldEmbeddings(schema, config.emb_dim, init=tiny_normal)
        num_fields = sum(len(schema.group(group)) for group in ("user", "context", "item"))
        if num_fields < 2:
            raise ValueError(f"STEC is about pairs of fields; the schema has {num_fields} outside the history")
        self.blocks = nn.ModuleList(Block(config, num_fields) for _ in range(config.blocks))
        self.last_norm = nn.LayerNorm(config.emb_dim) if config.block_norm == "pre" else nn.Identity()
        self.last = Bilinear(config, num_fields)  # section 3.3.2: N blocks make N + 1 interactions
        levels = 1 if config.fusion == "last" else config.blocks + 1
        self.norms = nn.ModuleList(nn.BatchNorm1d(self.last.num_outputs) for _ in range(levels))
        fused = self.last.num_outputs * (levels if config.fusion == "concat" else 1)
        self.head = MLP(fused, config.hidden, dropout=config.dropout, batch_norm=config.batch_norm)
        num_request = len(schema.group("user")) + len(schema.group("context"))
        self.request_first = config.field_mask == "user_first" and 0 < num_request < num_fields
        self.pairs = PairReader(self.last.first, self.last.second, num_request)
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        fields = self.fields.group("user", inputs) + self.fields.group("context", inputs)
        if not fields:
            return {}
        x_URD = torch.stack(fields, dim=1)
        return self._levels(x_URD, {}) if self.request_first else {"fields": x_URD}

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        user_index = inputs["user_index"]
        parts = [state["fields"].index_select(0, user_index)] if "fields" in state else []
        items = self.fields.group("item", inputs)
        if items:
            parts.append(torch.stack(items, dim=1))
        own = {name: value.index_select(0, user_index) for name, value in state.items() if name != "fields"}
        levels = self._levels(torch.cat(parts, dim=1), own)
        for n in range(len(self.blocks) if is_recording() else 0):
            self._show_attention(own.get(f"weights.{n}"), levels.get(f"weights.{n}"))
        names = [f"{side}.{n}" for side in ("left", "right") for n in range(len(self.blocks) + 1)]
        if not own or self.training or is_recording() or self.config.interaction == "scalar":
            normed = self._normed([torch.cat([own[n], levels[n]], dim=1) if own else levels[n] for n in names])
            self._show_pairs(normed)
            logits_C: Tensor = self.head(self._fuse(normed))
            return logits_C
        operands = (user_index, *(state[name] for name in names), *(levels[name] for name in names))
        return if_one_request(operands[1].shape[0], self._of_one_request, self._of_any, operands)

    def _of_any(self, user_index: Tensor, *factors: Tensor) -> Tensor:
        """The logits [C], given the factors of each request's fields and those of each candidate's."""
        num = len(factors) // 2
        own = [factor_URD.index_select(0, user_index) for factor_URD in factors[:num]]
        whole = [torch.cat(both, dim=1) for both in zip(own, factors[num:], strict=True)]
        logits_C: Tensor = self.head(self._fuse(self._normed(whole)))
        return logits_C

    def _of_one_request(self, user_index: Tensor, *factors: Tensor) -> Tensor:  # noqa: ARG002  # `_of_any` needs it
        """The same where there is one request, whose fields meet the head's first layer once."""
        num = len(self.blocks) + 1
        sides = [factors[n * num : (n + 1) * num][-len(self.norms) :] for n in range(4)]
        levels = [(left[:1], right[:1], *of_item) for left, right, *of_item in zip(*sides, strict=True)]
        norms = [norm for norm in self.norms if isinstance(norm, nn.BatchNorm1d)]
        return self.head.finish(self.pairs(levels, norms, self.head.first))

    def _levels(self, x_nXD: Tensor, seen: UserState) -> UserState:
        """Of these fields both factors of each level's products, and values; `seen`: of those they attend to, too."""

        def whole(name: str) -> Tensor:
            return torch.cat([seen[name], levels[name]], dim=1) if name in seen else levels[name]

        levels: UserState = {}
        for n, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            levels[f"left.{n}"], levels[f"right.{n}"], levels[f"value.{n}"] = block.read(x_nXD)
            x_nXD, weights_nHXY = block(x_nXD, levels[f"left.{n}"], whole(f"right.{n}"), whole(f"value.{n}"))
            if weights_nHXY is not None and is_recording():
                levels[f"weights.{n}"] = weights_nHXY
        num = len(self.blocks)
        levels[f"left.{num}"], levels[f"right.{num}"] = self.last(self.last_norm(x_nXD))
        return levels

    def explanations(self) -> tuple[Explanation, ...]:
        schema, config = self.fields.schema, self.config
        layers = (numbered("block", config.blocks), numbered("head", config.heads))
        fields = (of_fields(schema), of_fields(schema, name="attended_field"))
        shown = [Explanation(name="field_attn", axes=(CANDIDATE, *layers, *fields), meaning=LOOKS)]
        if not config.hidden:
            pairs = of_pairs(schema, self.last.first.tolist(), self.last.second.tolist())
            meaning = "What each pair of fields adds to the logit at each level: with `bias`, exactly all of it."
            axes = (CANDIDATE, numbered("level", len(self.norms)), pairs)
            shown.append(Explanation(name="pair_contrib", axes=axes, meaning=meaning))
            shown.append(BIAS)
        return tuple(shown)

    def _show_attention(self, of_request_CHRR: Tensor | None, of_rest_CHXF: Tensor | None) -> None:
        """One block's attention; where the request's fields attended among themselves, theirs above the item's."""
        if of_rest_CHXF is not None and of_request_CHRR is not None:
            of_request_CHRF = F.pad(of_request_CHRR, (0, of_rest_CHXF.shape[2]))
            of_rest_CHXF = torch.cat([of_request_CHRF, of_rest_CHXF], dim=2)
        if of_rest_CHXF is not None:  # else the block's own module shows it
            record("field_attn", of_rest_CHXF)

    def penalty(self) -> Tensor:
        return self.fields.penalty(self.config.l2_emb)

    def _normed(self, factors: list[Tensor]) -> list[Tensor]:
        """Each level's interactions after its batch norm, given the factors of all fields: all left, then all right."""
        num = len(factors) // 2
        levels = list(zip(factors[:num], factors[num:], strict=True))[-len(self.norms) :]
        return [norm(self.last.interactions(*both)) for norm, both in zip(self.norms, levels, strict=True)]

    def _fuse(self, normed: list[Tensor]) -> Tensor:
        """Eq. (11), over the flattened vectors."""
        if self.config.fusion == "add":
            return torch.stack(normed).sum(dim=0)
        return torch.cat(normed, dim=-1)

    def _show_pairs(self, normed: list[Tensor]) -> None:
        if not self.config.hidden:
            record("pair_contrib", lambda: self._pair_contrib(torch.stack(normed, dim=1)))
            record("bias", self.head.first.bias.squeeze)

    def _pair_contrib(self, normed_CLX: Tensor) -> Tensor:
        """[C, L, P]: what a linear head makes of each of L levels, pair by pair."""
        weight_LX = self.head.first.weight.view(-1, normed_CLX.shape[-1])  # one row for all levels where they are added
        vector = self.config.interaction == "vector"
        inner = (len(self.last.first), -1) if vector else (-1, len(self.last.first))
        return torch.unflatten(normed_CLX * weight_LX, -1, inner).sum(dim=-1 if vector else -2)


class Bilinear(nn.Module):
    """b_ij = l_i * r_j, elementwise, whose sums over the heads' slices are the attention scores, eq. (7)-(9).

    merged: l = x, r = W x, one W for the product of query and key. qk: l = W_q x, r = W_k x. blockdiag: merged with
    W made of one block per head.
    """

    first: Tensor
    second: Tensor

    def __init__(self, config: STECConfig, num_fields: int) -> None:
        super().__init__()
        width, form = config.emb_dim, config.bilinear_form
        self.heads, self.interaction = config.heads, config.interaction
        self.scale = math.sqrt(width / self.heads)  # S8
        blocks = self.heads if form == "blockdiag" else 1
        self.right = nn.ModuleList(nn.Linear(width // blocks, width // blocks, bias=False) for _ in range(blocks))
        self.left = nn.Linear(width, width, bias=False) if form == "qk" else nn.Identity()
        first, second = _pairs(config.pairs, num_fields)
        # Copies: torch.cond takes no two tensors that share their memory.
        self.register_buffer("first", first.clone(), persistent=False)
        self.register_buffer("second", second.clone(), persistent=False)
        self.num_outputs = len(first) * (width if self.interaction == "vector" else self.heads)

    def forward(self, x_CFD: Tensor) -> tuple[Tensor, Tensor]:
        chunks = x_CFD.chunk(len(self.right), dim=-1)
        right_CFD = torch.cat([w(chunk) for w, chunk in zip(self.right, chunks, strict=True)], dim=-1)
        return self.left(x_CFD), right_CFD

    def scores(self, left_CFD: Tensor, right_CFD: Tensor) -> Tensor:
        """[C, H, F, F]; the products' sums, without building the products."""
        left_CHFW, right_CHFW = split_heads(left_CFD, self.heads), split_heads(right_CFD, self.heads)
        return left_CHFW @ right_CHFW.transpose(-1, -2) / self.scale

    def interactions(self, left_CFD: Tensor, right_CFD: Tensor) -> Tensor:
        """The products of the chosen pairs, row by row, flattened; or only their sums (S5)."""
        if self.interaction == "scalar":
            return self.scores(left_CFD, right_CFD)[:, :, self.first, self.second].flatten(1)
        return (left_CFD.index_select(1, self.first) * right_CFD.index_select(1, self.second)).flatten(1)


class Block(nn.Module):
    """One STEC block: attention whose scores double as interactions, then the feed-forward layer of eq. (10)."""

    def __init__(self, config: STECConfig, num_fields: int) -> None:
        super().__init__()
        width = config.emb_dim
        self.heads, self.norm = config.heads, config.block_norm
        self.bilinear = Bilinear(config, num_fields)
        if config.bilinear == "implicit":
            self.value = nn.Linear(width, width, bias=False)
            self.out = nn.Linear(width, width, bias=False)
        self.attention = (
            SelfAttention(width, config.heads, dropout=0.0, shown_as="field_attn")
            if config.bilinear == "explicit"
            else None
        )
        self.ffn = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)) if config.ffn else None
        )
        num_norms = 0 if self.norm == "none" else 1 + config.ffn
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_norms))
        self.dropout = nn.Dropout(config.dropout)

    def read(self, x_nXD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each field both factors of its products, and what it shows to those that attend to it."""
        read_nXD = self.norms[0](x_nXD) if self.norm == "pre" else x_nXD
        shown_nXD = self.value(read_nXD) if self.attention is None else read_nXD
        return *self.bilinear(read_nXD), shown_nXD

    def forward(
        self, x_nXD: Tensor, left_nXD: Tensor, right_nYD: Tensor, shown_nYD: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The attending fields after the block, and their attention [n, H, X, Y], if it is made of the products."""
        weights_nHXY = None
        if self.attention is not None:
            attended_nXD = self.attention(shown_nYD)
        else:
            weights_nHXY = self.bilinear.scores(left_nXD, right_nYD).softmax(dim=-1)
            attended_nXD = self.out(merge_heads(weights_nHXY @ split_heads(shown_nYD, self.heads)))
        x_nXD = x_nXD + self.dropout(attended_nXD)
        if self.norm == "post":
            x_nXD = self.norms[0](x_nXD)
        if self.ffn is not None:
            x_nXD = x_nXD + self.dropout(self.ffn(self.norms[1](x_nXD) if self.norm == "pre" else x_nXD))
            if self.norm == "post":
                x_nXD = self.norms[1](x_nXD)
        return x_nXD, weights_nHXY


def _pairs(kind: str, num_fields: int) -> tuple[Tensor, Tensor]:
    """The first and second field of each pair that feeds the head, row by row (S3)."""
    if kind == "all":
        every = torch.cartesian_prod(torch.arange(num_fields), torch.arange(num_fields))
        return every[:, 0], every[:, 1]
    first, second = torch.triu_indices(num_fields, num_fields, offset=0 if kind == "upper_diag" else 1)
    return first, second
