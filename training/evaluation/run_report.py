"""What a run came to: the figures of metrics.json, a table for the terminal, two plots."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from models.artifact.calibration import Calibration
from training.data.batches import Rows
from training.errors import UserError
from training.evaluation import metrics
from training.evaluation.thinning import unthinned

RAW, CALIBRATED, MUTED = "#b35900", "#1f5fbf", "#8b949e"


def measure(rows: Rows, logits: NDArray[np.float32], calibration: Calibration) -> dict[str, Any]:
    """The figures of one part: those of the raw model, and under `calibrated` those of what the service answers.

    Rows that stand for several count as so many: the figures are those of the whole traffic. Calibrating changes no
    ranking, so AUC and gAUC stand once. A figure that the part does not define is None.
    """
    known = rows.group >= 0  # rows without a user are not one user
    weight = rows.represented
    by_user = metrics.gauc(
        rows.label[known], logits[known], rows.group[known], None if weight is None else weight[known]
    )
    by_request = metrics.gauc(rows.label, logits, rows.request, weight)
    raw = unthinned(rows.negative_rate)
    figures = {
        "rows": len(rows),
        "click_rate": float(np.average(rows.label.astype(np.float64), weights=weight)),
        "auc": metrics.auc(rows.label, logits, weight),
        "gauc": by_user.value,
        "gauc_users": by_user.num_groups,
        "gauc_users_left_out": by_user.num_left_out,
        "gauc_by_request": by_request.value,
        "gauc_requests": by_request.num_groups,
        **_of_probabilities(rows.label, raw(logits), weight),
    }
    calibrated = _of_probabilities(rows.label, calibration(logits), weight)
    return {**_without_nan(figures), "calibrated": _without_nan(calibrated)}


def table(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of each part side by side, for the terminal."""
    lines = [
        ("rows", "rows", ",d"),
        ("click rate", "click_rate", ".4f"),
        ("AUC", "auc", ".4f"),
        ("  best possible", "bayes_auc", ".4f"),
        ("  position unknown", "bayes_auc_blind", ".4f"),
        ("gAUC by user", "gauc", ".4f"),
        ("gAUC by request", "gauc_by_request", ".4f"),
        ("logloss", "logloss", ".4f"),
        ("  calibrated", "calibrated.logloss", ".4f"),
        ("normalised entropy", "ne", ".4f"),
        ("  calibrated", "calibrated.ne", ".4f"),
        ("calibration error", "calibration_error", ".4f"),
        ("  calibrated", "calibrated.calibration_error", ".4f"),
        ("predicted / clicked", "calibration_ratio", ".3f"),
        ("  calibrated", "calibrated.calibration_ratio", ".3f"),
    ]
    text = " " * 20 + "".join(f"{part:>10}" for part in parts)
    for name, key, form in lines:
        values = [_value(figures, key) for figures in parts.values()]
        if any(value is not None for value in values):
            text += f"\n{name:<20}" + "".join(f"{'-' if v is None else format(v, form):>10}" for v in values)
    return text


def plot_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """Log loss and AUC of each run's log against its steps, the kept weights marked; the training loss is dotted."""
    figure = Figure(figsize=(8, 3.2 + 0.16 * max(0, len(logs) - 1)), dpi=120, layout="constrained")
    losses, aucs = figure.subplots(1, 2)
    for number, (name, log) in enumerate(logs.items()):
        color = colormaps["tab10"](number % 10)
        steps = [line["step"] for line in log]
        best = max(n for n, line in enumerate(log) if line["best"])
        losses.plot(steps, [line["loss"] for line in log], ":", color=color, lw=1)
        for axes, figure_name in ((losses, "valid_logloss"), (aucs, "valid_auc")):
            values = [line[figure_name] for line in log]
            axes.plot(steps, values, "-", color=color, lw=1.2, marker=".", ms=3)
            axes.plot(steps[best], values[best], "o", color=color, ms=6, mfc="none")
        aucs.plot([], [], "-", color=color, label=f"{name}: {log[best]['valid_auc']:.4f} at step {steps[best]:,}")
    losses.set_title("Log loss: validation, and training (dotted)", fontsize=10)
    aucs.set_title("Validation AUC (circle: the weights kept)", fontsize=10)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    for axes in (losses, aucs):
        axes.set_xlabel("step", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.margins(y=0.2)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(file)
    except ValueError as err:  # an ending that is no format of a picture
        raise UserError(f"{file}: {err}") from err


def plot_reliability(rows: Rows, logits: NDArray[np.float32], calibration: Calibration, part: str, file: Path) -> None:
    """What was predicted against what came, raw and calibrated, and how many rows each prediction got."""
    figure = Figure(figsize=(5, 5.6), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    weight, raw = rows.represented, unthinned(rows.negative_rate)
    for name, color, prob in (("raw", RAW, raw(logits)), ("calibrated", CALIBRATED, calibration(logits))):
        bins = metrics.reliability(rows.label, prob, weight=weight)
        upper.plot(
            bins.predicted, bins.observed, "o-", color=color, ms=4, lw=1, label=f"{name}: error {bins.error:.4f}"
        )
        lower.hist(prob, bins=40, weights=weight, histtype="step", color=color)
    low, high = 0.0, max(*upper.get_xlim(), *upper.get_ylim())
    upper.plot([low, high], [low, high], color=MUTED, lw=0.8, ls=":", zorder=0)
    upper.set_ylabel("share clicked", fontsize=9)
    upper.set_title(f"Reliability on {part}, {len(rows):,} rows in {metrics.NUM_BINS} bins", fontsize=10)
    upper.legend(frameon=False, fontsize=8, loc="upper left")
    lower.set_ylabel("rows", fontsize=9)
    lower.set_xlabel("predicted click probability", fontsize=9)
    for axes in (upper, lower):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def _of_probabilities(
    label: NDArray[np.float32], prob: NDArray[np.float64], weight: NDArray[np.float64] | None
) -> dict[str, Any]:
    return {
        "logloss": metrics.logloss(label, prob, weight),
        "ne": metrics.normalised_entropy(label, prob, weight),
        "calibration_error": metrics.reliability(label, prob, weight=weight).error,
        "calibration_ratio": metrics.calibration_ratio(label, prob, weight),
    }


def _without_nan(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in figures.items()}


def _value(figures: Mapping[str, Any], key: str) -> Any:
    outer, _, inner = key.partition(".")
    value = figures.get(outer)
    return value.get(inner) if inner and value is not None else value
