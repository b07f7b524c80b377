"""STEC: S. Dilbaz and H. Saribas, "STEC: See-Through Transformer-based Encoder for CTR Prediction".

arXiv 2308.15033. Equation numbers are the paper's; S1..S12 are the ambiguities listed in models.md section 4.3.
"""

# U requests, C candidates, n: U or C; F flat fields (R of the request first, G of the item), D embedding width
# X fields that attend, Y fields attended to; H heads, W = D / H; O first layer of the head
# P pairs of fields, V = P * D; Q pairs of which each side is known, I and J fields of one side, R or G; K weights

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.artifact.explanation import BIAS, CANDIDATE, LOOKS, Explanation, numbered, of_fields, of_pairs
from models.features.schema import Schema
from models.layers.attention import SelfAttention, merge_heads, split_heads
from models.layers.base import CTRModel, Inputs, UserState
from models.layers.config import Config, Count, Share, Weight, Within
from models.layers.embeddings import FieldEmbeddings
from models.layers.folding import of_weights
from models.layers.initialisation import start_linears, tiny_normal
from models.layers.intermediates import is_recording, record
from models.layers.mlp import MLP
from models.layers.request_matmul import of_request

Blocks = Annotated[int, Within(low=0, below=100)]


@dataclass(frozen=True, kw_only=True)
class STECConfig(Config):
    """The paper's model with a linear head; options named S.. settle what the paper leaves open."""

    emb_dim: Count = 16
    blocks: Blocks = 2  # none: what a block is worth; the bilinear layer alone is left
    heads: Count = 2
    pairs: Literal["upper", "upper_diag", "all"] = "upper"  # S3
    bilinear: Literal["implicit", "explicit"] = "implicit"  # explicit: the ablation STEC_BL
    bilinear_form: Literal["merged", "qk", "blockdiag"] = "merged"  # S4: qk is eq. (4)-(6) with H heads
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

    Flat fields only: the history is not read. An ad's row holds what its fields bring to the first block: themselves,
    both factors of their products, their values. From the first block on every field has attended to the candidate, so
    no more than the embeddings and the first level's pairs can be shared among a request's candidates. With
    `field_mask` user_first, another model and ours, the request's fields run through all blocks once, a candidate
    computes only its own, and the pairs of all levels are shared (models.md section 8.3).
    """

    def __init__(self, config: STECConfig, schema: Schema) -> None:
        super().__init__()
        self.config = config
        self.fields = FieldEmbeddings(schema, config.emb_dim, init=tiny_normal)
        self.num_request, self.num_item = self.fields.num_request, self.fields.num_item
        num_fields = self.num_request + self.num_item
        if num_fields < 2:
            raise ValueError(f"STEC is about pairs of fields; the schema has {num_fields} outside the history")
        self.blocks = nn.ModuleList(Block(config, num_fields) for _ in range(config.blocks))
        self.last_norm = nn.LayerNorm(config.emb_dim) if config.block_norm == "pre" else nn.Identity()
        self.last = Bilinear(config, num_fields)  # section 3.3.2: N blocks make N + 1 interactions
        num_levels = 1 if config.fusion == "last" else config.blocks + 1
        self.norms = nn.ModuleList(nn.BatchNorm1d(self.last.num_outputs) for _ in range(num_levels))
        fused = self.last.num_outputs * (num_levels if config.fusion == "concat" else 1)
        self.head = MLP(fused, config.hidden, dropout=config.dropout, batch_norm=config.batch_norm)
        # Else the left factor of a product at the first level is the field itself.
        self.has_left = config.bilinear_form == "qk" or config.block_norm == "pre"
        self.request_first = config.field_mask == "user_first" and 0 < self.num_request < num_fields
        self.pairs = PairReader(self.last.first, self.last.second, self.num_request, num_fields)
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        if not self.num_request:
            return {}
        level = self._enter(self.fields.request(inputs))
        return self._levels(level, {}) if self.request_first else level

    def encode_items(self, inputs: Inputs) -> Tensor:
        return torch.cat([part_CGD.flatten(1) for part_CGD in self._enter(self.fields.item(inputs)).values()], dim=1)

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        names = ("x", "right.0", *(["value.0"] if self.config.blocks else []), *(["left.0"] if self.has_left else []))
        parts_CGD = torch.unflatten(items_CW, 1, (len(names), self.num_item, self.config.emb_dim)).unbind(1)
        item = dict(zip(names, parts_CGD, strict=True))
        if "value.0" in item and self.config.bilinear == "implicit":
            by_head = (self.config.heads, self.num_item, self.config.emb_dim // self.config.heads)
            item["value.0"] = torch.unflatten(item["value.0"].flatten(1), 1, by_head)
        shared = {name: of_request(value, user_index, items_CW.shape[0]) for name, value in state.items()}
        if self.request_first:
            levels = self._levels(item, shared)
        else:
            levels = self._levels({name: _beside(shared, item, name) for name in names}, {})
            shared = {}
        for n in range(len(self.blocks) if is_recording() else 0):
            self._show_attention(shared.get(f"weights.{n}"), levels.get(f"weights.{n}"))
        if user_index is None and not (self.training or is_recording() or self.config.interaction == "scalar"):
            return self.head.finish(self._read_pairs(state, item, levels))
        normed = [
            norm(self.last.interactions(_beside(shared, levels, f"left.{n}"), _beside(shared, levels, f"right.{n}")))
            for n, norm in self._norms().items()
        ]
        self._show_pairs(normed)
        logits_C: Tensor = self.head(self._fuse(normed))
        return logits_C

    def _enter(self, x_nXD: Tensor) -> UserState:
        """What these fields bring to the first block; both factors of products are the fields where they are alike."""
        level = {"x": x_nXD}
        if self.config.blocks:
            left_nXD, level["right.0"], level["value.0"] = self._block(0).read(x_nXD)
        else:
            left_nXD, level["right.0"] = self.last(self.last_norm(x_nXD))
        return level | {"left.0": left_nXD} if self.has_left else level

    def _levels(self, level: UserState, seen: UserState) -> UserState:
        """Of these fields both factors of each level's products, and values; `seen`: of those they attend to, too."""
        x_nXD = level["x"]
        levels = level | {"left.0": level.get("left.0", x_nXD)}
        num = len(self.blocks)
        for n in range(num):
            block = self._block(n)
            if n > 0:
                levels[f"left.{n}"], levels[f"right.{n}"], levels[f"value.{n}"] = block.read(x_nXD)
            right_nYD, value = _beside(seen, levels, f"right.{n}"), _beside(seen, levels, f"value.{n}")
            x_nXD, weights_nHXY = block(x_nXD, levels[f"left.{n}"], right_nYD, value)
            if weights_nHXY is not None and is_recording():
                levels[f"weights.{n}"] = weights_nHXY
        if num > 0:  # else the fields have entered the bilinear layer already
            levels[f"left.{num}"], levels[f"right.{num}"] = self.last(self.last_norm(x_nXD))
        return levels

    def _read_pairs(self, state: UserState, item: UserState, levels: UserState) -> Tensor:
        """The output of the head's first layer [C, O] where all candidates are of one request."""
        bias_O, kernels = self._pair_kernels()
        z_CO = bias_O
        for n, kernel in kernels.items():
            if self._is_shared(n):
                of_item = _factors(levels if self.request_first else item, n)
                z_CO = z_CO + self.pairs.of_one_request(_factors(state, n), of_item, kernel)
            else:
                z_CO = z_CO + self.pairs(*_factors(levels, n), kernel["all"])
        return z_CO

    @of_weights
    def _pair_kernels(self) -> tuple[Tensor, dict[int, dict[str, Tensor]]]:
        """Batch norms and the head's first layer as one: its bias [O], and its kernels at each level that it reads."""
        first, norms = self.head.first, self._norms()
        kernels_OV = torch.unflatten(first.weight, 1, (-1, self.last.num_outputs)).unbind(1)
        if len(kernels_OV) < len(norms):
            kernels_OV *= len(norms)  # the levels are added up before the layer
        bias_O: Tensor = first.bias
        kernels = {}
        for (n, norm), kernel_OV in zip(norms.items(), kernels_OV, strict=True):
            scale_V, shift_V = _affine(norm)
            bias_O = bias_O + kernel_OV @ shift_V
            kernel_OPD = torch.unflatten(kernel_OV * scale_V, 1, (-1, self.config.emb_dim))
            kernels[n] = self.pairs.kernels(kernel_OPD, one_request=self._is_shared(n))
        return bias_O, kernels

    def _is_shared(self, n: int) -> bool:
        """Whether the request's fields are at level n before a candidate is known."""
        return self.num_request > 0 and (self.request_first or n == 0)

    def _norms(self) -> dict[int, nn.BatchNorm1d]:
        """The batch norm of each level that the head reads."""
        norms = [norm for norm in self.norms if isinstance(norm, nn.BatchNorm1d)]
        return dict(enumerate(norms, start=len(self.blocks) + 1 - len(norms)))

    def _fuse(self, normed: list[Tensor]) -> Tensor:
        """Eq. (11), over the flattened vectors."""
        if self.config.fusion == "add":
            return torch.stack(normed).sum(dim=0)
        return torch.cat(normed, dim=-1)

    def _block(self, n: int) -> "Block":
        block = self.blocks[n]
        assert isinstance(block, Block)
        return block

    def penalty(self) -> Tensor:
        return self.fields.penalty(self.config.l2_emb)

    def explanations(self) -> tuple[Explanation, ...]:
        schema, config = self.fields.schema, self.config
        layers = (numbered("block", config.blocks), numbered("head", config.heads))
        fields = (of_fields(schema), of_fields(schema, name="attended_field"))
        shown = []
        if config.blocks:
            shown.append(Explanation(name="field_attn", axes=(CANDIDATE, *layers, *fields), meaning=LOOKS))
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


