"""Base of the history baselines: a click and a candidate described by the same fields, in the same order."""

# U requests, C candidates, T history length, I item fields, S sequence fields, D width of a field, E = S * D
# X width of the interest, H first hidden layer

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.features.schema import Schema
from models.layers.base import CTRModel, Inputs, UserState, history_age, history_mask
from models.layers.click_age import AgeBuckets, AgeEmbedding
from models.layers.config import Config, Count, Share, Weight
from models.layers.embeddings import FieldEmbeddings
from models.layers.initialisation import tiny_normal
from models.layers.mlp import MLP
from models.layers.request_matmul import of_request


@dataclass(frozen=True, kw_only=True)
class SequenceConfig(Config):
    emb_dim: Count = 16
    hidden: tuple[Count, ...] = (512, 128, 64)  # the MLP
    batch_norm: bool = False  # in the MLP
    dropout: Share = 0.0
    l2_emb: Weight = 0.0  # (weight / 2) * sum of squares of the tables
    age_buckets: AgeBuckets = 0  # of a click's age, cut at 1, 2, 4, ... seconds; 0: ages are not read


class SequenceModel(CTRModel):
    """An MLP over [request fields; item fields; interest], the interest being the history as this candidate reads it.

    A click is [its sequence fields], E wide; the target is the item fields that these are `of`, in the same order.
    """

    def __init__(self, config: SequenceConfig, schema: Schema, *, interest_width: int, paper: str) -> None:
        super().__init__()
        _check_schema(schema, paper)
        self.config = config
        self.fields = FieldEmbeddings(schema, config.emb_dim, init=tiny_normal)
        items = [f.name for f in schema.group("item")]
        self.paired = [items.index(str(f.of)) for f in schema.group("behaviour")]
        self.event_width = len(self.paired) * config.emb_dim
        self.ages = AgeEmbedding(config.age_buckets, self.event_width) if config.age_buckets else None
        request_width = self.fields.num_request * config.emb_dim
        self.mlp = MLP(
            request_width + len(items) * config.emb_dim + interest_width,
            config.hidden,
            dropout=config.dropout,
            batch_norm=config.batch_norm,
            request_width=request_width,
            cross_width=interest_width,
        )

    def read_request(self, inputs: Inputs) -> UserState:
        """`deep` [U, H]: what the MLP's first layer makes of the request's fields, where there are any."""
        if not self.fields.num_request:
            return {}
        return {"deep": self.mlp.first.request(self.fields.request(inputs).flatten(1))}

    def clicks(self, inputs: Inputs) -> Tensor:
        """The clicks [U, T, E], zero where there is none."""
        return self.fields.history(inputs).flatten(2)

    def aged_clicks(self, inputs: Inputs) -> Tensor:
        """The clicks, each plus the vector of its age where the config asks for ages; zero where there is none.

        Added, not joined: a click stays as wide as the target that it is compared with, and no item row grows.
        """
        clicks_UTE = self.clicks(inputs)
        if self.ages is None:
            return clicks_UTE
        ages_UTE: Tensor = self.ages(history_age(inputs))
        return clicks_UTE + ages_UTE * history_mask(inputs).unsqueeze(-1)

    def target(self, items_CID: Tensor) -> Tensor:
        """The candidates [C, E], as a click on each would look."""
        return torch.cat([items_CID[:, index] for index in self.paired], dim=-1)

    def read_item(self, items_CID: Tensor) -> Tensor:
        """What the MLP's first layer makes of the item's fields: [C, H], the last columns of every item row."""
        return self.mlp.first.item(items_CID.flatten(1))

    def finish(self, state: UserState, deep_CH: Tensor, interest_CX: Tensor, user_index: Tensor | None) -> Tensor:
        """The logits [C]; `deep` is what `read_item` gave."""
        z_CH = deep_CH + self.mlp.first.cross(interest_CX)
        if "deep" in state:
            z_CH = z_CH + of_request(state["deep"], user_index)
        return self.mlp.finish(z_CH)

    def penalty(self) -> Tensor:
        return self.fields.penalty(self.config.l2_emb)


def sampled_loss(
    score_nX: Tensor, others_nX: Tensor, true_nX: Tensor, other_nX: Tensor, *, negatives: int = 1
) -> Tensor:
    """-log sigma(score) - sum over so many negatives of log(1 - sigma(score of another)): negative sampling.

    Each term is its mean over where it is known, so that a negative that happens to be the click itself counts as drawn
    again.
    """
    hits, misses = F.softplus(-score_nX) * true_nX, F.softplus(others_nX) * other_nX
    return hits.sum() / true_nX.sum().clamp(min=1) + negatives * misses.sum() / other_nX.sum().clamp(min=1)


def _check_schema(schema: Schema, paper: str) -> None:
    clicks, items = schema.group("behaviour"), [f.name for f in schema.group("item")]
    if not clicks:
        raise ValueError(f"{paper} compares the candidate with past clicks; the schema has no sequence field")
    for field in clicks:
        if field.of not in items:
            source = f"sequence {field.name} is of {field.of}" if field.of else f"a click's own field is {field.name}"
            raise ValueError(
                f"{paper} compares the candidate with past clicks field by field; {source}, which is no item field"
            )
