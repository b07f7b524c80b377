import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from models import zoo
from tests.training.tiny import write_prepared
from training.config import Run
from training.data.batches import Prepared, shuffled
from training.errors import UserError
from training.evaluation import metrics
from training.fit import loop, optimizers
from training.fit.checkpoint import State


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Prepared.open(write_prepared(tmp_path_factory.mktemp("data") / "tiny"))


def run(**changes):
    options = {"model_config": {"emb_dim": 8}, "batch_size": 100, "lr": 0.01, "max_epochs": 6, "patience": 2}
    return Run(**{"model": "stec", **options, **changes})


def quick(**changes):
    """A run of a model that is trained in a moment, for laws of the loop alone."""
    return run(model="fm", **changes)


def fit(data, settings, folder):
    torch.manual_seed(settings.seed)
    model = zoo.build(settings.model, settings.model_config, data.schema)
    folder.mkdir()
    state = loop.fit(model, data.rows("train"), data.rows("valid"), settings, folder=folder, report=lambda _: None)
    return model, state


def weights(model):
    return torch.cat([w.flatten().double() for w in model.state_dict().values() if w.is_floating_point()])


def test_training_learns_what_decides_a_click(tmp_path):
    data = Prepared.open(write_prepared(tmp_path / "enough", num_rows=8000))
    model, _ = fit(data, run(max_epochs=3), tmp_path / "run")

    test = data.rows("test")
    auc = metrics.auc(test.label, loop.predict(model, test, "test"))

    truth = data.truth("test")
    assert truth is not None
    best = metrics.auc(test.label, truth)
    assert 0.7 < auc < best


def test_the_same_seed_gives_the_same_weights_bit_by_bit(data, tmp_path):
    settings = run(max_epochs=2, model_config={"emb_dim": 8, "dropout": 0.3})

    first, _ = fit(data, settings, tmp_path / "first")
    second, _ = fit(data, settings, tmp_path / "second")

    assert torch.equal(weights(first), weights(second))


