"""LR and DeepFM against their formulas as sums over single fields and pairs of fields."""

from typing import Any

import numpy as np
import pytest
import torch

from models.blocks import CTRModel, FieldEmbeddings
from models.schema import SchemaSpec
from tests.models.small import COLUMNS, ITEM_FIELDS, REQUEST_FIELDS, lively, tensors, with_history, without_history
from training.export import example, used_inputs


def vectors(fields: Any, inputs: dict[str, torch.Tensor], *, history: bool) -> np.ndarray:
    """Each row's field vectors [C, F, D], request's first; the embedding itself is tested in test_blocks.py."""
    assert isinstance(fields, FieldEmbeddings)
    request = fields.group("user", inputs) + fields.group("context", inputs)
    if history:
        mask = inputs["hist_mask"].unsqueeze(-1)
        request += [(e * mask).sum(1) / mask.sum(1).clamp(min=1) for e in fields.history(inputs)]
    item = torch.stack(fields.group("item", inputs), dim=1)
    return torch.cat([torch.stack(request, dim=1)[inputs["user_index"]], item], dim=1).detach().numpy()


@pytest.mark.parametrize("history", [False, True])
def test_lr_is_a_bias_and_one_weight_per_value(history):
    schema = with_history()
    model: Any = lively("lr", schema, use_history=history)
    inputs = tensors(example(schema, 3, 9))

    logits = model(inputs).detach().numpy()

    weights = vectors(model.fields, inputs, history=history)
    assert weights.shape == (9, 10 if history else 8, 1)
    np.testing.assert_allclose(logits, [sum(row[:, 0]) + model.bias.item() for row in weights], atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{}, {"hidden": ()}, {"batch_norm": True}, {"use_history": False}, {"hidden": (3,), "dropout": 0.5}],
    ids=str,
)
def test_deepfm_is_lr_and_all_pairs_and_an_mlp_over_the_same_vectors(options):
    schema = with_history()
    model: Any = lively("deepfm", schema, **{"emb_dim": 4, "hidden": (6, 5)} | options)
    inputs = tensors(example(schema, 3, 9))

    logits = model(inputs).detach().numpy()

    expected = model.linear(inputs).detach().numpy()
    rows = vectors(model.fields, inputs, history=model.config.use_history)
    mlp = model.mlp(torch.from_numpy(rows).flatten(1)).detach().numpy()
    for c, row in enumerate(rows):
        expected[c] += sum(row[i] @ row[j] for i in range(len(row)) for j in range(i)) + mlp[c]
    np.testing.assert_allclose(logits, expected, atol=1e-12)


@pytest.mark.parametrize("name", ["lr", "deepfm"])
def test_the_history_is_read_where_asked_and_there(name):
    def reads(schema, **options):
        return {i.name.split(".")[0] for i in used_inputs(lively(name, schema, **options), schema)}

    assert {"hist", "hist_mask"} <= reads(with_history(), use_history=True)
    assert not {"hist", "hist_mask"} & reads(with_history(), use_history=False)
    assert not {"hist", "hist_mask"} & reads(without_history(), use_history=True)


@pytest.mark.parametrize("name", ["lr", "deepfm"])
@pytest.mark.parametrize("fields", [ITEM_FIELDS, REQUEST_FIELDS], ids=["item only", "request only"])
def test_either_side_may_have_no_fields(name, fields):
    schema = SchemaSpec(fields=fields).fit(COLUMNS)
    inputs = tensors(example(schema, 2, 3))

    logits = lively(name, schema)(inputs)

    assert logits.shape == (3,)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ["lr", "deepfm"])
def test_the_penalty_is_half_the_squares_of_whole_tables(name):
    model: CTRModel = lively(name, with_history(), l2_emb=0.1)

    tables = sum(v.square().sum().item() for n, v in model.state_dict().items() if "fields." in n)
    assert model.penalty().item() == pytest.approx(0.1 / 2 * tables)
