"""DeepMR: S. Elsayed and L. Schmidt-Thieme, "Deep Multi-Representation Model for Click-Through Rate Prediction".

arXiv 2210.10664. R1..R14 are the ambiguities listed in models.md section 6.3, "the code" is the authors'.
"""

# U requests, C candidates, n: U or C; F flat fields (R of the request first, G of the item), D width
# X fields that attend, Y fields attended to; H heads, K = D / H

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.artifact.explanation import BIAS, CANDIDATE, LOOKS, Axis, Explanation, numbered, of_fields
from models.features.schema import Schema
from models.layers.attention import masked_softmax, merge_heads, split_heads
from models.layers.base import CTRModel, Inputs, UserState
from models.layers.config import Config, Count, Mix, Share, Weight
from models.layers.embeddings import FieldEmbeddings
from models.layers.initialisation import start_linears
from models.layers.intermediates import is_recording, record
from models.layers.request_matmul import of_request


@dataclass(frozen=True, kw_only=True)
class DeepMRConfig(Config):
    """The paper's model; options named R.. settle what the paper leaves open (models.md section 6.3)."""

    emb_dim: Count = 16  # R3: one width everywhere
    branches: Literal["both", "dnn", "sa"] = "both"
    beta: Mix | None = None  # O = beta O_SA + (1 - beta) O_DNN; by default 0.6, or 0.5 where it is learned
    beta_learned: bool = False  # R10: then it starts there, unconstrained
    emb_scale: bool = True  # the code's: embeddings times sqrt(D) before the positions are added
    dnn_layers: Count = 3  # the first, which changes the width, included
    dnn_rezero: Literal["add", "mult", "none"] = "add"  # none: a plain MLP
    sa_blocks: Count = 1
    heads: Count = 2
    sa_rezero: Literal["mult", "add", "mult_res", "none"] = "mult"  # R5
    use_rezero: bool = True  # false: the paper's ablation, sa_rezero and dnn_rezero none whatever they say
    alpha_init: float = 0.0
    qkv_act: Literal["relu", "none"] = "relu"  # R11
    field_mask: Literal["none", "causal", "user_first"] = "none"  # R7: causal is the code's
    query_ln: bool = False  # the code's
    ffn_ln: bool = False  # R6: the code's
    ffn_residual: bool = True  # the code's: its feed-forward layer adds what it reads
    ffn_dropout: Literal["both", "first"] = "both"  # after which of the feed-forward layer's two; both is the code's
    sa_final_ln: bool = False  # R6: the code's, and with alpha_init 0 nothing before it learns
    sa_readout: Literal["sum", "mean"] = "sum"  # R2
    readout: Literal["sum", "linear"] = "sum"  # R14
    dropout: Share = 0.0
    l2_emb: Weight = 0.0  # R8: (weight / 2) * sum of squares of the tables

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.emb_dim % self.heads:  # R9
            raise ValueError(f"option heads: {self.heads} do not divide emb_dim {self.emb_dim}")
        if self.beta is None:
            object.__setattr__(self, "beta", 0.5 if self.beta_learned else 0.6)
        if not self.use_rezero:
            object.__setattr__(self, "sa_rezero", "none")
            object.__setattr__(self, "dnn_rezero", "none")
        # A product with alpha = 0 is zero, and so is the gradient of all that a second such product reads (R5).
        products = {"sa_rezero": self.sa_blocks, "dnn_rezero": self.dnn_layers - 1}
        for option, num in products.items():
            if getattr(self, option) == "mult" and num > 1 and self.alpha_init == 0:
                raise ValueError(
                    f"option {option}: with {num} mult in a row and alpha_init 0 nothing is learned;"
                    f" set alpha_init, or take another {option}"
                )


