"""AutoInt against its equations, written field by field and head by head."""

from typing import Any

import numpy as np
import pytest

from models.baselines.autoint import AutoIntConfig
from tests.models.flat import layer_norm, linear, mlp, softmax, vectors, weights
from tests.models.small import lively, tensors, with_history
from training.export import example

SCHEMA = with_history()
OPTIONS: dict[str, Any] = {"emb_dim": 4, "attention_dim": 6, "heads": 2, "attention_layers": 2}
SWITCHES: list[dict[str, Any]] = [
    {},
    {"scale": False},
    {"layer_norm": True},
    {"heads": 3, "attention_layers": 1},
    {"attention_dim": 4, "attention_layers": 3},
    {"hidden": (7, 5), "batch_norm": True, "dropout": 0.4},
    {"use_history": False},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_the_model_computes_what_the_paper_writes(switches):
    model: Any = lively("autoint", SCHEMA, **OPTIONS | switches)
    inputs = tensors(example(SCHEMA, 3, 9))

    logits = model(inputs).detach().numpy()

    rows = vectors(model.fields, inputs, history=model.config.use_history)
    expected = [paper_logit(model, row) for row in rows]
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


def paper_logit(model: Any, e: np.ndarray) -> float:
    """Eq. (5) to (9) for one row; with hidden layers, AutoInt+'s MLP beside it."""
    c, p = model.config, weights(model)
    width = c.attention_dim // c.heads
    x = e
    for layer in range(c.attention_layers):
        q, k, v = (linear(p, f"layers.{layer}.{name}", x) for name in ("query", "key", "value"))
        following = np.zeros((len(e), c.attention_dim))
        for m in range(len(e)):
            for h in range(c.heads):
                part = slice(h * width, (h + 1) * width)
                scores = np.array([q[m, part] @ k[n, part] for n in range(len(e))])
                alpha = softmax(scores / np.sqrt(width) if c.scale else scores)
                following[m, part] = sum(alpha[n] * v[n, part] for n in range(len(e)))
        residual = linear(p, f"layers.{layer}.residual", x) if x.shape[1] != c.attention_dim else x
        total = following + residual
        if c.layer_norm:
            total = layer_norm(p, f"layers.{layer}.norm", total)
        x = np.maximum(total, 0)
    logit = float(linear(p, "out", x.flatten())[0])
    return logit + (mlp(p, "deep", e.flatten(), c) if c.hidden else 0.0)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="heads: 4 do not divide attention_dim 6"):
        AutoIntConfig(attention_dim=6, heads=4)
