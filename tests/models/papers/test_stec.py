"""STEC against the paper's equations, written out row by row with the f x f x d products built in full."""

from typing import Any

import numpy as np
import pytest
import torch

from models import zoo
from models.features.schema import SchemaSpec
from models.layers.base import CTRModel
from models.papers.stec import Bilinear, STECConfig
from tests.models.flat import fields_of
from tests.models.halves import check_parts, score_alone
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
OPTIONS = {"emb_dim": D, "heads": HEADS, "blocks": 2, "hidden": (5,)}
SWITCHES: list[dict[str, Any]] = [
    {},
    {"hidden": ()},
    {"blocks": 1, "hidden": (5, 4)},
    {"heads": 1},
    {"pairs": "upper_diag"},
    {"pairs": "all"},
    {"blocks": 0},
    {"blocks": 0, "bilinear_form": "qk", "hidden": (), "field_mask": "user_first"},
    {"blocks": 0, "block_norm": "pre", "fusion": "last"},
    {"bilinear_form": "qk", "hidden": ()},
    {"bilinear_form": "qk", "heads": 3},
    {"bilinear_form": "blockdiag"},
    {"interaction": "scalar"},
    {"interaction": "scalar", "pairs": "all", "bilinear_form": "qk"},
    {"block_norm": "pre"},
    {"block_norm": "none"},
    {"ffn": False},
    {"fusion": "last"},
    {"fusion": "add"},
    {"bilinear": "explicit"},
    {"bilinear": "explicit", "ffn": False, "block_norm": "pre"},
    {"field_mask": "user_first"},
    {"field_mask": "user_first", "hidden": (), "blocks": 1},
    {"field_mask": "user_first", "pairs": "upper_diag", "block_norm": "pre", "fusion": "last"},
    {"field_mask": "user_first", "pairs": "all", "bilinear_form": "qk", "fusion": "add"},
    {"field_mask": "user_first", "pairs": "all", "bilinear_form": "blockdiag", "ffn": False},
    {"field_mask": "user_first", "interaction": "scalar", "block_norm": "none"},
]


@pytest.mark.parametrize("num_requests", [1, 3])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_the_model_computes_what_the_paper_writes(switches, num_requests):
    model = lively("stec", SCHEMA, **OPTIONS | switches)
    inputs = tensors(example(SCHEMA, num_requests, 12))

    logits = model(inputs).detach().numpy()

    expected = [paper_logit(model, x) for x in fields_of(model, inputs)]
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_one_requests_candidates_are_scored_as_rows_of_their_own(switches):
    check_parts(lively("stec", SCHEMA, **OPTIONS | switches), one_request(SCHEMA, 7, history=False))