class DeepMR(CTRModel):
    """An MLP and self-attention over the same fields, side by side, whose outputs are mixed and summed to the logit.

    Flat fields only: the history is not read. What a request's fields bring to the MLP's first layer and to the first
    block's queries, keys and values is computed once for all candidates, what an ad's bring once per version: its row
    holds them. With `field_mask` causal or user_first the request's fields never attend to the item, and then all their
    blocks run once; a candidate computes only its own fields (models.md section 8.5).
    """

    def __init__(self, config: DeepMRConfig, schema: Schema) -> None:
        super().__init__()
        if not schema.group("item"):
            raise ValueError("DeepMR needs an item field; the schema has none")
        self.config = config
        self.num_request = len(schema.group("user")) + len(schema.group("context"))
        self.num_fields = num_fields = self.num_request + len(schema.group("item"))
        width = config.emb_dim
        self.fields = FieldEmbeddings(schema, width, init=_glorot)
        self.positions = nn.Parameter(torch.empty(num_fields, width))
        _glorot(self.positions.data)
        self.attention = FieldAttention(config, self.num_request, num_fields) if config.branches != "dnn" else None
        self.deep = Deep(config, num_fields) if config.branches != "sa" else None
        mixed = config.branches == "both"
        assert config.beta is not None
        self.beta = nn.Parameter(torch.full((1,), float(config.beta))) if mixed and config.beta_learned else config.beta
        self.readout = nn.Linear(width, 1) if config.readout == "linear" else None
        start_linears(self, nn.init.xavier_uniform_)
        if self.deep is not None:
            start_linears(self.deep, _normal)

    def encode_user(self, inputs: Inputs) -> UserState:
        if not self.num_request:
            return {}
        x_URD = self._place(self.fields.request(inputs), self.positions[: self.num_request])
        state = self.attention.encode_request(x_URD, self._direction()) if self.attention is not None else {}
        if self.deep is not None:
            state["deep"] = self.deep.read(x_URD, slice(0, self.num_request))
        return state

    def encode_items(self, inputs: Inputs) -> Tensor:
        x_CGD = self._place(self.fields.item(inputs), self.positions[self.num_request :])
        parts = [part.flatten(1) for part in self.attention.encode_items(x_CGD)] if self.attention is not None else []
        if self.deep is not None:
            parts.append(self.deep.read(x_CGD, slice(self.num_request, self.num_fields)))
        return torch.cat(parts, dim=1)

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        num_item, width = self.num_fields - self.num_request, self.config.emb_dim
        widths = [num_item * width] * (4 if self.attention is not None else 0) + [width] * (self.deep is not None)
        parts = torch.split(items_CW, widths, dim=1)
        outputs = []
        if self.attention is not None:
            shared = {
                name: of_request(value, user_index, None if name == "sum" else items_CW.shape[0])
                for name, value in state.items()
                if name != "deep"
            }
            outputs.append(self.attention(shared, parts[:4], self._direction()))
        if self.deep is not None:
            z_CD = parts[-1] + of_request(state["deep"], user_index) if state else parts[-1]
            outputs.append(F.linear(self.deep(z_CD), self._direction().unsqueeze(0)).squeeze(-1))
        if len(outputs) == 2:
            outputs = [self.beta * outputs[0], (1 - self.beta) * outputs[1]]
        if is_recording():
            self._show(outputs)
        logit_C: Tensor = reduce(torch.add, outputs)
        return logit_C if self.readout is None else logit_C + self.readout.bias

    def logged_scalars(self) -> dict[str, float]:
        return {"beta": self.beta.item()} if isinstance(self.beta, nn.Parameter) else {}

    def explanations(self) -> tuple[Explanation, ...]:
        config, schema, shown = self.config, self.fields.schema, []
        if self.attention is not None:
            layers = [numbered("block", config.sa_blocks)] if config.sa_blocks > 1 else []
            layers.append(numbered("head", config.heads))
            fields = (of_fields(schema), of_fields(schema, name="attended_field"))
            shown.append(Explanation(name="field_attn", axes=(CANDIDATE, *layers, *fields), meaning=LOOKS))
        branches = {"both": ("attention", "mlp"), "sa": ("attention",), "dnn": ("mlp",)}[config.branches]
        meaning = "What each branch, weighed by beta, adds to the logit: exactly all of it, but for a `bias` if shown."
        axis = Axis(name="branch", labels=branches)
        shown.append(Explanation(name="branch_logit", axes=(CANDIDATE, axis), meaning=meaning))
        if self.readout is not None:
            shown.append(BIAS)
        if len(branches) == 2:
            shown.append(Explanation(name="beta", axes=(), meaning="The attention's part in the mix, of any row."))
        if alphas := self._alphas():
            axis = Axis(name="layer", labels=tuple(alphas))
            shown.append(Explanation(name="alpha", axes=(axis,), meaning="What each layer is weighed by, in any row."))
        return tuple(shown)

    def penalty(self) -> Tensor:
        return self.fields.penalty(self.config.l2_emb)

    def _direction(self) -> Tensor:
        """What the logit takes of the branches' mixed output O: its sum, or its product with a learned direction."""
        return torch.ones_like(self.positions[0]) if self.readout is None else self.readout.weight[0]

    def _show(self, outputs: list[Tensor]) -> None:
        record("branch_logit", torch.stack(outputs, dim=1))
        if self.readout is not None:
            record("bias", self.readout.bias.squeeze())
        if self._alphas():
            record("alpha", torch.cat(list(self._alphas().values())))
        record("beta", torch.as_tensor(self.beta).squeeze())

    def _alphas(self) -> dict[str, Tensor]:
        """Every alpha, [1], by the layer it weighs."""
        attention = [] if self.attention is None else [b.alphas for b in self.attention.blocks if isinstance(b, Block)]
        layers = {f"attention {n + 1}": alphas[0] for n, alphas in enumerate(attention) if len(alphas)}
        return layers | {f"mlp {n + 2}": alpha for n, alpha in enumerate(self.deep.alphas if self.deep else [])}

    def _place(self, fields_nGD: Tensor, positions_GD: Tensor) -> Tensor:
        """Eq. (1), Emb + Pos; with `emb_scale` sqrt(D) Emb + Pos."""
        return (fields_nGD * math.sqrt(self.config.emb_dim) if self.config.emb_scale else fields_nGD) + positions_GD


