"""FTRL against its formulas, weight by weight and row by row."""

import math

import numpy as np
import pytest
import torch

from models import zoo
from tests.training.tiny import write_prepared
from training.config import Run
from training.data.batches import Prepared
from training.fit import checkpoint, loop, optimizers
from training.fit.checkpoint import State
from training.fit.optimizers import FTRL

LR, BETA, N_START = 0.05, 1.0, 0.1


def start(shape=(6, 4)):
    return np.random.default_rng(1).normal(size=shape)


def gradients(steps=8, shape=(6, 4)):
    """Some rows have none at some steps, and the last row has none ever."""
    draw = np.random.default_rng(2)
    given = draw.normal(size=(steps, *shape)) * (draw.random((steps, shape[0], 1)) < 0.6)
    given[:, -1] = 0
    return given


def ftrl(weights, *, by_row, l1, l2, lr=LR, beta=BETA, n_start=N_START, init_z_from_w=True):
    parameter = torch.nn.Parameter(torch.from_numpy(weights.copy()))
    group = {"params": [parameter], "by_row": by_row, "l1": l1, "l2": l2}
    return parameter, FTRL([group], lr=lr, beta=beta, n_start=n_start, init_z_from_w=init_z_from_w)


def run(made, given):
    parameter, optimizer = made
    for gradient in given:
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
    return parameter.detach().numpy().copy()


def ftrl_by_loops(weights, given, *, l1, l2, init_z_from_w):
    w = weights.copy()
    for i in np.ndindex(w.shape):
        n, z = N_START, 0.0
        if init_z_from_w:
            z = -w[i] * (math.sqrt(n) / LR + 2 * l2) - math.copysign(l1, w[i])
        for step in given:
            g = step[i]
            tau = (math.sqrt(n + g * g) - math.sqrt(n)) / LR
            z += g - tau * w[i]
            n += g * g
            w[i] = 0.0 if abs(z) <= l1 else (math.copysign(l1, z) - z) / (math.sqrt(n) / LR + 2 * l2)
    return w


def group_ftrl_by_loops(weights, given, *, l1, l2, init_z_from_w):
    w = weights.copy()
    for row in range(len(w)):
        width = len(w[row])
        n, z = [0.0] * width, [0.0] * width
        if init_z_from_w:
            length = math.sqrt(sum(x * x for x in w[row]))
            z = [-x * (BETA / LR + l2 + l1 * math.sqrt(width) / length) for x in w[row]]
        for step in given:
            if not any(step[row]):
                continue
            for d in range(width):
                g = step[row, d]
                tau = (math.sqrt(n[d] + g * g) - math.sqrt(n[d])) / LR
                z[d] += g - tau * w[row, d]
                n[d] += g * g
            length = math.sqrt(sum(x * x for x in z))
            for d in range(width):
                if length <= l1 * math.sqrt(width):
                    w[row, d] = 0.0
                else:
                    shrunk = 1 - l1 * math.sqrt(width) / length
                    w[row, d] = -z[d] * shrunk / ((BETA + math.sqrt(n[d])) / LR + l2)
    return w


@pytest.mark.parametrize("init_z_from_w", [True, False])
@pytest.mark.parametrize(("by_row", "naive"), [(False, ftrl_by_loops), (True, group_ftrl_by_loops)])
@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (0.7, 0.3)])
def test_the_update_is_the_formula_written_as_loops(by_row, naive, l1, l2, init_z_from_w):
    options = {"l1": l1, "l2": l2, "init_z_from_w": init_z_from_w}

    moved = run(ftrl(start(), by_row=by_row, **options), gradients())

    expected = naive(start(), gradients(), **options)
    assert np.abs(expected - start()).max() > 0.01
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("by_row", [True, False])
def test_the_mean_loss_with_scaled_settings_gives_the_weights_of_the_summed_loss(by_row):
    b = 4096
    summed = run(ftrl(start(), by_row=by_row, l1=0.7, l2=0.3), gradients())
    scaled = {"l1": 0.7 / b, "l2": 0.3 / b, "beta": BETA / b, "n_start": N_START / b**2}

    mean = run(ftrl(start(), by_row=by_row, **scaled), gradients() / b)

    np.testing.assert_allclose(mean, summed, rtol=1e-9, atol=1e-12)


def test_the_published_settings_on_a_mean_loss_would_zero_every_row_they_touch():
    b = 4096

    moved = run(ftrl(start(), by_row=True, l1=10, l2=10, init_z_from_w=False), gradients() / b)

    assert not moved[:-1].any()


@pytest.mark.parametrize("by_row", [True, False])
def test_a_first_step_without_a_gradient_leaves_the_weights_as_initialised(by_row):
    weights = start()
    weights[0] = 0

    moved = run(ftrl(weights, by_row=by_row, l1=0.7, l2=0.3), np.zeros((1, 6, 4)))

    np.testing.assert_allclose(moved, weights, rtol=0, atol=1e-14)