def _factors(levels: UserState, n: int) -> tuple[Tensor, Tensor]:
    """Both factors of one level's products; the left one is the field itself where no other is named."""
    return levels.get(f"left.{n}", levels["x"]), levels[f"right.{n}"]


def _beside(shared: UserState, of_item: UserState, name: str) -> Tensor:
    """The request's fields, where there are any, before the item's."""
    return torch.cat([shared[name], of_item[name]], dim=-2) if name in shared else of_item[name]


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
        """Of each field both factors of its products, and its value: by head [n, H, X, W], or, explicit, [n, X, D]."""
        read_nXD = self.norms[0](x_nXD) if self.norm == "pre" else x_nXD
        value = split_heads(self.value(read_nXD), self.heads) if self.attention is None else read_nXD
        return *self.bilinear(read_nXD), value

    def forward(
        self, x_nXD: Tensor, left_nXD: Tensor, right_nYD: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The attending fields after the block, and their attention [n, H, X, Y], if it is made of the products."""
        weights_nHXY = None
        if self.attention is not None:
            attended_nXD = self.attention(value)
        else:
            weights_nHXY = self.bilinear.scores(left_nXD, right_nYD).softmax(dim=-1)
            attended_nXD = self.out(merge_heads(weights_nHXY @ value))
        x_nXD = x_nXD + self.dropout(attended_nXD)
        if self.norm == "post":
            x_nXD = self.norms[0](x_nXD)
        if self.ffn is not None:
            read_nXD = self.norms[1](x_nXD) if self.norm == "pre" else x_nXD
            # As one matrix of all fields: of more dimensions a runtime adds biases after the product, in a pass more.
            fed_nXD = torch.unflatten(self.ffn(read_nXD.flatten(0, 1)), 0, read_nXD.shape[:2])
            x_nXD = x_nXD + self.dropout(fed_nXD)
            if self.norm == "post":
                x_nXD = self.norms[1](x_nXD)
        return x_nXD, weights_nHXY


class Bilinear(nn.Module):
    """b_ij = l_i * r_j, elementwise, whose sums over the heads' slices are the attention scores, eq. (7)-(9).

    qk: l = W_q x, r = W_k x, of which each head reads its slice: eq. (4)-(6) with a W_q and a W_k for each head.
    merged: l = x, r = W x, one W for the product of query and key. With one head its scores are those of qk with
    W = W_q^T W_k; with more it is another function, as each head sees of l no more than its slice of the field.
    blockdiag: merged with W made of one block per head.
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


class PairReader(nn.Module):
    """A linear map of the products b_ij = l_i * r_j of all pairs, sum_ij W_ij b_ij [C, O], without building them all.

    Of a request's candidates, pairs of two request fields are read once, and a pair of both kinds is linear in the
    item's field: sum_i W_ij (l_i * r_j) = M_j r_j with M_j = sum_i W_ij diag(l_i), which is made once. Where one number
    is read, the pairs of a candidate are a quadratic form in each dimension: l_d^T W_d r_d.
    """

    def __init__(self, first_P: Tensor, second_P: Tensor, num_request: int, num_fields: int) -> None:
        super().__init__()
        self.num_request, self.num_fields = num_request, num_fields
        place_FF = torch.full((num_fields, num_fields), len(first_P))  # behind the last pair stands a zero
        place_FF[first_P, second_P] = torch.arange(len(first_P))
        self.register_buffer("place", place_FF.flatten(), persistent=False)
        self.register_buffer("all_left", first_P, persistent=False)
        self.register_buffer("all_right", second_P, persistent=False)
        kinds = {"rr": (True, True), "rg": (True, False), "gr": (False, True), "gg": (False, False)}
        self.num_pairs = {}
        for kind, (left, right) in kinds.items():
            places_Q = (((first_P < num_request) == left) & ((second_P < num_request) == right)).nonzero()[:, 0]
            self.num_pairs[kind] = len(places_Q)
            self.register_buffer(kind, places_Q, persistent=False)
            self.register_buffer(f"{kind}_left", first_P[places_Q] - num_request * (not left), persistent=False)
            self.register_buffer(f"{kind}_right", second_P[places_Q] - num_request * (not right), persistent=False)

    def kernels(self, kernel_OPD: Tensor, *, one_request: bool) -> dict[str, Tensor]:
        """W as `of_one_request` reads it, by kind of pair, or as `forward` does."""
        if one_request:
            kinds = {kind: kernel_OPD.index_select(1, self.get_buffer(kind)) for kind, n in self.num_pairs.items() if n}
            return {kind: self._by_item_field(kind, kernel_OQD) for kind, kernel_OQD in kinds.items()}
        if len(kernel_OPD) > 1:
            return {"all": kernel_OPD.flatten(1)}
        kernel_FFD = F.pad(kernel_OPD[0], (0, 0, 0, 1)).index_select(0, self.get_buffer("place"))
        return {"all": torch.unflatten(kernel_FFD, 0, (self.num_fields, -1)).permute(2, 0, 1)}

    def forward(self, left_CFD: Tensor, right_CFD: Tensor, kernel: Tensor) -> Tensor:
        """Of all pairs of each candidate's fields; the kernel is [O, P * D], or [D, F, F] where one number is read."""
        if kernel.dim() == 2:
            return F.linear(self._products("all", left_CFD, right_CFD), kernel)
        read_DCF = (left_CFD.permute(2, 0, 1) @ kernel) * right_CFD.permute(2, 0, 1)
        return read_DCF.sum(dim=(0, 2)).unsqueeze(1)

    def of_one_request(
        self, of_request: tuple[Tensor, Tensor], of_item: tuple[Tensor, Tensor], kernels: Mapping[str, Tensor]
    ) -> Tensor:
        """The same, of the factors l and r of a single request's fields, [1, R, D], and of the items', [C, G, D]."""
        left_1RD, right_1RD = of_request
        left_CGD, right_CGD = of_item
        parts = []
        if "rr" in kernels:
            parts.append(F.linear(self._products("rr", left_1RD, right_1RD), kernels["rr"]))
        if "gg" in kernels:
            parts.append(F.linear(self._products("gg", left_CGD, right_CGD), kernels["gg"]))
        values_CK, kernels_KO = [], []
        for kind, request_1RD, item_CGD in (("rg", left_1RD, right_CGD), ("gr", right_1RD, left_CGD)):
            if kind in kernels:
                values_CK.append(item_CGD.transpose(1, 2).flatten(1))
                read_DV1 = kernels[kind] @ request_1RD.permute(2, 1, 0)
                kernels_KO.append(read_DV1.reshape(values_CK[-1].shape[1], -1))
        if values_CK:
            parts.append(torch.cat(values_CK, dim=1) @ torch.cat(kernels_KO))
        return reduce(torch.add, parts)

    def _by_item_field(self, kind: str, kernel_OQD: Tensor) -> Tensor:
        """Of pairs of both kinds [D, G * O, R], to be multiplied by the request's fields in each dimension.

        Batched over D as plain products: an einsum over the weights as they lie costs more than all it saves.
        """
        if kind in ("rr", "gg"):
            return kernel_OQD.flatten(1)
        num_first = self.num_request if kind == "rg" else self.num_fields - self.num_request
        kernel_OIJD = torch.unflatten(kernel_OQD, 1, (num_first, -1))
        kernel_OGRD = kernel_OIJD.transpose(1, 2) if kind == "rg" else kernel_OIJD
        return kernel_OGRD.permute(3, 1, 0, 2).flatten(1, 2)

    def _products(self, kind: str, left_nID: Tensor, right_nJD: Tensor) -> Tensor:
        first_Q, second_Q = self.get_buffer(f"{kind}_left"), self.get_buffer(f"{kind}_right")
        return (left_nID.index_select(1, first_Q) * right_nJD.index_select(1, second_Q)).flatten(1)


def _affine(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """What a batch norm with fixed statistics multiplies by, and then adds."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale_V = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale_V, norm.bias - norm.running_mean * scale_V


def _pairs(kind: str, num_fields: int) -> tuple[Tensor, Tensor]:
    """The first and second field of each pair that feeds the head, row by row (S3)."""
    if kind == "all":
        every = torch.cartesian_prod(torch.arange(num_fields), torch.arange(num_fields))
        return every[:, 0], every[:, 1]
    first, second = torch.triu_indices(num_fields, num_fields, offset=0 if kind == "upper_diag" else 1)
    return first, second