class FieldAttention(nn.Module):
    """The self-attention branch: blocks over the fields, summed over them to O_SA (R2), of which one direction is read.

    So the last block's W_2 is only ever read in that direction (R14), and one vector is made of the matrix.
    """

    mask: Tensor

    def __init__(self, config: DeepMRConfig, num_request: int, num_fields: int) -> None:
        super().__init__()
        self.num_request, self.num_fields, self.heads = num_request, num_fields, config.heads
        self.field_mask, self.mean = config.field_mask, config.sa_readout == "mean"
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.sa_blocks))
        self.final_norm = nn.LayerNorm(config.emb_dim) if config.sa_final_ln else nn.Identity()
        self.register_buffer("mask", torch.ones(num_fields, num_fields, dtype=torch.bool).tril(), persistent=False)

    def encode_request(self, x_URD: Tensor, direction_D: Tensor) -> UserState:
        """What the request's fields bring to every candidate: to the first block, or, masked, their whole branch."""
        state: UserState = {}
        if self.field_mask == "none":
            state["x"], state["query"], state["key.0"], state["value.0"] = self._block(0).read(x_URD)
            return state
        mask_RR = self.mask[: self.num_request, : self.num_request] if self.field_mask == "causal" else None
        for n in range(len(self.blocks)):
            if n > 0:
                x_URD = self._block(n - 1).feed(x_URD)
            x_URD, query_UHRK, state[f"key.{n}"], state[f"value.{n}"] = self._block(n).read(x_URD)
            x_URD, weights_UHRR = self._block(n)(x_URD, query_UHRK, state[f"key.{n}"], state[f"value.{n}"], mask_RR)
            if is_recording():
                state[f"weights.{n}"] = weights_UHRR
        state["sum"] = self._read_out(x_URD, direction_D)
        return state

    def encode_items(self, x_CGD: Tensor) -> tuple[Tensor, ...]:
        """What the item's fields bring to the first block: themselves, their queries, keys and values."""
        return self._block(0).read(x_CGD)

    def forward(self, shared: UserState, items: Sequence[Tensor], direction_D: Tensor) -> Tensor:
        """O_SA in that direction [C], given each candidate's own request's part and the item's, flattened."""
        mask_GF = self.mask[self.num_request :] if self.field_mask == "causal" else None
        num_item = self.num_fields - self.num_request
        item_CGD = torch.unflatten(items[0], 1, (num_item, -1))
        heads = [torch.unflatten(part_CX, 1, (self.heads, num_item, -1)) for part_CX in items[1:]]
        x_CXD, query_CHXK = _beside(shared, "x", item_CGD), _beside(shared, "query", heads[0])
        key_CHXK, value_CHXK = heads[1:]
        for n in range(len(self.blocks)):
            if n > 0:
                x_CXD, query_CHXK, key_CHXK, value_CHXK = self._block(n).read(self._block(n - 1).feed(x_CXD))
            key_CHYK, value_CHYK = _beside(shared, f"key.{n}", key_CHXK), _beside(shared, f"value.{n}", value_CHXK)
            x_CXD, weights_CHXY = self._block(n)(x_CXD, query_CHXK, key_CHYK, value_CHYK, mask_GF)
            if f"weights.{n}" in shared:  # the request's fields do not attend to the item's
                of_request_CHRF = F.pad(shared[f"weights.{n}"], (0, num_item))
                weights_CHXY = torch.cat([of_request_CHRF, weights_CHXY], dim=2)
            record("field_attn", weights_CHXY)
        out_C = self._read_out(x_CXD, direction_D)
        if "sum" in shared:
            out_C = out_C + shared["sum"]
        return out_C / self.num_fields if self.mean else out_C

    def _read_out(self, z_nXD: Tensor, direction_D: Tensor) -> Tensor:
        """The fields' sum in that direction [n], given what the last block's feed-forward layer reads."""
        last = self._block(len(self.blocks) - 1)
        # What comes after W_2 field by field, a layer norm or in training a dropout, keeps it a matrix.
        if last.drops_output or not isinstance(self.final_norm, nn.Identity):
            out_nXD: Tensor = self.final_norm(last.feed(z_nXD))
            return out_nXD.sum(dim=1) @ direction_D
        return last.feed_summed(z_nXD, direction_D)

    def _block(self, n: int) -> "Block":
        block = self.blocks[n]
        assert isinstance(block, Block)
        return block


