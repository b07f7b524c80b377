"""The three parts of every baseline: a request and its ads, encoded apart, score as rows of their own do."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.features.schema import SchemaSpec
from models.layers.base import CTRModel, explain
from tests.models.halves import check_parts, score_alone
from tests.models.small import COLUMNS, ITEM_FIELDS, REQUEST_FIELDS, lively, one_request, tensors, with_history
from training.export import example

SCHEMA = with_history()
SMALL: dict[str, Any] = {"emb_dim": 4, "hidden": (6, 5)}
FINAL: dict[str, Any] = {"emb_dim": 3, "hidden_1": (6, 4), "hidden_2": (5, 4), "heads": 2, "gate_hidden": (5,)}
FLAT: list[tuple[str, dict[str, Any]]] = [
    ("lr", {"use_history": True}),
    ("fm", {"emb_dim": 4}),
    ("widedeep", SMALL | {"batch_norm": True}),
    ("deepfm", SMALL | {"hidden": ()}),
    ("dcn", SMALL),
    ("dcn", SMALL | {"cross_layers": 1}),
    ("dcnv2", SMALL),
    ("dcnv2", SMALL | {"cross_layers": 1}),
    ("dcnv2", SMALL | {"structure": "stacked"}),
    ("dcnv2", SMALL | {"rank": 2, "experts": 3}),
    ("dcnv2", SMALL | {"rank": 2, "experts": 3, "structure": "stacked"}),
    ("xdeepfm", SMALL | {"cin": (5,)}),
    ("xdeepfm", SMALL | {"cin": (5, 3)}),
    ("autoint", {"emb_dim": 4, "attention_dim": 6}),
    ("autoint", {"emb_dim": 4, "attention_dim": 6, "hidden": (6,)}),
    ("finalmlp", FINAL),
    ("finalmlp", FINAL | {"gate_1": "off", "gate_2": "item"}),
    ("finalmlp", FINAL | {"gate_1": "user", "gate_2": "context"}),
]
SEQUENCE: list[tuple[str, dict[str, Any]]] = [
    ("din", SMALL | {"attention_hidden": (5, 3)}),
    ("din", SMALL | {"attention_softmax": True, "attention_activation": "relu"}),
    ("din", SMALL | {"age_buckets": 9}),
    ("dien", SMALL | {"age_buckets": 9}),
    ("dmr", SMALL | {"age_buckets": 9}),
    ("bst", SMALL | {"age_buckets": 9, "heads": 2, "blocks": 2}),
    ("dien", SMALL),
    ("dmr", SMALL | {"attention_dim": 5}),
    ("bst", SMALL | {"heads": 2}),
    ("bst", SMALL | {"heads": 4, "blocks": 2}),
]


@pytest.mark.parametrize("history", [True, False], ids=["history", "no history"])
@pytest.mark.parametrize(("name", "options"), [*FLAT, *SEQUENCE], ids=str)
def test_a_request_and_its_ads_encoded_apart_score_as_rows_of_their_own(name, options, history):
    check_parts(lively(name, SCHEMA, **options), one_request(SCHEMA, 7, history=history))


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, o in FLAT if not {"gate_1", "gate_2"} & set(o)], ids=str)
@pytest.mark.parametrize("fields", [ITEM_FIELDS, REQUEST_FIELDS], ids=["item only", "request only"])
def test_a_side_without_fields_scores_alike_with_and_without_an_index(name, options, fields):
    schema = SchemaSpec(fields=fields).fit(COLUMNS)
    model, inputs = lively(name, schema, **options), tensors(example(schema, 1, 5))

    alone = score_alone(model, inputs)

    assert alone.shape == (5,)
    torch.testing.assert_close(alone, model(inputs), rtol=1e-10, atol=1e-10)


class ServedAlone(CTRModel):
    """A model as the serving graph composes it."""

    def __init__(self, model: CTRModel) -> None:
        super().__init__()
        self.explanations = model.explanations  # type: ignore[method-assign]  # the model's
        self.model = model

    def forward(self, inputs: Any) -> Tensor:
        return score_alone(self.model, inputs)


@pytest.mark.parametrize("name", ["lr", "autoint", "din", "dien", "bst"])
def test_a_request_alone_shows_what_its_rows_show(name):
    model = lively(name, SCHEMA)
    inputs = tensors(one_request(SCHEMA, 6))

    with torch.no_grad():
        shown, shown_alone = explain(model, inputs)[1], explain(ServedAlone(model), inputs)[1]

    assert list(shown) == [e.name for e in model.explanations()]
    for explanation, tensor in shown.items():
        np.testing.assert_allclose(shown_alone[explanation].detach(), tensor.detach(), rtol=0, atol=1e-12)


def test_bsts_merged_weights_are_those_of_attention_over_clicks_and_candidate():
    model: Any = lively("bst", SCHEMA, heads=2)
    inputs = tensors(example(SCHEMA, 3, 8))
    inputs["hist_mask"] = torch.tensor([[False, True, True, True], [False] * 4, [True] * 4])
    index = inputs["user_index"]
    clicks = model.clicks(inputs)[index]
    events = torch.cat([clicks, model.target(model.fields.item(inputs)).unsqueeze(1)], dim=1) + model.positions
    mask = torch.cat([inputs["hist_mask"][index], torch.ones(8, 1, dtype=torch.bool)], dim=1)

    with torch.no_grad():
        merged = explain(model, inputs)[1]["self_attn"][:, 0]
        query, key = (layer(events).unflatten(-1, (2, -1)).transpose(1, 2) for layer in attention_of(model))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        written = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(dim=-1) * mask[:, None, :, None]

    assert merged.shape == written.shape == (8, 2, 5, 5)
    np.testing.assert_allclose(merged.numpy(), written.numpy(), rtol=0, atol=1e-12)


def attention_of(model: Any) -> tuple[Any, Any]:
    attention = model.blocks[0].attention
    return attention.query, attention.key
