"""LR, FM, Wide & Deep and DeepFM against their formulas as sums over single fields and pairs; laws of all baselines."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models import zoo
from models.features.field import Field, Group
from models.features.schema import Schema, SchemaSpec
from models.layers.base import CTRModel
from tests.models.flat import mlp, vectors, weights
from tests.models.small import COLUMNS, ITEM_FIELDS, REQUEST_FIELDS, lively, tensors, with_history, without_history
from training import recipes
from training.export import example, used_inputs

FLAT = ["lr", "fm", "widedeep", "deepfm", "dcn", "dcnv2", "xdeepfm", "autoint", "finalmlp"]
ALL = [*FLAT, "din", "dien", "dmr", "bst"]


@pytest.mark.parametrize("history", [False, True])
def test_lr_is_a_bias_and_one_weight_per_value(history):
    schema = with_history()
    model: Any = lively("lr", schema, use_history=history)
    inputs = tensors(example(schema, 3, 9))

    logits = model(inputs).detach().numpy()

    rows = vectors(model.fields, inputs, history=history)
    assert rows.shape == (9, 10 if history else 8, 1)
    np.testing.assert_allclose(logits, [sum(row[:, 0]) + model.bias.item() for row in rows], atol=1e-12)


@pytest.mark.parametrize("history", [False, True])
def test_fm_is_lr_and_all_pairs(history):
    schema = with_history()
    model: Any = lively("fm", schema, emb_dim=4, use_history=history)
    inputs = tensors(example(schema, 3, 9))

    logits = model(inputs).detach().numpy()

    expected = model.linear(inputs).detach().numpy()
    for c, row in enumerate(vectors(model.fields, inputs, history=history)):
        expected[c] += sum(row[i] @ row[j] for i in range(len(row)) for j in range(i))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [{}, {"hidden": ()}, {"batch_norm": True}, {"use_history": False}, {"hidden": (3,), "dropout": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("name", ["widedeep", "deepfm"])
def test_the_deep_models_are_lr_and_an_mlp_over_the_vectors_and_deepfm_all_pairs_too(name, options):
    schema = with_history()
    model: Any = lively(name, schema, **{"emb_dim": 4, "hidden": (6, 5)} | options)
    inputs = tensors(example(schema, 3, 9))

    logits = model(inputs).detach().numpy()

    expected = model.linear(inputs).detach().numpy()
    for c, row in enumerate(vectors(model.fields, inputs, history=model.config.use_history)):
        expected[c] += mlp(weights(model), "mlp" if name == "deepfm" else "deep", row.flatten(), model.config)
        if name == "deepfm":
            expected[c] += sum(row[i] @ row[j] for i in range(len(row)) for j in range(i))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", FLAT)
def test_the_history_is_read_where_asked_and_there(name):
    def reads(schema, **options):
        return {i.name.split(".")[0] for i in used_inputs(lively(name, schema, **options), schema)}

    assert {"hist", "hist_mask"} <= reads(with_history(), use_history=True)
    assert not {"hist", "hist_mask"} & reads(with_history(), use_history=False)
    assert not {"hist", "hist_mask"} & reads(without_history(), use_history=True)


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("fields", [ITEM_FIELDS, REQUEST_FIELDS], ids=["item only", "request only"])
def test_either_side_may_have_no_fields(name, fields):
    schema = SchemaSpec(fields=fields).fit(COLUMNS)
    inputs = tensors(example(schema, 2, 3))

    logits = lively(name, schema)(inputs)

    assert logits.shape == (3,)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ALL)
def test_the_penalty_is_half_the_squares_of_whole_tables(name):
    model: CTRModel = lively(name, with_history(), l2_emb=0.1)

    tables = sum(v.square().sum().item() for n, v in model.state_dict().items() if "fields." in n)
    assert model.penalty().item() == pytest.approx(0.1 / 2 * tables)


@pytest.mark.parametrize("name", [name for name in ALL if name not in {"lr", "fm"}])
def test_dense_layers_start_by_xaviers_rule_with_zero_biases(name):
    model = zoo.build(name, {}, with_history())

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert all(layer.bias is None or not layer.bias.any() for layer in layers)
    for layer in layers:
        if layer.weight.numel() > 2000:
            expected = np.sqrt(2 / sum(layer.weight.shape))
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.1)


# Rows of each table in the benchmark's later logs, and parameters logged. The earlier logs (FuxiCTR 1) have one special
# id per field instead of two, so that each table is a row shorter. Beside an MLP their LR has no bias; theirs is one in
# each CIN row, in CIN's map, and in each of FinalMLP's two linear maps, where here one does for the sum.
FRAPPE: dict[str, tuple[Group, int]] = {
    "user": ("user", 956), "item": ("item", 4084), "daytime": ("context", 9), "weekday": ("context", 9),
    "isweekend": ("context", 4), "homework": ("context", 5), "cost": ("context", 4), "weather": ("context", 11),
    "country": ("context", 82), "city": ("context", 235),
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "num_parameters"),
    [
        ("fm_frappe", 59_280 + 10 * 11),
        ("widedeep_frappe", 423_280 + 10 * 11 + 1),
        ("dcn_frappe", 418_591 + 10 * 10),
        ("dcnv2_frappe", 458_391 + 10 * 10),
        ("xdeepfm_frappe", 429_809 + 10 * 11 - 64),
        ("autoint_frappe", 622_180 + 10 * 10),
        ("finalmlp_frappe", 253_392 - 1),
    ],
)
def test_the_recipes_for_frappe_are_as_large_as_the_benchmarks_runs(recipe, num_parameters):
    fields = tuple(
        Field(name=name, kind="categorical", group=group, vocabulary=tuple(map(str, range(rows - 2))))
        for name, (group, rows) in FRAPPE.items()
    )
    schema = Schema(user_key="user", item_key="item", history_length=0, fields=fields)
    run = recipes.RECIPES[recipe]()

    model = zoo.build(run.model, run.model_config, schema)

    assert sum(p.numel() for p in model.parameters()) == num_parameters