def test_rows_outside_the_batch_are_not_touched():
    given = np.zeros((1, 6, 4))
    given[0, 2] = 1.0

    moved = run(ftrl(start(), by_row=True, l1=0.7, l2=0.3, init_z_from_w=False), given)

    assert (moved != start()).any(axis=1).tolist() == [False, False, True, False, False, False]


def test_a_row_is_zero_as_a_whole_or_not_at_all():
    moved = run(ftrl(start((200, 4)), by_row=True, l1=3.5, l2=0.3, init_z_from_w=False), gradients(20, (200, 4)))

    zeros = (moved == 0).sum(axis=1)
    assert set(zeros) == {0, 4}


def test_a_numbers_direction_is_one_row():
    moved = run(ftrl(start((4,)), by_row=True, l1=0.7, l2=0.3), gradients(shape=(2, 4))[:, 0])

    expected = run(ftrl(start((4,))[None], by_row=True, l1=0.7, l2=0.3), gradients(shape=(2, 4))[:, :1])
    np.testing.assert_allclose(moved, expected[0], rtol=0, atol=1e-14)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Prepared.open(write_prepared(tmp_path_factory.mktemp("data") / "tiny"))


def settings(**changes):
    usual = {"model": "dynint", "batch_size": 100, "lr": 0.05, "max_epochs": 3, "patience": 9, "optimizer": "ftrl"}
    options = {"model_config": {"emb_dim": 8}, "table_l1": 0.2, "table_l2": 0.1, "plateau_factor": 1.0}
    return Run(**{**usual, **options, **changes})


def test_the_loop_trains_with_ftrl_and_leaves_rows_out(data, tmp_path):
    torch.manual_seed(0)
    sparse = settings(table_l1=1.0, init_z_from_w=False)
    model = zoo.build(sparse.model, sparse.model_config, data.schema)

    state = loop.fit(model, data.rows("train"), data.rows("valid"), sparse, folder=tmp_path, report=lambda _: None)

    items = model.get_parameter("fields.tables.item_item_id.weight")[2:].detach()
    zero = ~items.any(dim=1)
    assert state.log[-1]["loss"] < state.log[0]["loss"] < math.log(2) + 0.1
    assert 0 < zero.sum() < len(items)


@pytest.mark.parametrize("init_z_from_w", [True, False])
@pytest.mark.parametrize("by_row", [True, False])
def test_at_another_rate_the_weights_stay_and_go_on_by_it(by_row, init_z_from_w):
    parameter, optimizer = ftrl(start(), by_row=by_row, l1=3.0, l2=0.3, init_z_from_w=init_z_from_w)
    [group] = optimizer.param_groups
    before = run((parameter, optimizer), gradients())
    assert (before == 0).any() or (by_row and init_z_from_w)
    assert (before != 0).any()

    optimizers.slow_down(optimizer, 0.1, least=LR / 20)
    state = optimizer.state[parameter]
    again = optimizers._weights_of(state["z"], state["n"], group)

    assert group["lr"] == pytest.approx(LR / 10)
    moved = (state["z"] != 0).numpy()
    np.testing.assert_allclose(again.numpy()[moved], before[moved], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(parameter.detach().numpy(), before)
    optimizers.slow_down(optimizer, 0.1, least=LR / 20)
    assert group["lr"] == pytest.approx(LR / 20)


def test_a_checkpoint_takes_ftrl_up_where_it_was(data, tmp_path):
    batches = [data.rows("train").take(np.arange(n * 100, n * 100 + 100)) for n in range(6)]

    def fresh():
        torch.manual_seed(0)
        model = zoo.build("dynint", {"emb_dim": 8}, data.schema)
        return model, optimizers.build(model, settings())

    model, optimizer = fresh()
    for batch in batches[:3]:
        loop._step(model, optimizer, batch, settings(), State())
    checkpoint.save(tmp_path / "checkpoint.pt", model, optimizer, State())
    again, taken_up = fresh()
    checkpoint.load(tmp_path / "checkpoint.pt", again, taken_up)
    for batch in batches[3:]:
        loop._step(model, optimizer, batch, settings(), State())
        loop._step(again, taken_up, batch, settings(), State())

    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_tables_go_by_row_and_everything_is_in_one_group(data):
    model = zoo.build("dynint", {"emb_dim": 8}, data.schema)

    tables, rest = optimizers.build(model, settings()).param_groups

    assert len(tables["params"]) == 5
    assert len(tables["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert (tables["by_row"], rest["by_row"]) == (True, False)
    assert (tables["l1"], rest["l1"]) == (0.002, 0.001)
