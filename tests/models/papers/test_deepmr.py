"""DeepMR against the paper's equations, written out row by row, head by head and field by field."""

from typing import Any

import numpy as np
import pytest
import torch

from models import zoo
from models.features.schema import SchemaSpec
from models.layers.base import CTRModel
from models.papers.deepmr import DeepMRConfig
from tests.models.flat import fields_of
from tests.models.halves import check_parts
from tests.models.small import (
    COLUMNS,
    ITEM_FIELDS,
    REQUEST_FIELDS,
    lively,
    one_request,
    tensors,
    with_history,
    without_history,
)
from training.export import example, used_inputs

SCHEMA = without_history()
F, R, D, HEADS = 8, 5, 6, 2
OPTIONS = {"emb_dim": D, "heads": HEADS}
SWITCHES: list[dict[str, Any]] = [
    {},
    {"branches": "dnn"},
    {"branches": "sa"},
    {"beta": 0.2},
    {"beta": 1.0},
    {"beta_learned": True},
    {"emb_scale": False},
    {"ffn_residual": False},
    {"emb_scale": False, "ffn_residual": False, "field_mask": "user_first", "readout": "linear"},
    {"ffn_residual": False, "sa_final_ln": True, "sa_rezero": "add", "sa_blocks": 2},
    {"dropout": 0.5},
    {"heads": 3},
    {"dnn_layers": 1},
    {"dnn_layers": 5},
    {"dnn_rezero": "mult", "dnn_layers": 4, "alpha_init": 0.5},
    {"dnn_rezero": "none"},
    {"sa_rezero": "add"},
    {"sa_rezero": "mult_res", "sa_blocks": 3},
    {"sa_rezero": "none", "dnn_rezero": "none"},
    {"sa_blocks": 2, "alpha_init": 0.5},
    {"use_rezero": False, "sa_blocks": 2},
    {"qkv_act": "none"},
    {"query_ln": True, "ffn_ln": True, "sa_final_ln": True, "field_mask": "causal"},
    {"field_mask": "causal", "sa_blocks": 2, "sa_rezero": "add"},
    {"field_mask": "user_first", "sa_blocks": 2, "sa_rezero": "mult_res", "sa_final_ln": True},
    {"sa_readout": "mean"},
    {"sa_readout": "mean", "field_mask": "user_first"},
    {"readout": "linear"},
    {"readout": "linear", "field_mask": "user_first", "sa_rezero": "mult_res"},
    {"readout": "linear", "sa_final_ln": True, "branches": "sa"},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_the_model_computes_what_the_paper_writes(switches):
    model = lively("deepmr", SCHEMA, **OPTIONS | switches)
    inputs = tensors(example(SCHEMA, 3, 12))

    logits = model(inputs).detach().numpy()

    expected = [paper_logit(model, x) for x in fields_of(model, inputs)]
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_one_requests_candidates_are_scored_as_rows_of_their_own(switches):
    check_parts(lively("deepmr", SCHEMA, **OPTIONS | switches), one_request(SCHEMA, 7, history=False))


def paper_logit(model: CTRModel, embedded: np.ndarray) -> float:
    """Section 6.2 of models.md for one row."""
    c: Any = model.config
    p = {name: value.numpy() for name, value in model.state_dict().items()}
    x = (np.sqrt(D) if c.emb_scale else 1) * embedded + p["positions"]
    if c.branches == "dnn":
        out = deep(c, p, x)
    elif c.branches == "sa":
        out = attention(c, p, x)
    else:
        beta = p["beta"] if c.beta_learned else c.beta
        out = beta * attention(c, p, x) + (1 - beta) * deep(c, p, x)
    return float(linear(p, "readout", out)[0] if c.readout == "linear" else out.sum())


def linear(p, name, x):
    return p[f"{name}.weight"] @ x + p[f"{name}.bias"]


def layer_norm(p, name, x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def deep(c, p, x):
    state = np.maximum(linear(p, "deep.first", x.reshape(-1)), 0)
    for j in range(c.dnn_layers - 1):
        layer = np.maximum(linear(p, f"deep.layers.{j}", state), 0)
        if c.dnn_rezero == "none":
            state = layer
        elif c.dnn_rezero == "add":
            state = state + p[f"deep.alphas.{j}"] * layer
        else:
            state = state * p[f"deep.alphas.{j}"] * layer
    return state


def attention(c, p, x):
    width = D // c.heads
    for b in range(c.sa_blocks):
        block = f"attention.blocks.{b}"
        hat = np.stack([layer_norm(p, f"{block}.query_norm", row) if c.query_ln else row for row in x])
        act = (lambda z: np.maximum(z, 0)) if c.qkv_act == "relu" else (lambda z: z)
        q = [act(linear(p, f"{block}.query", row)) for row in hat]
        k = [act(linear(p, f"{block}.key", row)) for row in x]
        v = [act(linear(p, f"{block}.value", row)) for row in x]
        s = np.zeros((F, D))
        for h in range(c.heads):
            part = slice(h * width, (h + 1) * width)
            for n in range(F):
                seen = [m for m in range(F) if sees(c.field_mask, n, m)]
                weights = np.exp([q[n][part] @ k[m][part] / np.sqrt(width) for m in seen])
                s[n, part] = sum(w * v[m][part] for w, m in zip(weights / weights.sum(), seen, strict=True))
        alpha = p.get(f"{block}.alphas.0")
        z = join(c.sa_rezero, alpha, s, hat)
        rows = []
        for row in z:
            read = layer_norm(p, f"{block}.ffn_norm", row) if c.ffn_ln else row
            hidden = linear(p, f"{block}.ffn.0", read)
            fed = linear(p, f"{block}.ffn.3", np.where(hidden > 0, hidden, 0.2 * hidden))
            rows.append(fed + read if c.ffn_residual else fed)
        x = np.stack(rows)
    if c.sa_final_ln:
        x = np.stack([layer_norm(p, "attention.final_norm", row) for row in x])
    return x.mean(axis=0) if c.sa_readout == "mean" else x.sum(axis=0)


def sees(field_mask, n, m):
    if field_mask == "causal":
        return m <= n
    return field_mask == "none" or n >= R or m < R


def join(kind, alpha, s, hat):
    if kind == "mult":
        return alpha * s * hat
    if kind == "add":
        return hat + alpha * s
    return hat + s if kind == "none" else hat * (1 + alpha * s)


@pytest.mark.parametrize(("ffn_dropout", "drops_outputs"), [("both", True), ("first", False)])
def test_the_feed_forward_layer_drops_after_both_of_its_layers_as_the_code_does(ffn_dropout, drops_outputs):
    model: Any = lively("deepmr", SCHEMA, **OPTIONS, dropout=0.9, ffn_dropout=ffn_dropout)
    block, direction = model.attention.blocks[0].train(), torch.ones(D, dtype=torch.float64)
    z = torch.randn(12, F, D, dtype=torch.float64)

    torch.manual_seed(0)
    fed = block.feed(z)
    torch.manual_seed(0)
    summed = model.attention._read_out(z, direction)

    assert ((fed == z).double().mean().item() > 0.8) == drops_outputs
    torch.testing.assert_close(summed, fed.sum(dim=(1, 2)), rtol=0, atol=1e-10)


def test_a_learned_beta_starts_at_one_half_and_a_fixed_one_at_what_the_code_has():
    learned: Any = zoo.build("deepmr", OPTIONS | {"beta_learned": True}, SCHEMA)
    started: Any = zoo.build("deepmr", OPTIONS | {"beta_learned": True, "beta": 0.8}, SCHEMA)
    fixed: Any = zoo.build("deepmr", OPTIONS, SCHEMA)

    assert learned.logged_scalars() == {"beta": 0.5}
    assert started.logged_scalars() == {"beta": pytest.approx(0.8)}
    assert (fixed.beta, fixed.logged_scalars()) == (0.6, {})


def test_a_beta_above_one_is_refused():
    with pytest.raises(ValueError, match="option beta: expected a number, at least 0 and at most 1, or nothing"):
        DeepMRConfig(beta=1.1)


def gradients_at_the_start(**options):
    """The gradient of the logits' sum by parameter, of a model as it is initialised."""
    torch.manual_seed(0)
    model = zoo.build("deepmr", OPTIONS | options, SCHEMA).double()
    model(tensors(example(SCHEMA, 3, 12))).sum().backward()
    return {name: p.grad.abs().max().item() for name, p in model.named_parameters() if p.grad is not None}


def test_alpha_learns_from_the_first_step():
    gradient = gradients_at_the_start()

    assert gradient["attention.blocks.0.alphas.0"] > 1e-3
    assert gradient["deep.alphas.0"] > 1e-6


def test_with_the_codes_final_layer_norm_nothing_before_it_learns():
    gradient = gradients_at_the_start(sa_final_ln=True)

    before = {name: value for name, value in gradient.items() if name.startswith("attention.blocks.")}
    assert gradient["attention.final_norm.bias"] > 0
    assert len(before) == 11
    assert set(before.values()) == {0.0}


@pytest.mark.parametrize("options", [{"sa_blocks": 2}, {"dnn_rezero": "mult", "dnn_layers": 3}])
def test_products_in_a_row_that_start_at_zero_are_refused(options):
    with pytest.raises(ValueError, match=r"option \w+: with 2 mult in a row and alpha_init 0 nothing is learned"):
        DeepMRConfig(**options)

    DeepMRConfig(**options, alpha_init=0.1)


def test_blocks_with_an_identity_path_learn_from_alpha_zero():
    gradient = gradients_at_the_start(sa_blocks=3, sa_rezero="mult_res")

    assert min(gradient[f"attention.blocks.{n}.alphas.0"] for n in range(3)) > 1e-3


def test_without_rezero_no_layer_is_weighed():
    model = lively("deepmr", SCHEMA, **OPTIONS, use_rezero=False)

    assert not [name for name, _ in model.named_parameters() if "alphas" in name]


@pytest.mark.parametrize(("field_mask", "shared"), [("none", False), ("causal", True), ("user_first", True)])
def test_a_mask_lets_all_of_a_requests_attention_run_once(field_mask, shared):
    model = lively("deepmr", SCHEMA, **OPTIONS | {"field_mask": field_mask})

    state = model.encode_user(tensors(example(SCHEMA, 3, 12)))

    assert ("sum" in state) == shared


def test_the_history_is_not_read():
    schema = with_history()

    names = [i.name for i in used_inputs(lively("deepmr", schema, **OPTIONS), schema)]

    assert names == [i.name for i in schema.inputs if not i.name.startswith("hist")]


@pytest.mark.parametrize("field_mask", ["none", "causal", "user_first"])
def test_fields_of_the_item_alone_are_enough(field_mask):
    schema = SchemaSpec(fields=ITEM_FIELDS).fit(COLUMNS)

    logits = lively("deepmr", schema, **OPTIONS, field_mask=field_mask)(tensors(example(schema, 2, 3)))

    assert logits.shape == (3,)
    assert torch.isfinite(logits).all()


def test_a_schema_without_an_item_is_refused():
    with pytest.raises(ValueError, match="needs an item field; the schema has none"):
        lively("deepmr", SchemaSpec(fields=REQUEST_FIELDS).fit(COLUMNS))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="heads: 7 do not divide emb_dim 512"):
        DeepMRConfig(emb_dim=512, heads=7)


def test_the_penalty_is_half_the_squares_of_whole_tables():
    model = lively("deepmr", SCHEMA, **OPTIONS, l2_emb=0.1)

    tables = sum(v.square().sum().item() for n, v in model.state_dict().items() if n.startswith("fields."))
    assert model.penalty().item() == pytest.approx(0.1 / 2 * tables)


def test_the_mlp_starts_normal_and_the_rest_by_glorots_rule():
    state = zoo.build("deepmr", {"emb_dim": 64}, SCHEMA).state_dict()

    assert state["deep.first.weight"].std().item() == pytest.approx(0.01, rel=0.05)
    assert state["attention.blocks.0.key.weight"].abs().max().item() == pytest.approx(np.sqrt(6 / 128), rel=0.01)
    assert state["fields.tables.ctx_hour.weight"].abs().max().item() == pytest.approx(np.sqrt(6 / (26 + 64)), rel=0.02)
    assert not state["deep.first.bias"].any()
