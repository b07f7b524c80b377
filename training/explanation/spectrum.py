"""The singular values of a DynInt's trained weights W_l, one curve a layer: figure 4 of its paper."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from models.papers.dynint import DynInt
from training.errors import UserError
from training.fit.run_folder import Trained

SHARE = 0.9  # of a layer's squared singular values


def spectrum(trained: Trained, out: Path) -> list[Path]:
    """Writes spectrum.json and spectrum.png; returns them.

    The weights are those that all rows share: DA's and DWP's before a row scales them, DGP's at strengths of one.
    Raises UserError for a model without them.
    """
    model = trained.model
    if not isinstance(model, DynInt) or model.maps is None:
        raise UserError(f"{trained.path}: expected a run of dynint with layers, got {trained.run.model} without")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: expected a folder, or a new one, found a file")
    values_LP = np.linalg.svd(model.maps.shared_weights().detach().double().numpy(), compute_uv=False)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "spectrum.json", out / "spectrum.png"]
    layers: list[dict[str, Any]] = [
        {"layer": number, "singular_values": values.tolist(), "rank_of_90_percent": rank_of(values, SHARE)}
        for number, values in enumerate(values_LP, start=1)
    ]
    document = {"model": trained.run.model, "mode": model.config.mode, "run": str(trained.path), "layers": layers}
    files[0].write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    _draw(values_LP, f"dynint {model.config.mode}: singular values of W_l, {trained.path.name}", files[1])
    return files


def rank_of(values_P: NDArray[np.float64], share: float) -> int:
    """How many of the largest singular values hold `share` of the sum of their squares; 0 where all are zero."""
    squares = np.cumsum(values_P**2)
    return int(np.searchsorted(squares, share * squares[-1] * (1 - 1e-12)) + 1) if squares[-1] > 0 else 0


def _draw(values_LP: NDArray[np.float64], title: str, file: Path) -> None:
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for number, values in enumerate(values_LP, start=1):
        scaled = values / (values[0] or 1.0)
        label = f"layer {number}: {rank_of(values, SHARE)} of {len(values)} hold {SHARE:.0%} of the squares"
        axes.plot(range(1, len(values) + 1), scaled, "o-", ms=2.5, lw=1, label=label)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("singular value, largest first", fontsize=9)
    axes.set_ylabel("share of the layer's largest", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)
