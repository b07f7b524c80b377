"""FinalMLP against its equations, the fusion written head by head."""

from typing import Any

import numpy as np
import pytest
import torch

from models.baselines.finalmlp import FinalMLPConfig
from models.features.schema import SchemaSpec
from tests.models.flat import batch_norm, linear, sigmoid, vectors, weights
from tests.models.small import COLUMNS, ITEM_FIELDS, lively, tensors, with_history
from training.export import example

SCHEMA = with_history()
OPTIONS: dict[str, Any] = {"emb_dim": 3, "hidden_1": (7, 6), "hidden_2": (4,), "heads": 2, "gate_hidden": (5,)}
SWITCHES: list[dict[str, Any]] = [
    {},
    {"heads": 1},
    {"gate_1": "off", "gate_2": "off"},
    {"gate_1": "user", "gate_2": "item"},
    {"gate_1": "context", "gate_hidden": ()},
    {"gate_2": "user", "gate_hidden": (5, 4)},
    {"batch_norm": True, "dropout": 0.4},
    {"use_history": False},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_the_model_computes_what_the_paper_writes(switches):
    model: Any = lively("finalmlp", SCHEMA, **OPTIONS | switches)
    inputs = tensors(example(SCHEMA, 3, 9))

    logits = model(inputs).detach().numpy()

    rows = vectors(model.fields, inputs, history=model.config.use_history)
    expected = [paper_logit(model, row.flatten(), contexts(model, inputs, c)) for c, row in enumerate(rows)]
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(logits, expected, rtol=1e-12, atol=1e-10)


def contexts(model: Any, inputs: dict[str, torch.Tensor], c: int) -> dict[str, np.ndarray]:
    """What each gate reads for row c, from tables of its own."""
    read = {}
    for name, gate in model.gates.items():
        group = getattr(model.config, name)
        if group == "learned":
            read[name] = gate.vector[0].detach().numpy()
            continue
        row = c if group == "item" else int(inputs["user_index"][c])
        vectors_of = gate.fields.item if group == "item" else gate.fields.request
        read[name] = vectors_of(inputs).flatten(1)[row].detach().numpy()
    return read


def paper_logit(model: Any, e: np.ndarray, read: dict[str, np.ndarray]) -> float:
    c, p = model.config, weights(model)
    outputs = []
    for k, hidden in ((1, c.hidden_1), (2, c.hidden_2)):
        x = e
        if f"gate_{k}" in read:
            g = read[f"gate_{k}"]
            for layer in range(len(c.gate_hidden)):
                g = np.maximum(linear(p, f"gates.gate_{k}.hidden.{2 * layer}", g), 0)
            x = 2 * sigmoid(linear(p, f"gates.gate_{k}.out", g)) * e
        step = 3 + c.batch_norm
        for layer in range(len(hidden)):
            x = linear(p, f"stream_{k}.{layer * step}", x)
            if c.batch_norm:
                x = batch_norm(p, f"stream_{k}.{layer * step + 1}", x)
            x = np.maximum(x, 0)
        outputs.append(x)
    one, two = outputs
    logit = linear(p, "out_1", one)[0] + linear(p, "out_2", two)[0]
    a, b = len(one) // c.heads, len(two) // c.heads
    for h in range(c.heads):
        for i in range(a):
            for j in range(b):
                logit += one[h * a + i] * p["fusion"][h, i, j] * two[h * b + j]
    return float(logit)


def test_a_gate_starts_by_letting_everything_through():
    model: Any = lively("finalmlp", SCHEMA, **OPTIONS)
    model.gates["gate_1"].out.weight.data.zero_()
    model.gates["gate_1"].out.bias.data.zero_()

    np.testing.assert_array_equal(model.gates["gate_1"]({}).detach().numpy(), 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_1": ()}, "option hidden_1: expected at least one layer, got none"),
        ({"hidden_2": (9, 8), "heads": 3, "hidden_1": (6,)}, "3 do not divide the last layer of hidden_2, 8"),
    ],
)
def test_streams_that_cannot_be_fused_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FinalMLPConfig(**options)


def test_a_gate_without_fields_to_read_is_refused():
    schema = SchemaSpec(fields=ITEM_FIELDS).fit(COLUMNS)

    with pytest.raises(ValueError, match="a gate reads user fields and the schema has none; set it to learned"):
        lively("finalmlp", schema, gate_1="user")
