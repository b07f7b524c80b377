"""Base of the flat baselines: each field is one vector; what the request or the ad alone decides is computed apart."""

# U requests, C candidates, R request fields, I item fields, F = R + I, D embedding width; n: U or C

from dataclasses import dataclass

import torch
from torch import Tensor

from models.features.schema import Schema
from models.layers.base import CTRModel, Inputs, UserState
from models.layers.config import Config, Count, Share, Weight
from models.layers.embeddings import FieldEmbeddings
from models.layers.initialisation import tiny_normal
from models.layers.mlp import MLP
from models.layers.request_matmul import of_request


@dataclass(frozen=True, kw_only=True)
class FlatConfig(Config):
    emb_dim: Count = 16
    use_history: bool = True  # pool each sequence field into one more flat field, where the schema has any
    l2_emb: Weight = 0.0  # (weight / 2) * sum of squares of the tables and first-order weights


@dataclass(frozen=True, kw_only=True)
class DeepConfig(FlatConfig):
    hidden: tuple[Count, ...] = (400, 400)
    batch_norm: bool = False
    dropout: Share = 0.0


class FlatModel(CTRModel):
    """A model of one matrix x [F, D] per candidate: the vectors of all its fields, the request's first."""

    def __init__(self, config: FlatConfig, schema: Schema) -> None:
        super().__init__()
        self.config = config
        self.fields = FieldEmbeddings(schema, config.emb_dim, init=tiny_normal)
        self.num_request = self.fields.num_request + (self.fields.num_sequences if config.use_history else 0)
        self.num_item = self.fields.num_item
        self.num_fields = self.num_request + self.num_item
        self.request_width, self.item_width = self.num_request * config.emb_dim, self.num_item * config.emb_dim

    def request_fields(self, inputs: Inputs) -> Tensor | None:
        return request_fields(self.fields, inputs, use_history=self.config.use_history)

    def join(self, state: UserState, items_CX: Tensor, user_index: Tensor | None) -> Tensor:
        """Each candidate's vectors after those of its request, the state's `fields`: [C, F, D], or flat."""
        if "fields" not in state:
            return items_CX
        return torch.cat([of_request(state["fields"], user_index, items_CX.shape[0]), items_CX], dim=1)

    def make_mlp(self, config: DeepConfig) -> MLP:
        """An MLP over x flattened, whose first layer is split into the request's part and the item's."""
        width = self.request_width + self.item_width
        return MLP(
            width,
            config.hidden,
            dropout=config.dropout,
            batch_norm=config.batch_norm,
            request_width=self.request_width,
        )

    def penalty(self) -> Tensor:
        return self.fields.penalty(self.config.l2_emb)


def request_fields(fields: FieldEmbeddings, inputs: Inputs, *, use_history: bool) -> Tensor | None:
    """The vectors [U, R, D] that the candidates of a request share: user, context and pooled history; None if none."""
    parts = [fields.request(inputs)] if fields.num_request else []
    if use_history and fields.num_sequences:
        parts.append(fields.pooled_history(inputs))
    return torch.cat(parts, dim=1) if parts else None


def add_request(x: Tensor, state: UserState, name: str, user_index: Tensor | None) -> Tensor:
    """A candidate's sums [C, ...] and those of its request, where the state has any of that name."""
    return x + of_request(state[name], user_index) if name in state else x


def request_names(schema: Schema, *, use_history: bool) -> tuple[str, ...]:
    """What `request_fields` gives, by name."""
    names = [field.name for field in (*schema.group("user"), *schema.group("context"))]
    past = schema.group("behaviour") if use_history else ()
    return (*names, *(f"past {field.name}" for field in past))
