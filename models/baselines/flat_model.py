"""What the flat baselines share: each field a vector; what depends on the request's vectors alone, computed once."""

# U requests, C candidates, R request fields, I item fields, F = R + I, D embedding width, H first hidden layer

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.features.schema import Schema
from models.layers.base import CTRModel, Inputs, UserState
from models.layers.config import Config, Count, Share, Weight
from models.layers.embeddings import FieldEmbeddings
from models.layers.initialisation import tiny_normal
from models.layers.mlp import MLP


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
        flat = [f for f in schema.fields if f.group != "behaviour" or config.use_history]
        self.num_fields = len(flat)
        self.num_request = sum(f.group != "item" for f in flat)

    def look_up(self, inputs: Inputs) -> UserState:
        """The request's vectors, where it has any fields."""
        fields = self.fields.request(inputs, use_history=self.config.use_history)
        return {"fields": torch.stack(fields, dim=1)} if fields else {}

    def join(self, state: UserState, items: Sequence[Tensor], user_index: Tensor) -> Tensor:
        """The matrices x [C, F, D]: each candidate's vectors under those of its request."""
        parts = [state["fields"].index_select(0, user_index)] if "fields" in state else []
        if items:
            parts.append(torch.stack(list(items), dim=1))
        return torch.cat(parts, dim=1)

    def penalty(self) -> Tensor:
        return self.fields.penalty(self.config.l2_emb)


class Deep(MLP):
    """The MLP over x flattened, its first layer in two halves: W [e_request; e_item] = W_r e_request + W_i e_item."""

    def __init__(self, model: FlatModel, config: DeepConfig) -> None:
        super().__init__(
            model.num_fields * config.emb_dim, config.hidden, dropout=config.dropout, batch_norm=config.batch_norm
        )
        self.request_width = model.num_request * config.emb_dim

    def read(self, state: UserState) -> UserState:
        """What the first layer makes of the request's vectors."""
        if "fields" not in state:
            return {}
        return {"deep": F.linear(state["fields"].flatten(1), self.first.weight[:, : self.request_width])}

    def score(self, state: UserState, items: Sequence[Tensor], user_index: Tensor) -> Tensor:
        """The logits [C], given what `read` left in the state."""
        z_CH: Tensor = self.first.bias
        if items:
            z_CH = F.linear(torch.cat(list(items), dim=1), self.first.weight[:, self.request_width :], z_CH)
        if "deep" in state:
            z_CH = z_CH + state["deep"].index_select(0, user_index)
        return self.finish(z_CH)


def request_names(schema: Schema, *, use_history: bool) -> tuple[str, ...]:
    """What `FieldEmbeddings.request` gives, by name."""
    names = [field.name for field in (*schema.group("user"), *schema.group("context"))]
    past = schema.group("behaviour") if use_history else ()
    return (*names, *(f"past {field.name}" for field in past))
