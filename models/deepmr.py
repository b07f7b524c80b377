"""DeepMR: S. Elsayed and L. Schmidt-Thieme, "Deep Multi-Representation Model for Click-Through Rate Prediction".

arXiv 2210.10664. R1..R14 are the ambiguities listed in models.md section 6.3, "the code" is the authors'.
"""

# U requests, C candidates; F flat fields (R of the request first, G of the item); D width

import math
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn

from models.blocks import (
    CTRModel,
    FieldEmbeddings,
    Inputs,
    UserState,
    start_linears,
)
from models.config import Config, Count, Share, Weight
from models.deepmr_branches import Block, Deep, FieldAttention
from models.explanation import BIAS, CANDIDATE, LOOKS, Axis, Explanation, numbered, of_fields
from models.schema import Schema
from models.taps import tap, tapped


@dataclass(frozen=True, kw_only=True)
class DeepMRConfig(Config):
    """The paper's model; options named R.. settle what the paper leaves open (models.md section 6.3)."""

    emb_dim: Count = 16  # R3: one width everywhere
    branches: Literal["both", "dnn", "sa"] = "both"
    beta: Share = 0.6  # O = beta O_SA + (1 - beta) O_DNN
    beta_learned: bool = False  # R10: then it starts there, unconstrained
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
    sa_final_ln: bool = False  # R6: the code's, and with alpha_init 0 nothing before it learns
    sa_readout: Literal["sum", "mean"] = "sum"  # R2
    readout: Literal["sum", "linear"] = "sum"  # R14
    dropout: Share = 0.0
    l2_emb: Weight = 0.0  # R8: (weight / 2) * sum of squares of the tables

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.emb_dim % self.heads:  # R9
            raise ValueError(f"option heads: {self.heads} do not divide emb_dim {self.emb_dim}")
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

    Flat fields only: the history is not read. A request's fields enter the MLP's first layer and the first block's
    queries, keys and values once for all candidates. With `field_mask` causal or user_first they never attend to the
    item, and then all their blocks run once; a candidate computes only its own fields (models.md section 8.5).
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
        self.beta = nn.Parameter(torch.full((1,), float(config.beta))) if mixed and config.beta_learned else config.beta
        self.readout = nn.Linear(width, 1) if config.readout == "linear" else None
        start_linears(self, nn.init.xavier_uniform_)
        if self.deep is not None:
            start_linears(self.deep, _normal)

    def encode_user(self, inputs: Inputs) -> UserState:
        fields = self.fields.group("user", inputs) + self.fields.group("context", inputs)
        if not fields:
            return {}
        x_URD = self._place(fields, self.positions[: self.num_request])
        state = self.attention.read_request(x_URD, self._direction()) if self.attention is not None else {}
        if self.deep is not None:
            state["deep"] = self.deep.read(x_URD, slice(0, self.num_request))
        return state

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        own = {name: value.index_select(0, inputs["user_index"]) for name, value in state.items()}
        x_CGD = self._place(self.fields.group("item", inputs), self.positions[self.num_request :])
        outputs = []
        if self.attention is not None:
            outputs.append(self.attention(own, x_CGD, self._direction()))
        if self.deep is not None:
            z_CD = self.deep.read(x_CGD, slice(self.num_request, self.num_fields))
            outputs.append(self.deep(z_CD + own["deep"] if "deep" in own else z_CD) @ self._direction())
        if len(outputs) == 2:
            outputs = [self.beta * outputs[0], (1 - self.beta) * outputs[1]]
        if tapped():
            self._show(outputs)
        logit_C: Tensor = reduce(torch.add, outputs)
        return logit_C if self.readout is None else logit_C + self.readout.bias

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
        tap("branch_logit", torch.stack(outputs, dim=1))
        if self.readout is not None:
            tap("bias", self.readout.bias.squeeze())
        if self._alphas():
            tap("alpha", torch.cat(list(self._alphas().values())))
        tap("beta", torch.as_tensor(self.beta).squeeze())

    def _alphas(self) -> dict[str, Tensor]:
        """Every alpha, [1], by the layer it weighs."""
        attention = [] if self.attention is None else [b.alphas for b in self.attention.blocks if isinstance(b, Block)]
        layers = {f"attention {n + 1}": alphas[0] for n, alphas in enumerate(attention) if len(alphas)}
        return layers | {f"mlp {n + 2}": alpha for n, alpha in enumerate(self.deep.alphas if self.deep else [])}

    def _place(self, fields: list[Tensor], positions_FD: Tensor) -> Tensor:
        """sqrt(D) Emb + Pos; the factor is the code's."""
        return torch.stack(fields, dim=1) * math.sqrt(self.config.emb_dim) + positions_FD


def _normal(tensor: Tensor) -> None:
    """The code's rule for the MLP."""
    nn.init.normal_(tensor, std=0.01)


def _glorot(tensor: Tensor) -> None:
    """The code's rule for everything else; a number's direction counts as a table of one row."""
    nn.init.xavier_uniform_(tensor.view(-1, tensor.shape[-1]))