def test_with_a_decay_the_moving_average_of_the_weights_is_validated_and_kept(data, tmp_path):
    decayed = run(max_epochs=1, ema_decay=0.8, batch_size=50)

    kept, state = fit(data, decayed, tmp_path / "run")

    torch.manual_seed(decayed.seed)
    model = zoo.build(decayed.model, decayed.model_config, data.schema)
    optimizer, average = optimizers.build(model, decayed), None
    for n, batch in enumerate(shuffled(data.rows("train"), decayed.batch_size, seed=decayed.seed, epoch=0)):
        loop._step(model, optimizer, batch, decayed, State())
        decay = min(0.8, (1 + n) / (10 + n))
        average = weights(model) if average is None else decay * average + (1 - decay) * weights(model)
    torch.testing.assert_close(weights(kept), average, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(weights(kept), weights(model), rtol=1e-2)
    valid = data.rows("valid")
    validated = metrics.auc(valid.label, loop.predict(kept, valid, "valid"))
    assert state.log[0]["valid_auc"] == pytest.approx(validated, abs=1e-6)


@pytest.mark.parametrize("monitor", ["auc", "logloss"])
def test_the_best_epochs_weights_are_kept_and_training_stops_without_patience(data, tmp_path, monitor):
    model, state = fit(data, quick(max_epochs=30, lr=0.05, monitor=monitor), tmp_path / "run")

    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    figures = [line[f"valid_{monitor}"] for line in log]
    best = max(figures) if monitor == "auc" else min(figures)
    assert len(log) == state.best_evaluation["epoch"] + 2 < 30
    assert figures[state.best_evaluation["epoch"] - 1] == pytest.approx(best, abs=1e-6)
    valid = data.rows("valid")
    again = loop.predict(model, valid, "valid")
    figure = (
        metrics.auc(valid.label, again) if monitor == "auc" else metrics.logloss(valid.label, 1 / (1 + np.exp(-again)))
    )
    assert figure == pytest.approx(figures[state.best_evaluation["epoch"] - 1], abs=1e-6)


def test_the_learning_rate_falls_after_each_bad_epoch_down_to_its_floor(data, tmp_path):
    settings = quick(max_epochs=16, patience=16, lr=0.1, min_lr=0.002, plateau_factor=0.1)

    _, state = fit(data, settings, tmp_path / "run")

    best, expected = None, 0.1
    for line in state.log:
        assert line["lr"] == pytest.approx(expected)
        if best is None or line["valid_auc"] > best + loop.MIN_GAIN:
            best = line["valid_auc"]
        else:
            expected = max(expected * 0.1, 0.002)
    assert expected == 0.002


def test_evaluations_by_steps_come_every_so_many_steps_and_after_the_last(data, tmp_path):
    _, state = fit(data, quick(max_epochs=2, patience=99, eval_every_steps=5), tmp_path / "run")

    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [5, 10, 15, 20, 24]  # 12 steps an epoch
    assert [line["epoch"] for line in log] == [0.417, 0.833, 1.25, 1.667, 2]
    assert state.step == 24
    best, best_step = -1.0, 0
    for line in log:
        assert line["best"] == (line["valid_auc"] > best + loop.MIN_GAIN)
        if line["best"]:
            best, best_step = line["valid_auc"], line["step"]
    assert state.best_evaluation["step"] == best_step


def test_when_the_validation_part_is_looked_at_changes_no_step(data, tmp_path):
    options = {"model_config": {"emb_dim": 8, "dropout": 0.3}, "plateau_factor": 1.0, "patience": 99, "max_epochs": 2}

    by_epoch, state = fit(data, run(**options), tmp_path / "epochs")
    by_steps, states = fit(data, run(**options, eval_every_steps=8), tmp_path / "steps")

    last = [{k: log[-1][k] for k in ("step", "valid_auc", "valid_logloss")} for log in (state.log, states.log)]
    assert last[0] == last[1]
    losses = [sum(line["loss"] * steps for line, steps in _with_steps(log)) for log in (state.log, states.log)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    if state.best_evaluation["step"] == states.best_evaluation["step"]:
        assert torch.equal(weights(by_epoch), weights(by_steps))


def _with_steps(log):
    return [(line, line["step"] - before) for line, before in zip(log, [0, *(e["step"] for e in log)], strict=False)]


def test_patience_counts_evaluations(data, tmp_path):
    _, state = fit(data, quick(max_epochs=30, lr=0.05, patience=2, eval_every_steps=5), tmp_path / "run")

    assert state.step == state.best_evaluation["step"] + 10 < 30 * 12


@pytest.mark.parametrize("patience", [0, 1])
def test_the_learning_rate_can_fall_on_a_plateau_of_the_log_loss_while_the_auc_decides_the_end(
    data, tmp_path, patience
):
    settings = quick(
        max_epochs=10, patience=10, lr=0.1, plateau_monitor="logloss", plateau_patience=patience, plateau_factor=0.5
    )

    _, state = fit(data, settings, tmp_path / "run")

    best, bad, expected = np.inf, 0, 0.1
    for line in state.log:
        assert line["lr"] == pytest.approx(expected)
        improved = line["valid_logloss"] < best - loop.MIN_GAIN
        best, bad = (line["valid_logloss"], 0) if improved else (best, bad + 1)
        if bad > patience:
            expected, bad = expected / 2, 0
    assert expected < 0.1
    aucs = [line["valid_auc"] for line in state.log]
    assert state.best == pytest.approx(max(aucs), abs=1e-6)


def test_a_learning_rate_below_the_floor_is_left_as_it_is(data, tmp_path):
    _, state = fit(data, quick(max_epochs=6, patience=6, lr=1e-9, min_lr=1e-6), tmp_path / "run")

    assert {line["lr"] for line in state.log} == {1e-9}
    assert state.bad_evals


def test_a_loss_that_is_no_number_stops_the_run_before_it_reaches_the_weights(data, tmp_path):
    model = zoo.build("lr", {}, data.schema)
    rows = data.rows("train")
    rows.inputs["item.price"] = rows.inputs["item.price"].copy()
    rows.inputs["item.price"][7] = np.nan

    with pytest.raises(UserError, match="the loss is nan .* in step 1; try a smaller learning rate"):
        loop.fit(model, rows, data.rows("valid"), run(model="lr", batch_size=2000), folder=tmp_path, report=print)

    assert torch.isfinite(weights(model)).all()


def test_long_gradients_are_cut_to_the_clip_norm(data):
    model = zoo.build("lr", {}, data.schema)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    before = weights(model)

    loop._step(model, sgd, data.rows("train").take(np.arange(50)), run(model="lr", clip_norm=1e-3), State())

    assert torch.linalg.vector_norm(weights(model) - before) == pytest.approx(1e-3, rel=1e-3)


def test_the_penalty_is_part_of_the_loss(data, tmp_path):
    free, _ = fit(data, run(model="lr", model_config={}, max_epochs=3), tmp_path / "free")
    held, _ = fit(data, run(model="lr", model_config={"l2_emb": 10.0}, max_epochs=3), tmp_path / "held")

    assert held.fields.penalty(1.0) < free.fields.penalty(1.0) / 10


def test_what_a_model_learns_beside_the_labels_moves_it_and_is_no_part_of_the_logged_loss(data, tmp_path):
    def fitted(weight):
        options = {"model_config": {"emb_dim": 8, "aux_weight": weight}, "max_epochs": 1, "lr": 1e-9}
        model, state = fit(data, run(model="dien", **options), tmp_path / f"{weight}")
        return weights(model), state.log[0]["loss"]

    (plain, plain_loss), (taught, taught_loss) = fitted(0.0), fitted(5.0)

    assert not torch.equal(plain, taught)
    assert taught_loss == pytest.approx(plain_loss, abs=1e-4)
    assert taught_loss < 1


def test_a_models_own_scalars_are_logged_by_epoch(data, tmp_path):
    options = {"emb_dim": 8, "beta_learned": True}

    model, _ = fit(data, run(model="deepmr", model_config=options, max_epochs=2), tmp_path / "run")

    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    betas = [line["model.beta"] for line in log]
    assert 0.5 != betas[0] != betas[1] != 0.5
    assert [line["model.beta"] for line in log if line["best"]][-1] == model.beta.item()


def test_ftrl_takes_the_size_that_batches_really_have(data, tmp_path):
    """One batch of all rows is one batch, whatever larger number was asked for."""
    num = len(data.rows("train"))

    def fitted(batch_size):
        settings = run(optimizer="ftrl", plateau_factor=1.0, max_epochs=2, table_l1=0.1, batch_size=batch_size)
        return weights(fit(data, settings, tmp_path / f"{batch_size}")[0])

    assert torch.equal(fitted(num), fitted(10 * num))


def test_a_validation_part_without_clicks_is_refused_at_once(data, tmp_path):
    valid = data.rows("valid")
    without = np.flatnonzero(valid.label == 0)
    inputs = {name: array[without] for name, array in valid.inputs.items()}
    nothing = type(valid)(**{**vars(valid), "inputs": inputs, "label": valid.label[without]})

    with pytest.raises(UserError, match="need both clicks and non-clicks"):
        loop.fit(zoo.build("lr", {}, data.schema), data.rows("train"), nothing, run(), folder=tmp_path, report=print)


def test_a_row_of_weight_n_trains_as_n_rows(data):
    rows = data.rows("train")
    times = 1 + np.arange(len(rows)) % 3
    heavy = replace(rows, weight=times.astype(np.float32), mean_weight=float(times.mean()))
    weighted = heavy.take(np.arange(len(rows)))
    repeated = rows.take(np.repeat(np.arange(len(rows)), times))

    settings = run(model="lr", model_config={}, clip_norm=1e6)
    losses, gradients = [], []
    for batch in (weighted, repeated):
        torch.manual_seed(1)
        model = zoo.build("lr", {}, data.schema)
        optimizer = optimizers.build(model, settings, batch_size=len(rows))
        losses.append(loop._step(model, optimizer, batch, settings, State()).item())
        gradients.append(torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]))

    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