def paper_logit(model: CTRModel, x: np.ndarray) -> float:
    """Eq. (2) to (11) for one row, with the readings of models.md section 4."""
    c: Any = model.config
    p = {name: value.numpy() for name, value in model.state_dict().items()}
    width = D // c.heads

    def linear(name, rows):
        return rows @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0.0)

    def layer_norm(name, rows):
        scaled = (rows - rows.mean(axis=1, keepdims=True)) / np.sqrt(rows.var(axis=1, keepdims=True) + 1e-5)
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    def batch_norm(name, vector):
        scaled = (vector - p[f"{name}.running_mean"]) / np.sqrt(p[f"{name}.running_var"] + 1e-5)
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    def softmax(scores):
        return np.exp(scores) / np.exp(scores).sum()

    def products(name, rows):
        """b[i, j] = l_i * r_j, and P[h, i, j], the sums of b over the heads' slices by sqrt of their width."""
        left = linear(f"{name}.left", rows) if c.bilinear_form == "qk" else rows
        if c.bilinear_form == "blockdiag":
            right = np.concatenate(
                [linear(f"{name}.right.{h}", rows[:, h * width : (h + 1) * width]) for h in range(c.heads)], axis=1
            )
        else:
            right = linear(f"{name}.right.0", rows)
        b = np.array([[left[i] * right[j] for j in range(F)] for i in range(F)])
        scores = [b[:, :, h * width : (h + 1) * width].sum(axis=-1) / np.sqrt(width) for h in range(c.heads)]
        return b, np.array(scores)

    def chosen(b, scores):
        pairs = [(i, j) for i in range(F) for j in range(F) if c.pairs == "all" or i < j + (c.pairs == "upper_diag")]
        if c.interaction == "scalar":
            return np.array([scores[h, i, j] for h in range(c.heads) for i, j in pairs])
        return np.concatenate([b[i, j] for i, j in pairs])

    def attend(name, rows, scores):
        v = linear(f"{name}.value", rows)
        heads = []
        for h in range(c.heads):
            part = slice(h * width, (h + 1) * width)
            seen = [R if c.field_mask == "user_first" and i < R else F for i in range(F)]
            heads.append(np.stack([softmax(scores[h, i, : seen[i]]) @ v[: seen[i], part] for i in range(F)]))
        return linear(f"{name}.out", np.concatenate(heads, axis=1))

    def own_scores(name, rows):
        q, k = linear(f"{name}.query", rows), linear(f"{name}.key", rows)
        parts = [slice(h * width, (h + 1) * width) for h in range(c.heads)]
        return np.array([q[:, part] @ k[:, part].T / np.sqrt(width) for part in parts])

    levels = []
    for n in range(c.blocks):
        block = f"blocks.{n}"
        read = layer_norm(f"{block}.norms.0", x) if c.block_norm == "pre" else x
        b, scores = products(f"{block}.bilinear", read)
        levels.append(chosen(b, scores))
        if c.bilinear == "explicit":
            x = x + attend(f"{block}.attention", read, own_scores(f"{block}.attention", read))
        else:
            x = x + attend(block, read, scores)
        x = layer_norm(f"{block}.norms.0", x) if c.block_norm == "post" else x
        if c.ffn:
            read = layer_norm(f"{block}.norms.1", x) if c.block_norm == "pre" else x
            x = x + linear(f"{block}.ffn.2", np.maximum(linear(f"{block}.ffn.0", read), 0))
            x = layer_norm(f"{block}.norms.1", x) if c.block_norm == "post" else x
    levels.append(chosen(*products("last", layer_norm("last_norm", x) if c.block_norm == "pre" else x)))

    if c.fusion == "last":
        z = batch_norm("norms.0", levels[-1])
    else:
        normed = [batch_norm(f"norms.{n}", level) for n, level in enumerate(levels)]
        z = sum(normed) if c.fusion == "add" else np.concatenate(normed)
    z = linear("head.first", z[None])
    for layer in range(len(c.hidden)):
        z = linear(f"head.rest.{3 * layer + 2}", np.maximum(z, 0))
    return float(z[0, 0])


@pytest.mark.parametrize(("pairs", "expected"), [("upper", 28), ("upper_diag", 36), ("all", 64)])
@pytest.mark.parametrize("blocks", [0, 3])
def test_n_blocks_make_n_plus_one_levels_of_interactions(pairs, expected, blocks):
    model = lively("stec", SCHEMA, **OPTIONS | {"pairs": pairs, "blocks": blocks})

    assert model.get_parameter("head.first.weight").shape == (5, (blocks + 1) * expected * D)