def _beside(shared: UserState, name: str, of_item: Tensor) -> Tensor:
    """The request's fields, where they are shared, before the item's."""
    return torch.cat([shared[name], of_item], dim=-2) if name in shared else of_item


class Block(nn.Module):
    """Attention S of the fields over each other, joined to its input X by alpha, then a feed-forward layer per field.

    mult: Z = alpha S * X, which has no identity path; add: X + alpha S; mult_res: X * (1 + alpha S); none: X + S (R5).
    """

    def __init__(self, config: DeepMRConfig) -> None:
        super().__init__()
        width = config.emb_dim
        self.kind, self.relu, self.heads = config.sa_rezero, config.qkv_act == "relu", config.heads
        self.scale = math.sqrt(width / self.heads)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.ffn = nn.Sequential(
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),  # TensorFlow's slope
            nn.Dropout(config.dropout),
            nn.Linear(width, width),
        )
        self.alphas = nn.ParameterList() if self.kind == "none" else _alphas(config, 1)
        self.query_norm = nn.LayerNorm(width) if config.query_ln else nn.Identity()
        self.ffn_norm = nn.LayerNorm(width) if config.ffn_ln else nn.Identity()
        self.ffn_residual = config.ffn_residual
        self.ffn_dropout = nn.Dropout(config.dropout if config.ffn_dropout == "both" else 0.0)
        self.dropout = nn.Dropout(config.dropout)

    def read(self, x_nXD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields as they enter the join, their queries, scaled, keys and values, each of these [n, H, X, K]."""
        normed_nXD = self.query_norm(x_nXD)
        query_nXD, key_nXD, value_nXD = self.query(normed_nXD), self.key(x_nXD), self.value(x_nXD)
        if self.relu:
            query_nXD, key_nXD, value_nXD = F.relu(query_nXD), F.relu(key_nXD), F.relu(value_nXD)
        by_head = (split_heads(part, self.heads) for part in (query_nXD / self.scale, key_nXD, value_nXD))
        return normed_nXD, *by_head

    def forward(
        self, x_nXD: Tensor, query_nHXK: Tensor, key_nHYK: Tensor, value_nHYK: Tensor, mask_XY: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The attending fields before the feed-forward layer, and their attention [n, H, X, Y]."""
        weights_nHXY = masked_softmax(query_nHXK @ key_nHYK.transpose(-1, -2), mask_XY)
        z_nXD: Tensor = self.ffn_norm(self._join(x_nXD, merge_heads(self.dropout(weights_nHXY) @ value_nHYK)))
        return z_nXD, weights_nHXY

    def feed(self, z_nXD: Tensor) -> Tensor:
        """The feed-forward layer, W_2 LeakyReLU(W_1 z + b_1) + b_2, and z where there is a residual."""
        last = self.ffn[-1]
        out_nXD: Tensor = self.ffn_dropout(last(self._inside(z_nXD)))
        return out_nXD + z_nXD if self.ffn_residual else out_nXD

    @property
    def drops_output(self) -> bool:
        """Whether some of the feed-forward layer's outputs are dropped."""
        return self.training and self.ffn_dropout.p > 0

    def feed_summed(self, z_nXD: Tensor, direction_D: Tensor) -> Tensor:
        """The same, summed over the fields and read in one direction [n]."""
        last = self.ffn[-1]
        assert isinstance(last, nn.Linear)
        num_fields = z_nXD.shape[1]
        kernel_1X = (direction_D @ last.weight).repeat(1, num_fields)
        bias_1 = (num_fields * (direction_D @ last.bias)).unsqueeze(0)
        read_n1 = F.linear(self._inside(z_nXD).flatten(1), kernel_1X, bias_1)
        if self.ffn_residual:
            read_n1 = read_n1 + F.linear(z_nXD.flatten(1), direction_D.repeat(1, num_fields))
        return read_n1.squeeze(-1)

    def _inside(self, z_nXD: Tensor) -> Tensor:
        """LeakyReLU(W_1 z + b_1)."""
        # As one matrix of all fields: of more dimensions a runtime adds biases after the product, in a pass more.
        return torch.unflatten(self.ffn[:-1](z_nXD.flatten(0, 1)), 0, z_nXD.shape[:2])

    def _join(self, x_nXD: Tensor, s_nXD: Tensor) -> Tensor:
        if self.kind == "none":
            return x_nXD + s_nXD
        s_nXD = self.alphas[0] * s_nXD
        if self.kind == "add":
            return x_nXD + s_nXD
        return x_nXD * (s_nXD if self.kind == "mult" else 1 + s_nXD)


class Deep(nn.Module):
    """The MLP: l_0 = ReLU(W_0 x + b_0), x all fields, then l_j = l_{j-1} + alpha_j ReLU(W_j l_{j-1} + b_j).

    mult: l_j = l_{j-1} * alpha_j ReLU(..). none: l_j = ReLU(..).
    """

    def __init__(self, config: DeepMRConfig, num_fields: int) -> None:
        super().__init__()
        width, num = config.emb_dim, config.dnn_layers - 1
        self.kind = config.dnn_rezero
        self.first = nn.Linear(num_fields * width, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num))
        self.alphas = nn.ParameterList() if self.kind == "none" else _alphas(config, num)
        self.dropout = nn.Dropout(config.dropout)

    def read(self, x_nFD: Tensor, fields: slice) -> Tensor:
        """These fields' part in W_0 x."""
        weight_DFD = torch.unflatten(self.first.weight, 1, (-1, self.first.out_features))
        return F.linear(x_nFD.flatten(1), weight_DFD[:, fields].flatten(1))

    def forward(self, z_CD: Tensor) -> Tensor:
        """O_DNN, given W_0 x."""
        l_CD: Tensor = self.dropout(F.relu(z_CD + self.first.bias))
        for n, layer in enumerate(self.layers):
            next_CD = F.relu(layer(l_CD))
            if self.kind == "add":
                l_CD = l_CD + self.dropout(self.alphas[n] * next_CD)
            elif self.kind == "mult":
                l_CD = l_CD * self.dropout(self.alphas[n] * next_CD)
            else:
                l_CD = self.dropout(next_CD)
        return l_CD


def _alphas(config: DeepMRConfig, num: int) -> nn.ParameterList:
    return nn.ParameterList(torch.full((1,), float(config.alpha_init)) for _ in range(num))


def _normal(tensor: Tensor) -> None:
    """The code's rule for the MLP."""
    nn.init.normal_(tensor, std=0.01)


def _glorot(tensor: Tensor) -> None:
    """The code's rule for everything else; a number's direction counts as a table of one row."""
    nn.init.xavier_uniform_(tensor.view(-1, tensor.shape[-1]))
