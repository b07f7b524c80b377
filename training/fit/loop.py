"""The training loop, whole and visible: batches in, the best weights out."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from models.layers.base import CTRModel
from training.config import Run
from training.data.batches import Batch, Rows, in_order, num_batches, shuffled
from training.errors import UserError
from training.evaluation import metrics
from training.fit import checkpoint, optimizers
from training.fit.checkpoint import State
from training.progress import bar

EVAL_BATCH = 8192
MIN_GAIN = 1e-6  # a smaller gain on the validation part counts as none (FuxiCTR's rule)


def fit(model: CTRModel, train: Rows, valid: Rows, run: Run, *, folder: Path, report: Callable[[str], None]) -> State:
    """Train until the validation part stops improving; leaves the best evaluation's weights, or averages, in `model`.

    An evaluation follows each epoch, or every `run.eval_every_steps` steps and the last one. Goes on from `folder`'s
    checkpoint where there is one: killed at any moment and started again, the run ends with the same weights, bit by
    bit, on the same number of threads. Each evaluation adds a line to `folder`/log.jsonl.
    Raises UserError when the loss is no longer a number.
    """
    if not 0 < valid.label.mean() < 1:
        raise UserError(f"the valid part's {len(valid)} rows need both clicks and non-clicks, to tell when to stop")
    steps_of_epoch = num_batches(len(train), run.batch_size)
    optimizer = optimizers.build(model, run, batch_size=len(train) / steps_of_epoch)
    averaged = optimizers.averaged(model, run)
    judged = model if averaged is None else cast("CTRModel", averaged.module)
    state, saved = State(), folder / "checkpoint.pt"
    if saved.exists():
        state = checkpoint.load(saved, model, optimizer, averaged=averaged)
        report(f"resuming in epoch {state.step // steps_of_epoch + 1} after {state.step} steps")

    last, interval = run.max_epochs * steps_of_epoch, run.eval_every_steps or steps_of_epoch
    while state.evaluated_step < last and state.bad_evals < run.patience:
        began = time.monotonic()
        until = min(state.evaluated_step + interval, last)
        _train(model, averaged, optimizer, train, run, state=state, saved=saved, until=until)
        trained = time.monotonic()
        logits = predict(judged, valid, "valid")
        figures = {
            "auc": metrics.auc(valid.label, logits, valid.weight),
            "logloss": metrics.logloss(valid.label, expit(logits.astype(np.float64)), valid.weight),
        }
        line = {
            "epoch": _epochs(state.step, steps_of_epoch),
            "step": state.step,
            "loss": state.loss_sum / (state.step - state.evaluated_step),
            **{f"valid_{name}": value for name, value in figures.items()},
            "valid_spread": float(logits.std(dtype=np.float64)),
            "lr": optimizer.param_groups[0]["lr"],
            **{f"model.{name}": value for name, value in judged.logged_scalars().items()},
            "train_s": round(state.train_s - sum(e["train_s"] for e in state.log), 3),
            "valid_s": round(time.monotonic() - trained, 3),
            "best": _better(figures, run.monitor, state.best),
        }
        _record_evaluation(judged, optimizer, run, state, figures=figures, line=line)
        # The log first: killed in between, the evaluation is done again and writes the same line.
        checkpoint.write_atomically(folder / "log.jsonl", "".join(json.dumps(e) + "\n" for e in state.log).encode())
        checkpoint.save(saved, model, optimizer, state, averaged=averaged)
        report(_sentence(line, run, took_s=time.monotonic() - began))

    model.load_state_dict(state.best_weights)
    return state


def predict(model: CTRModel, rows: Rows, part: str) -> NDArray[np.float32]:
    """The logit of every row of a part, in order. Raises UserError where one is not a number."""
    logits = np.empty(len(rows), dtype=np.float32)
    model.eval()
    with torch.inference_mode(), bar(f"scoring {part}", len(rows)) as advance:
        done = 0
        for batch in in_order(rows, EVAL_BATCH):
            logits[done : done + len(batch.label_B)] = model(batch.inputs).numpy()
            done += len(batch.label_B)
            advance(len(batch.label_B))
    if not np.isfinite(logits).all():
        raise UserError(f"the model's score of row {int(np.argmin(np.isfinite(logits)))} is not a number")
    return logits


def _train(
    model: CTRModel,
    averaged: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    train: Rows,
    run: Run,
    *,
    state: State,
    saved: Path,
    until: int,
) -> None:
    """The steps up to the next evaluation, a checkpoint every `run.checkpoint_s`."""
    model.train()
    steps_of_epoch = num_batches(len(train), run.batch_size)
    first, rows_of_step = state.evaluated_step, len(train) / steps_of_epoch
    where = f"epoch {_epochs(until, steps_of_epoch)}/{run.max_epochs}"
    loss_sum = torch.tensor(state.loss_sum, dtype=torch.float64)
    started = checkpointed = time.monotonic()
    already_s = state.train_s
    num, done = (round((step - first) * rows_of_step) for step in (until, state.step))
    with bar(where, num, done=done) as advance:
        for batch in _batches(train, run, state.step, until):
            loss_sum.add_(_step(model, optimizer, batch, run, state))
            if averaged is not None:
                averaged.update_parameters(model)
            state.step += 1
            now = time.monotonic()
            state.train_s = already_s + now - started
            if now - checkpointed >= run.checkpoint_s:
                state.loss_sum = loss_sum.item()
                checkpoint.save(saved, model, optimizer, state, averaged=averaged)
                checkpointed = time.monotonic()
            advance(len(batch.label_B), lambda: f"loss {loss_sum.item() / (state.step - first):.4f}")
    state.loss_sum = loss_sum.item()


def _batches(train: Rows, run: Run, step: int, until: int) -> Iterator[Batch]:
    """The batches of the steps after `step`, as far as `until`, through as many epochs as these are of."""
    steps_of_epoch = num_batches(len(train), run.batch_size)
    while step < until:
        epoch, skip = divmod(step, steps_of_epoch)
        batches = shuffled(train, run.batch_size, seed=run.seed, epoch=epoch, skip=skip)
        for batch in islice(batches, until - step):
            yield batch
            step += 1


def _step(model: CTRModel, optimizer: torch.optim.Optimizer, batch: Batch, run: Run, state: State) -> torch.Tensor:
    """One optimiser step. Returns the batch's log loss before the update, without penalty and auxiliary losses."""
    optimizer.zero_grad(set_to_none=True)
    state_of_users = model.encode_user(batch.inputs)
    logit_B = model.score(state_of_users, model.encode_items(batch.inputs), batch.inputs["user_index"])
    # Weights average 1 over the part, not over each batch: so the sum over an epoch is that of the repeated rows.
    click_loss = F.binary_cross_entropy_with_logits(logit_B, batch.label_B, weight=batch.weight_B)
    loss = click_loss + model.auxiliary_loss(state_of_users, batch.inputs) + model.penalty()
    loss.backward()  # type: ignore[no-untyped-call]  # torch's stubs
    norm = nn.utils.clip_grad_norm_(model.parameters(), run.clip_norm)
    # The one value read per step, and before it: a weight that is not a number never comes back.
    if not torch.isfinite(loss.detach() + norm):
        raise UserError(
            f"the loss is {loss.item():g} (gradient norm {norm.item():g}) in step {state.step + 1};"
            f" try a smaller learning rate, such as --set lr={run.lr / 10:g}"
        )
    optimizer.step()
    return click_loss.detach()


