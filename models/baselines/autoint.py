"""AutoInt: W. Song et al., "AutoInt: Automatic Feature Interaction Learning via Self-Attentive Neural Networks".

CIKM 2019, arXiv 1810.11921. With an MLP beside the attention it is the paper's AutoInt+.
"""

# U requests, C candidates, R request fields, I item fields, F = R + I, D embedding width, Y = I * D, A attention width
# H heads, in items' rows the MLP's first hidden layer

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.artifact.explanation import CANDIDATE, LOOKS, Axis, Explanation, numbered
from models.baselines.flat_model import DeepConfig, FlatModel, add_request, request_names
from models.features.schema import Schema
from models.layers.attention import merge_heads, split_heads
from models.layers.base import Inputs, UserState
from models.layers.config import Count
from models.layers.initialisation import start_linears
from models.layers.intermediates import record


@dataclass(frozen=True, kw_only=True)
class AutoIntConfig(DeepConfig):
    hidden: tuple[Count, ...] = ()  # none: AutoInt; some: AutoInt+
    attention_layers: Count = 3
    attention_dim: Count = 64  # all heads together
    heads: Count = 2
    scale: bool = True  # divide the scores by the root of a head's width; the paper does not
    layer_norm: bool = False  # before each layer's ReLU; the paper has none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_dim % self.heads:
            raise ValueError(f"option heads: {self.heads} do not divide attention_dim {self.attention_dim}")


class AutoInt(FlatModel):
    """E <- ReLU(attention of the fields over themselves + E W_res), layer by layer, then a linear map; + MLP(e)."""

    def __init__(self, config: AutoIntConfig, schema: Schema) -> None:
        super().__init__(config, schema)
        widths = (config.emb_dim, *[config.attention_dim] * (config.attention_layers - 1))
        self.heads = config.heads
        self.layers = nn.ModuleList(Interacting(config, width) for width in widths)
        self.out = nn.Linear(self.num_fields * config.attention_dim, 1)
        self.deep = self.make_mlp(config) if config.hidden else None
        start_linears(self, nn.init.xavier_normal_)

    def encode_user(self, inputs: Inputs) -> UserState:
        fields_URD = self.request_fields(inputs)
        if fields_URD is None:
            return {}
        state = {"fields": fields_URD}
        return state if self.deep is None else state | {"deep": self.deep.first.request(fields_URD.flatten(1))}

    def encode_items(self, inputs: Inputs) -> Tensor:
        """[C, Y] or [C, Y + H]: the embeddings; the item's part of the MLP's first layer.

        Not what the first layer makes of them, which is a dozen times as wide and hardly sooner read than computed.
        """
        x_CY = self.fields.item(inputs).flatten(1)
        return x_CY if self.deep is None else torch.cat([x_CY, self.deep.first.item(x_CY)], dim=-1)

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        deep_width = 0 if self.deep is None else self.deep.first.out_features
        x_CY, deep_CH = torch.split(items_CW, [self.item_width, deep_width], dim=-1)
        x_CFA = self.join(state, torch.unflatten(x_CY, -1, (self.num_item, self.config.emb_dim)), user_index)
        for layer in self.layers:
            x_CFA = layer(x_CFA)
        logits_C: Tensor = self.out(x_CFA.flatten(1)).squeeze(-1)
        return (
            logits_C
            if self.deep is None
            else logits_C + self.deep.finish(add_request(deep_CH, state, "deep", user_index))
        )

    def explanations(self) -> tuple[Explanation, ...]:
        schema = self.fields.schema
        items = tuple(field.name for field in schema.group("item"))
        names = request_names(schema, use_history=self.config.use_history) + items
        fields, attended = (Axis(name=name, labels=names) for name in ("field", "attended_field"))
        layers, heads = numbered("layer", len(self.layers)), numbered("head", self.heads)
        return (Explanation(name="field_attn", axes=(CANDIDATE, layers, heads, fields, attended), meaning=LOOKS),)


class Interacting(nn.Module):
    """One interacting layer, eq. (5)-(8). W_res stands only where the width changes, as the paper says of it."""

    def __init__(self, config: AutoIntConfig, width: int) -> None:
        super().__init__()
        inner, self.heads = config.attention_dim, config.heads
        self.scale = math.sqrt(inner / self.heads) if config.scale else 1.0
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.residual = nn.Linear(width, inner, bias=False) if width != inner else nn.Identity()
        self.norm = nn.LayerNorm(inner) if config.layer_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_CFD: Tensor) -> Tensor:
        query_CHFW = split_heads(self.query(x_CFD) / self.scale, self.heads)
        weights_CHFF = (query_CHFW @ split_heads(self.key(x_CFD), self.heads).transpose(-1, -2)).softmax(dim=-1)
        record("field_attn", weights_CHFF)
        attended_CFA = merge_heads(self.dropout(weights_CHFF) @ split_heads(self.value(x_CFD), self.heads))
        return F.relu(self.norm(attended_CFA + self.residual(x_CFD)))
