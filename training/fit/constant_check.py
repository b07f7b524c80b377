"""Constant check: refuse a trained model that answers every row alike, and say which settings to change."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from models import zoo
from models.layers.base import CTRModel
from models.layers.embeddings import FieldEmbeddings
from training.config import Run
from training.data.batches import Rows
from training.errors import ConstantModelError
from training.evaluation import metrics

MIN_SPREAD = 1e-3  # standard deviation of the logits: below it, probabilities differ by a thousandth of themselves
MIN_AUC_NOISE = 0.01  # weights that only tremble about zero rank a little better than chance, on any number of rows
ADAM_EPS = 1e-8  # a gradient far below it moves no weight: Adam divides by its length plus this


def check(
    model: CTRModel,
    rows: Rows,
    logits: NDArray[np.float32],
    run: Run,
    *,
    aucs: Sequence[float],
    out_of_patience: bool,
) -> None:
    """Raises ConstantModelError where the kept weights tell no click from another row of the validation part.

    Either their logits hardly vary and the AUC of the evaluations (`aucs`: all of them) is mostly that of chance; or
    training ended because nothing improved any more and their AUC is within two standard errors of 0.5.
    """
    auc = metrics.auc(rows.label, logits, rows.weight)
    spread = float(logits.std(dtype=np.float64))
    clicks = int(rows.label.sum())
    noise = 2 * math.sqrt((len(rows) + 1) / (12 * clicks * (len(rows) - clicks)))
    # The median: the kept evaluation is the best of many, and so above chance by chance.
    flat = spread < MIN_SPREAD and abs(median(aucs) - 0.5) < max(noise, MIN_AUC_NOISE)
    if not flat and not (out_of_patience and abs(auc - 0.5) < noise):
        return
    gradient = _largest_gradient(model, rows)
    raise ConstantModelError(
        f"{'the model has become a constant' if flat else 'the model is no better than a constant'}: over the"
        f" {len(rows):,} validation rows its logits have a standard deviation of {spread:.1e}, AUC {auc:.4f}, where"
        f" chance is 0.5 +- {noise:.4f}; the largest gradient of its embedding tables is {gradient:.1e}"
        f"{f', below the eps of Adam, {ADAM_EPS:g}, so that they stand still' if gradient < ADAM_EPS else ''}."
        f" Nothing to export; train again with {_remedy(run)}"
    )


def _largest_gradient(model: CTRModel, rows: Rows) -> float:
    """Of the click loss, over one batch of rows, without dropout and penalty."""
    tables = [p for module in model.modules() if isinstance(module, FieldEmbeddings) for p in module.parameters()]
    batch = rows.take(np.arange(min(len(rows), 8192)))
    model.eval()
    with torch.enable_grad():
        loss = F.binary_cross_entropy_with_logits(model(batch.inputs), batch.label_B)
        gradients = torch.autograd.grad(loss, tables, allow_unused=True)
    return max((float(g.abs().max()) for g in gradients if g is not None), default=0.0)


def _remedy(run: Run) -> str:
    options = asdict(zoo.configure(run.model, run.model_config))
    penalties = [
        f"model.{name}={value / 1000:g}" for name, value in options.items() if name.startswith("l2_") and value
    ]
    starts = [f"model.{name} (now {value})" for name, value in options.items() if "init" in name]
    if run.optimizer == "ftrl":
        penalties += [f"{n}={getattr(run, n) / 1000:g}" for n in ("table_l1", "table_l2") if getattr(run, n)]
    ways = [
        f"smaller penalties (--set {' '.join(penalties)})" if penalties else "",
        f"another learning rate (--set lr={run.lr * 10:g} or lr={run.lr / 10:g}, now {run.lr:g})",
        f"another initialisation ({', '.join(starts)})" if starts else "other initial weights (--set seed=N)",
        "or more steps (a smaller batch_size, more max_epochs or patience)",
    ]
    return ", ".join(way for way in ways if way)
