"""DCN, DCNv2 and xDeepFM against their formulas, written as loops over numbers and pairs of fields."""

from typing import Any

import numpy as np
import pytest

from models.baselines.cross import XDeepFMConfig
from tests.models.flat import linear, mlp, softmax, vectors, weights
from tests.models.small import lively, tensors, with_history
from training.export import example

SCHEMA = with_history()
OPTIONS: dict[str, Any] = {"emb_dim": 3, "hidden": (6, 5)}
SWITCHES: list[dict[str, Any]] = [{}, {"batch_norm": True, "dropout": 0.5}, {"use_history": False, "hidden": ()}]


def scored(name: str, options: dict[str, Any]) -> tuple[Any, np.ndarray, np.ndarray, Any]:
    """A model, its logits, each row's field vectors and the inputs."""
    model: Any = lively(name, SCHEMA, **OPTIONS | options)
    inputs = tensors(example(SCHEMA, 3, 9))
    logits = model(inputs).detach().numpy()
    assert np.std(logits) > 1e-3
    return model, logits, vectors(model.fields, inputs, history=model.config.use_history), inputs


@pytest.mark.parametrize("options", [*SWITCHES, {"cross_layers": 1}, {"cross_layers": 4}], ids=str)
def test_the_cross_layer_of_dcn_is_the_formula_written_as_loops(options):
    model, logits, rows, _ = scored("dcn", options)

    p = weights(model)
    expected = []
    for row in rows:
        x0 = row.flatten()
        x = list(x0)
        for layer in range(model.config.cross_layers):
            w, b = p[f"weights.{layer}.weight"][0], p[f"biases.{layer}"]
            dot = sum(x[j] * w[j] for j in range(len(x)))
            x = [x0[i] * dot + b[i] + x[i] for i in range(len(x))]
        expected.append(linear(p, "out", np.array(x))[0] + mlp(p, "deep", x0, model.config))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("structure", ["parallel", "stacked"])
@pytest.mark.parametrize("options", [*SWITCHES, {"cross_layers": 1}], ids=str)
def test_the_cross_layer_of_dcnv2_is_the_formula_written_as_loops(options, structure):
    model, logits, rows, _ = scored("dcnv2", options | {"structure": structure})

    p = weights(model)
    expected = []
    for row in rows:
        x0 = row.flatten()
        x = list(x0)
        for layer in range(model.config.cross_layers):
            w, b = p[f"layers.{layer}.weight"], p[f"layers.{layer}.bias"]
            mixed = [sum(w[i, j] * x[j] for j in range(len(x))) + b[i] for i in range(len(x))]
            x = [x0[i] * mixed[i] + x[i] for i in range(len(x))]
        if structure == "stacked":
            expected.append(mlp(p, "deep", np.array(x), model.config))
        else:
            expected.append(linear(p, "out", np.array(x))[0] + mlp(p, "deep", x0, model.config))
    np.testing.assert_allclose(logits, expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("options", [*SWITCHES, {"cin": (4,)}, {"cin": (5, 3, 2)}], ids=str)
def test_the_compressed_interactions_are_the_formula_written_as_loops(options):
    model, logits, rows, inputs = scored("xdeepfm", {"cin": (4, 3)} | options)

    p = weights(model)
    expected = model.linear(inputs).detach().numpy()
    for c, x0 in enumerate(rows):
        x, pooled = x0, []
        for layer, num_rows in enumerate(model.config.cin):
            w = p[f"layers.{layer}.weight"].reshape(num_rows, len(x), len(x0))
            following = np.zeros((num_rows, x0.shape[1]))
            for h in range(num_rows):
                for i in range(len(x)):
                    for j in range(len(x0)):
                        following[h] += w[h, i, j] * x[i] * x0[j]
            x = following
            pooled.extend(x.sum(axis=1))
        expected[c] += linear(p, "out", np.array(pooled))[0] + mlp(p, "deep", x0.flatten(), model.config)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"experts": 1}, {"rank": 1, "structure": "stacked"}], ids=str)
def test_dcn_mix_is_its_experts_one_by_one(options):
    model, logits, rows, _ = scored("dcnv2", {"rank": 2, "experts": 3} | options)

    c, p = model.config, weights(model)
    expected = []
    for row in rows:
        x0 = x = row.flatten()
        for layer in range(c.cross_layers):
            name = f"layers.{layer}"
            gate = softmax(linear(p, f"{name}.gate", x))
            crossed = np.zeros_like(x0)
            for k in range(c.experts):
                part = slice(k * c.rank, (k + 1) * c.rank)
                low = np.tanh(p[f"{name}.into.weight"][part] @ x)
                low = np.tanh(linear(p, f"{name}.within.{k}", low))
                crossed += gate[k] * x0 * (p[f"{name}.out_of.weight"][:, part] @ low + p[f"{name}.out_of.bias"])
            x = crossed + x
        if c.structure == "stacked":
            expected.append(mlp(p, "deep", x, c))
        else:
            expected.append(linear(p, "out", x)[0] + mlp(p, "deep", x0, c))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


def test_xdeepfm_without_a_cin_layer_is_refused():
    with pytest.raises(ValueError, match="option cin: expected at least one layer, got none"):
        XDeepFMConfig(cin=())
