"""What the history baselines share: a click and a candidate described by the same fields, in the same order."""

# U requests, C candidates, T history length, R request fields, D width of a field, E = sequence fields * D
# I = item fields * D, H first hidden layer

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
class SequenceConfig(Config):
    emb_dim: Count = 16
    hidden: tuple[Count, ...] = (512, 128, 64)  # the MLP
    batch_norm: bool = False  # in the MLP
    dropout: Share = 0.0
    l2_emb: Weight = 0.0  # (weight / 2) * sum of squares of the tables


class SequenceModel(CTRModel):
    """An MLP over [request fields; item fields; what the candidate found in the history].

    A click is [its sequence fields], E wide; the target is the item fields that these are `of`, in the same order.
    """

    def __init__(self, config: SequenceConfig, schema: Schema, *, found: int, paper: str) -> None:
        """`found`: how many numbers say what the candidate found in the history."""
        super().__init__()
        _check_schema(schema, paper)
        self.config = config
        self.fields = FieldEmbeddings(schema, config.emb_dim, init=tiny_normal)
        items = [f.name for f in schema.group("item")]
        self.paired = [items.index(str(f.of)) for f in schema.group("behaviour")]
        self.event_width = len(self.paired) * config.emb_dim
        num_request = len(schema.group("user")) + len(schema.group("context"))
        self.request_width = num_request * config.emb_dim
        self.mlp = MLP(
            self.request_width + len(items) * config.emb_dim + found,
            config.hidden,
            dropout=config.dropout,
            batch_norm=config.batch_norm,
        )

    def read_request(self, inputs: Inputs) -> UserState:
        """What the MLP's first layer makes of the request's fields, where there are any."""
        fields = self.fields.group("user", inputs) + self.fields.group("context", inputs)
        if not fields:
            return {}
        return {"deep": F.linear(torch.cat(fields, dim=1), self.mlp.first.weight[:, : self.request_width])}

    def clicks(self, inputs: Inputs) -> Tensor:
        """The clicks [U, T, E], zero where there is none."""
        return torch.cat(self.fields.history(inputs), dim=-1)

    def target(self, items: Sequence[Tensor]) -> Tensor:
        """The candidates [C, E], as a click on each would look."""
        return torch.cat([items[index] for index in self.paired], dim=-1)

    def finish(self, state: UserState, items: Sequence[Tensor], found_CX: Tensor, user_index: Tensor) -> Tensor:
        """The logits [C]."""
        own_CY = torch.cat([*items, found_CX], dim=-1)
        z_CH = F.linear(own_CY, self.mlp.first.weight[:, self.request_width :], self.mlp.first.bias)
        if "deep" in state:
            z_CH = z_CH + state["deep"].index_select(0, user_index)
        return self.mlp.finish(z_CH)

    def penalty(self) -> Tensor:
        return self.fields.penalty(self.config.l2_emb)


def sampled_loss(score_nX: Tensor, others_nX: Tensor, true_nX: Tensor, other_nX: Tensor) -> Tensor:
    """-log sigma(score) - log(1 - sigma(score of another)), each a mean over where it is known: negative sampling."""
    found, missed = F.softplus(-score_nX) * true_nX, F.softplus(others_nX) * other_nX
    return found.sum() / true_nX.sum().clamp(min=1) + missed.sum() / other_nX.sum().clamp(min=1)


def _check_schema(schema: Schema, paper: str) -> None:
    clicks, items = schema.group("behaviour"), [f.name for f in schema.group("item")]
    if not clicks:
        raise ValueError(f"{paper} compares the candidate with past clicks; the schema has no sequence field")
    for field in clicks:
        if field.of not in items:
            raise ValueError(
                f"{paper} compares the candidate with past clicks field by field;"
                f" sequence {field.name} is of {field.of}, which is no item field"
            )