def _record_evaluation(
    model: CTRModel,
    optimizer: torch.optim.Optimizer,
    run: Run,
    state: State,
    *,
    figures: Mapping[str, float],
    line: dict[str, Any],
) -> None:
    """Keep the weights when they are the best so far, else count towards a smaller step and the end."""
    state.loss_sum = 0.0
    state.log.append(line)
    if line["best"]:
        state.best, state.bad_evals = figures[run.monitor], 0
        state.best_weights = {name: value.clone() for name, value in model.state_dict().items()}
    else:
        state.bad_evals += 1
    watched = run.plateau_monitor or run.monitor
    if _better(figures, watched, state.plateau_best):
        state.plateau_best, state.plateau_bad_evals = figures[watched], 0
        return
    state.plateau_bad_evals += 1
    if state.plateau_bad_evals > run.plateau_patience:
        state.plateau_bad_evals = 0
        optimizers.slow_down(optimizer, run.plateau_factor, least=run.min_lr)


def _better(figures: Mapping[str, float], monitor: str, best: float | None) -> bool:
    sign = 1 if monitor == "auc" else -1
    return best is None or sign * (figures[monitor] - best) > MIN_GAIN


def _epochs(step: int, steps_of_epoch: int) -> int | float:
    """How many epochs so many steps are: a whole number at the end of one."""
    return round(step / steps_of_epoch, 3) if step % steps_of_epoch else step // steps_of_epoch


def _sentence(line: dict[str, Any], run: Run, *, took_s: float) -> str:
    return (
        f"epoch {line['epoch']:>2}/{run.max_epochs}  step {line['step']}  loss {line['loss']:.4f}"
        f"  valid AUC {line['valid_auc']:.4f}  logloss {line['valid_logloss']:.4f}  spread {line['valid_spread']:.2g}"
        f"  lr {line['lr']:g}  {took_s:.1f} s{'  best' if line['best'] else ''}"
    )
