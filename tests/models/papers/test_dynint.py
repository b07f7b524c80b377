"""DynInt against the papers' equations, written out row by row, with the kernels of each row built in full."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from models import zoo
from models.features.schema import SchemaSpec
from models.layers.base import CTRModel
from models.papers.dynint import DynInt, DynIntConfig
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
F, R, D, S = 8, 5, 6, 2
P, W = S * F, D // S
OPTIONS = {"emb_dim": D, "subspaces": S, "layers": 2, "kernel_size": 5, "reduction": 3}
SWITCHES: list[dict[str, Any]] = [
    *({"mode": mode} for mode in ("pin", "da", "dgp", "dwp")),
    *({"mode": mode, "gate_scope": "request"} for mode in ("da", "dgp", "dwp")),
    *({"mode": mode, "residual": False} for mode in ("pin", "dwp")),
    {"mode": "da", "da_gate": "row"},
    {"mode": "da", "reduction": 1000},
    {"mode": "dgp", "dgp_sigma": "linear", "kernel_size": 1},
    {"mode": "dgp", "kernel_size": P + 4},
    {"mode": "dwp", "latent_rank": 1},
    {"mode": "dwp", "latent_rank": 3, "dwp_offset": "inv"},
    {"mode": "pin", "layers": 4},
    {"layers": 0},
    {"layers": 0, "residual": False},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_the_model_computes_what_the_paper_writes(switches):
    model = lively("dynint", SCHEMA, **OPTIONS | switches)
    inputs = tensors(example(SCHEMA, 3, 12))

    logits = model(inputs).detach().numpy()

    expected = [paper_logit(model, x) for x in fields_of(model, inputs)]
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_one_requests_candidates_are_scored_as_rows_of_their_own(switches):
    check_parts(lively("dynint", SCHEMA, **OPTIONS | switches), one_request(SCHEMA, 7, history=False))


@pytest.mark.parametrize("mode", ["dgp", "dwp"])
def test_weights_made_once_for_a_request_are_those_of_its_rows(mode):
    model = lively("dynint", SCHEMA, **OPTIONS, mode=mode, gate_scope="request")
    inputs = tensors(example(SCHEMA, 1, 12))

    logits = score_alone(model, inputs).detach().numpy()

    np.testing.assert_allclose(logits, [paper_logit(model, x) for x in fields_of(model, inputs)], rtol=0, atol=1e-10)


@pytest.mark.parametrize("subspaces", [1, 3, D])
def test_any_number_of_subspaces_is_the_same_formula_over_other_rows(subspaces):
    model = lively("dynint", SCHEMA, **OPTIONS | {"subspaces": subspaces, "mode": "da"})
    inputs = tensors(example(SCHEMA, 3, 12))

    logits = model(inputs).detach().numpy()

    np.testing.assert_allclose(logits, [paper_logit(model, x) for x in fields_of(model, inputs)], rtol=0, atol=1e-10)


def crossed(x: np.ndarray, subspaces: int) -> np.ndarray:
    """[P, W]: row s * F + j is slice s of field j."""
    width = x.shape[1] // subspaces
    return np.stack([x[j, s * width : (s + 1) * width] for s in range(subspaces) for j in range(len(x))])


def paper_logit(model: CTRModel, x: np.ndarray) -> float:
    """Section 5.1 to 5.3 of models.md for one row: the recursion, no closed form."""
    c: Any = model.config
    p = {name: value.numpy() for name, value in model.state_dict().items()}
    start = crossed(x, c.subspaces)
    orders = [start]
    for layer in range(c.layers):
        kernel, emphasis = kernel_of(c, p, x, layer)
        product = np.zeros_like(start)
        for row in range(len(start)):
            product[row] = orders[-1][row] * sum(kernel[row, other] * start[other] for other in range(len(start)))
        product = product * emphasis
        orders.append(product + orders[-1] if c.residual else product)
    read = orders[-1:] if c.residual else orders
    sums = [sum(order[s * F + j].sum() for s in range(c.subspaces)) for order in read for j in range(F)]
    return float(p["out.weight"][0] @ sums + p["out.bias"][0])


def kernel_of(c, p, x, layer):
    """The [P, P] weights of one row's layer, and what their product with X_0 is multiplied by, element by element."""
    if c.mode == "pin":
        return p["maps.kernel_LPP"][layer], 1.0
    seen = x[:R] if c.gate_scope == "request" else x
    hidden = np.maximum(p["gate.squeeze_LHX"][layer] @ seen.reshape(-1) + p["gate.squeeze_bias_LH"][layer], 0)
    assert len(hidden) == max(1, seen.size // c.reduction)
    gate = hidden @ p["gate.excite_LHO"][layer] + p["gate.excite_bias_LO"][layer]
    if c.mode == "da":
        doubled = 2 / (1 + np.exp(-gate))
        emphasis = doubled[:, None] if c.da_gate == "row" else crossed(doubled.reshape(F, D), c.subspaces)
        return p["maps.kernel_LPP"][layer], emphasis
    if c.mode == "dgp":
        sigma = gate if c.dgp_sigma == "linear" else 2 / (1 + np.exp(-gate))
        return p["maps.left_LKP"][layer].T @ np.diag(sigma) @ p["maps.right_LKP"][layer], 1.0
    rank = c.latent_rank
    vectors = (gate + (1 / np.sqrt(rank) if c.dwp_offset == "inv_sqrt" else 1 / rank)).reshape(2, rank, P)
    scale = sum(np.outer(vectors[0, k], vectors[1, k]) for k in range(rank))
    return scale * p["maps.kernel_LPP"][layer], 1.0


@pytest.mark.parametrize("layers", [1, 3])
def test_pins_layers_multiply_to_its_closed_form(layers):
    model: Any = lively("dynint", SCHEMA, **OPTIONS | {"mode": "pin", "layers": layers})
    inputs = tensors(example(SCHEMA, 3, 12))

    logits = model(inputs).detach().numpy()

    for x, logit in zip(fields_of(model, inputs), logits, strict=True):
        start = crossed(x, S)
        last = start * np.prod([1 + kernel @ start for kernel in model.maps.kernel_LPP.detach().numpy()], axis=0)
        sums = last.sum(axis=1).reshape(S, F).sum(axis=0)
        expected = model.out.weight.detach().numpy()[0] @ sums + model.out.bias.item()
        assert logit == pytest.approx(expected, rel=0, abs=1e-10)


def mean_scale(rank, offset):
    """The mean of dwp's G over the rows, layers and pairs of a model as it is initialised."""
    torch.manual_seed(0)
    options = {"mode": "dwp", "latent_rank": rank, "dwp_offset": offset}
    model: Any = zoo.build("dynint", OPTIONS | options, SCHEMA).double()
    x = torch.from_numpy(fields_of(model, tensors(example(SCHEMA, 50, 50))))
    u, v = model.maps.factors(model.gate(model.gate.read(x, slice(0, F))))
    return (u.transpose(-1, -2) @ v).mean().item()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_dwp_starts_near_the_static_weights(rank):
    assert mean_scale(rank, "inv_sqrt") == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("rank", [2, 4])
def test_the_papers_offset_starts_dwp_at_one_over_its_rank(rank):
    assert mean_scale(rank, "inv") == pytest.approx(1 / rank, abs=0.15)


def cosines(vectors):
    unit = [v / np.linalg.norm(v) for v in vectors]
    return [abs(unit[i] @ unit[j]) for i in range(len(unit)) for j in range(i)]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_dgps_penalty_is_how_parallel_the_columns_of_its_kernels_are(reduction):
    model: Any = lively("dynint", SCHEMA, **OPTIONS, mode="dgp", orth_lambda=0.1, orth_reduction=reduction)

    penalty = model.penalty().item()

    matrices = [m for kernels in (model.maps.left_LKP, model.maps.right_LKP) for m in kernels.detach().numpy()]
    total = sum(getattr(np, reduction)(cosines(m)) for m in matrices)
    assert len(matrices) == 4
    assert penalty == pytest.approx(0.1 * total, rel=1e-10)


@pytest.mark.parametrize("offset", ["inv_sqrt", "inv"])
def test_dwps_penalty_is_small_at_the_start_only_where_it_does_not_count_the_offset(offset):
    overlaps = {}
    for orth_on in ("before", "after"):
        torch.manual_seed(0)
        options = {"mode": "dwp", "latent_rank": 4, "dwp_offset": offset, "orth_on": orth_on, "orth_lambda": 1.0}
        model: Any = zoo.build("dynint", OPTIONS | options, SCHEMA).train()
        model(tensors(example(SCHEMA, 50, 50)))
        overlaps[orth_on] = model.penalty().item() / (2 * 2 * 6)  # layers, u and v, pairs

    assert overlaps["before"] < 0.45
    assert overlaps["after"] > 0.8


@pytest.mark.parametrize("orth_on", ["after", "before"])
@pytest.mark.parametrize("gate_scope", ["all", "request"])
def test_dwps_penalty_is_that_of_the_last_batch_trained_on(orth_on, gate_scope):
    options = {"mode": "dwp", "latent_rank": 3, "orth_lambda": 0.1, "orth_on": orth_on, "gate_scope": gate_scope}
    model: Any = lively("dynint", SCHEMA, **OPTIONS | options).train()
    first, second = (tensors(example(SCHEMA, 3, num)) for num in (4, 7))

    model(first)
    model(second)

    total = 0.0
    for x in fields_of(model, second):
        seen = torch.from_numpy(x[None, : model.gate.num_fields])
        gate = model.gate(model.gate.read(seen, slice(0, model.gate.num_fields)))[0].detach().numpy()
        gate = gate + (1 / np.sqrt(3) if orth_on == "after" else 0.0)
        total += sum(sum(cosines(half)) for layer in gate for half in layer.reshape(2, 3, P)) / 7
    assert model.penalty().item() == pytest.approx(0.1 * total, rel=1e-10)


def test_dwps_penalty_teaches_the_gate_and_is_no_part_of_scoring_or_of_a_copy():
    options = {"mode": "dwp", "orth_lambda": 0.1}
    model: Any = lively("dynint", SCHEMA, **OPTIONS | options)
    inputs = tensors(example(SCHEMA, 3, 4))
    model(inputs)
    assert model.penalty().item() == 0

    model.train()(inputs)
    model.penalty().backward()

    assert model.gate.squeeze_LHX.grad.abs().max() > 0
    assert copy.deepcopy(model).penalty().item() == 0


@pytest.mark.parametrize("detach", [True, False])
def test_a_gates_gradient_stops_at_its_input_unless_asked_otherwise(detach):
    options = {"mode": "dwp", "orth_lambda": 1.0, "detach_gate_input": detach}
    model: Any = lively("dynint", SCHEMA, **OPTIONS | options).train()
    model(tensors(example(SCHEMA, 3, 4)))

    model.penalty().backward()

    reached = [table.grad for table in model.fields.parameters() if table.grad is not None and table.grad.any()]
    assert bool(reached) is not detach


def test_request_scoped_gates_are_made_once_per_request():
    model: Any = lively("dynint", SCHEMA, **OPTIONS, mode="dgp", gate_scope="request")
    inputs = tensors(example(SCHEMA, 3, 12))

    state = model.encode_user(inputs)

    assert state["gate"].shape == (3, 2, 5)


def test_the_history_is_not_read():
    schema = with_history()

    names = [i.name for i in used_inputs(lively("dynint", schema, **OPTIONS), schema)]

    assert names == [i.name for i in schema.inputs if not i.name.startswith("hist")]


@pytest.mark.parametrize("mode", ["pin", "da", "dgp", "dwp"])
@pytest.mark.parametrize("fields", [ITEM_FIELDS, REQUEST_FIELDS], ids=["item", "request"])
def test_fields_of_one_side_are_enough(mode, fields):
    schema = SchemaSpec(fields=fields).fit(COLUMNS)

    model = lively("dynint", schema, **OPTIONS, mode=mode)

    logits = model(tensors(example(schema, 2, 3)))

    assert logits.shape == (3,)
    assert torch.isfinite(logits).all()
    alone = tensors(example(schema, 1, 3))
    torch.testing.assert_close(score_alone(model, alone), model(alone), rtol=0, atol=1e-10)


def test_request_scoped_gates_need_a_request_field():
    with pytest.raises(ValueError, match="gate_scope request reads user and context fields; the schema has none"):
        lively("dynint", SchemaSpec(fields=ITEM_FIELDS).fit(COLUMNS), **OPTIONS, gate_scope="request")


@pytest.mark.parametrize("kernel_size", [P, P + 1, 3 * P])
def test_the_overlap_of_more_columns_than_rows_has_a_floor_that_repeated_bases_reach(kernel_size):
    maps: Any = lively("dynint", SCHEMA, **OPTIONS | {"kernel_size": kernel_size}).maps
    floor = (kernel_size**2 / P - kernel_size) / 2  # |cos| is at least cos^2, whose sum Welch's bound holds up

    assert maps.overlap(mean=False).item() >= 2 * 2 * floor  # U and V of two layers

    columns = torch.eye(P, dtype=torch.double)[torch.arange(kernel_size) % P]
    for kernels in (maps.left_LKP, maps.right_LKP):
        kernels.data.copy_(columns)
    repeated = sum(i % P == j % P for i in range(kernel_size) for j in range(i))
    assert maps.overlap(mean=False).item() == pytest.approx(2 * 2 * repeated)
    if kernel_size % P == 0:
        assert repeated == pytest.approx(floor)


def test_subspaces_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="subspaces: 5 do not divide emb_dim 16"):
        DynIntConfig(subspaces=5)


def test_the_penalty_is_half_the_squares_of_whole_tables():
    model = lively("dynint", SCHEMA, **OPTIONS, l2_emb=0.1)

    tables = sum(v.square().sum().item() for n, v in model.state_dict().items() if n.startswith("fields."))
    assert model.penalty().item() == pytest.approx(0.1 / 2 * tables)


def test_tables_start_with_unit_vectors_and_every_layers_kernel_by_glorots_rule():
    model = zoo.build("dynint", {"mode": "pin", "layers": 2}, SCHEMA)
    assert isinstance(model, DynInt)
    state = model.state_dict()

    assert state["fields.tables.ctx_hour.weight"][1:].abs().max().item() == pytest.approx(2 / 4, rel=0.05)
    for kernel in state["maps.kernel_LPP"]:
        assert kernel.abs().max().item() == pytest.approx(np.sqrt(6 / 64), rel=0.02)
