"""STEC: S. Dilbaz and H. Saribas, "STEC: See-Through Transformer-based Encoder for CTR Prediction".

arXiv 2308.15033. Equation numbers are the paper's; S1..S12 are the ambiguities listed in models.md section 4.3.
"""

# U requests, C candidates, F flat fields (request's first), H heads, D embedding width, W = D / H, P pairs of fields

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.blocks import (
    MLP,
    CTRModel,
    FieldEmbeddings,
    Inputs,
    SelfAttention,
    UserState,
    merge_heads,
    split_heads,
    start_linears,
    tiny_normal,
)
from models.config import Config, Count, Share, Weight
from models.schema import Schema


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
    hidden: tuple[Count, ...] = ()
    dropout: Share = 0.0
    l2_emb: Weight = 0.0  # (weight / 2) * sum of squares of the tables

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.emb_dim % self.heads:
            raise ValueError(f"option heads: {self.heads} do not divide emb_dim {self.emb_dim}")


class STEC(CTRModel):
    """A Transformer over the fields whose attention scores, before they are summed, are bilinear interactions.

    Flat fields only: the history is not read. From the first block on every field has attended to the candidate, so
    no more than the request's embeddings can be shared among its candidates (models.md section 8.3).
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
        self.head = MLP(fused, config.hidden, dropout=config.dropout)
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        fields = self.fields.group("user", inputs) + self.fields.group("context", inputs)
        return {"fields": torch.stack(fields, dim=1)} if fields else {}

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        parts = [fields_UFD.index_select(0, inputs["user_index"]) for fields_UFD in state.values()]
        items = self.fields.group("item", inputs)
        if items:
            parts.append(torch.stack(items, dim=1))
        x_CFD = torch.cat(parts, dim=1)
        interactions = []
        for block in self.blocks:
            x_CFD, interactions_CP = block(x_CFD)
            interactions.append(interactions_CP)
        interactions.append(self.last.interactions(*self.last(self.last_norm(x_CFD))))
        logits_C: Tensor = self.head(self._fuse(interactions))
        return logits_C

    def penalty(self) -> Tensor:
        return self.fields.penalty(self.config.l2_emb)

    def _fuse(self, interactions: list[Tensor]) -> Tensor:
        """Eq. (11): one batch norm per level, over the flattened vector."""
        levels = interactions[-1:] if self.config.fusion == "last" else interactions
        normed = [norm(level_CP) for norm, level_CP in zip(self.norms, levels, strict=True)]
        if self.config.fusion == "add":
            return torch.stack(normed).sum(dim=0)
        return torch.cat(normed, dim=-1)


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
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)
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
        self.attention = SelfAttention(width, config.heads, dropout=0.0) if config.bilinear == "explicit" else None
        self.ffn = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)) if config.ffn else None
        )
        num_norms = 0 if self.norm == "none" else 1 + config.ffn
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_norms))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_CFD: Tensor) -> tuple[Tensor, Tensor]:
        """The fields after the block, and this level's interactions."""
        read_CFD = self.norms[0](x_CFD) if self.norm == "pre" else x_CFD
        left_CFD, right_CFD = self.bilinear(read_CFD)
        if self.attention is not None:
            attended_CFD = self.attention(read_CFD)
        else:
            weights_CHFF = self.bilinear.scores(left_CFD, right_CFD).softmax(dim=-1)
            attended_CFD = self.out(merge_heads(weights_CHFF @ split_heads(self.value(read_CFD), self.heads)))
        x_CFD = x_CFD + self.dropout(attended_CFD)
        if self.norm == "post":
            x_CFD = self.norms[0](x_CFD)
        if self.ffn is not None:
            x_CFD = x_CFD + self.dropout(self.ffn(self.norms[1](x_CFD) if self.norm == "pre" else x_CFD))
            if self.norm == "post":
                x_CFD = self.norms[1](x_CFD)
        return x_CFD, self.bilinear.interactions(left_CFD, right_CFD)


def _pairs(kind: str, num_fields: int) -> tuple[Tensor, Tensor]:
    """The first and second field of each pair that feeds the head, row by row (S3)."""
    if kind == "all":
        every = torch.cartesian_prod(torch.arange(num_fields), torch.arange(num_fields))
        return every[:, 0], every[:, 1]
    first, second = torch.triu_indices(num_fields, num_fields, offset=0 if kind == "upper_diag" else 1)
    return first, second