def scores_of(form: str, heads: int, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """The attention scores of one block's products [n, H, F, F] with these W_k, or W, and W_q."""
    bilinear = Bilinear(STECConfig(emb_dim=D, heads=heads, bilinear_form=form), F).double()  # type: ignore[arg-type]
    for layer, weight in zip((bilinear.right[0], bilinear.left), weights, strict=False):
        layer.weight.data = weight
    return bilinear.scores(*bilinear(x))


def test_merging_query_and_key_is_exact_with_one_head_and_another_function_with_more():
    draw = torch.Generator().manual_seed(3)
    query, key = (torch.randn(D, D, generator=draw, dtype=torch.float64) for _ in range(2))
    x = torch.randn(40, F, D, generator=draw, dtype=torch.float64)

    exact, written = scores_of("merged", 1, x, query.T @ key), scores_of("qk", 1, x, key, query)
    written_by_two = scores_of("qk", 2, x, key, query)
    # The scores of the merged form are linear in W, so the nearest of all W is a least-squares fit.
    units = torch.eye(D * D, dtype=torch.float64).unflatten(1, (D, D))
    by_unit = torch.stack([scores_of("merged", 2, x, unit).flatten() for unit in units], dim=1)
    nearest = by_unit @ torch.linalg.lstsq(by_unit, written_by_two.flatten().unsqueeze(1)).solution

    torch.testing.assert_close(exact, written, rtol=0, atol=1e-10)
    missed = (nearest.squeeze(1) - written_by_two.flatten()).norm() / written_by_two.norm()
    assert missed.item() > 0.5


def test_scalar_interactions_are_one_number_per_pair_and_head():
    model = lively("stec", SCHEMA, **OPTIONS | {"interaction": "scalar"})

    assert model.get_parameter("head.first.weight").shape == (5, 3 * 28 * HEADS)


def test_one_requests_answers_follow_from_what_its_rows_taught():
    model = lively("stec", SCHEMA, **OPTIONS, field_mask="user_first", fusion="add").train()
    inputs = tensors(example(SCHEMA, 1, 40))
    seen: dict[Any, torch.Tensor] = {}
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm1d):
            norm.register_forward_hook(lambda norm, read, _: seen.update({norm: read[0].detach()}))

    learned = model(inputs).detach().numpy()
    for norm, read in seen.items():
        norm.running_mean, norm.running_var = read.mean(dim=0), read.var(dim=0, unbiased=False)

    assert len(seen) == 3
    np.testing.assert_allclose(model.eval()(inputs).detach().numpy(), learned, rtol=0, atol=1e-10)


def test_a_masked_request_runs_through_all_blocks_before_a_candidate_is_seen():
    model = lively("stec", SCHEMA, **OPTIONS, field_mask="user_first")

    state = model.encode_user(tensors(example(SCHEMA, 3, 12)))

    assert {name: tuple(value.shape) for name, value in state.items() if name.endswith(".2")} == {
        "left.2": (3, R, D),
        "right.2": (3, R, D),
    }


def test_attention_of_its_own_beside_the_interactions_cannot_be_masked():
    with pytest.raises(ValueError, match="field_mask: user_first goes with bilinear implicit, got explicit"):
        STECConfig(field_mask="user_first", bilinear="explicit")


@pytest.mark.parametrize("fields", [ITEM_FIELDS, REQUEST_FIELDS], ids=["item", "request"])
@pytest.mark.parametrize("field_mask", ["none", "user_first"])
def test_fields_of_one_side_are_enough(fields, field_mask):
    schema = SchemaSpec(fields=fields).fit(COLUMNS)

    model = lively("stec", schema, **OPTIONS, field_mask=field_mask)

    logits = model(tensors(example(schema, 2, 3)))

    assert logits.shape == (3,)
    assert torch.isfinite(logits).all()
    alone = tensors(example(schema, 1, 3))
    torch.testing.assert_close(score_alone(model, alone), model(alone), rtol=0, atol=1e-10)


def test_the_history_is_not_read():
    schema = with_history()

    names = [i.name for i in used_inputs(lively("stec", schema, **OPTIONS), schema)]

    assert names == [i.name for i in schema.inputs if not i.name.startswith("hist")]


def test_one_field_makes_no_pair_and_is_refused():
    schema = SchemaSpec(fields=REQUEST_FIELDS[:1]).fit(COLUMNS)

    with pytest.raises(ValueError, match="pairs of fields; the schema has 1 outside the history"):
        lively("stec", schema)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="heads: 4 do not divide emb_dim 6"):
        STECConfig(emb_dim=6, heads=4)


def test_the_penalty_is_half_the_squares_of_whole_tables():
    model = lively("stec", SCHEMA, **OPTIONS, l2_emb=0.1)

    tables = sum(v.square().sum().item() for n, v in model.state_dict().items() if n.startswith("fields."))
    assert model.penalty().item() == pytest.approx(0.1 / 2 * tables)


def test_tables_start_tiny_and_dense_layers_xavier():
    state = zoo.build("stec", {"emb_dim": 64, "heads": 2}, SCHEMA).state_dict()

    assert state["fields.tables.ctx_hour.weight"][1:].std().item() == pytest.approx(1e-4, rel=0.1)
    assert state["blocks.0.bilinear.right.0.weight"].std().item() == pytest.approx(np.sqrt(2 / 128), rel=0.05)
    assert not state["blocks.0.ffn.0.bias"].any()
