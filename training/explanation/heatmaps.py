"""An explanation as a picture: bars along one axis, a heat map over two, a grid of heat maps over more."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

MAX_LABELS = 40  # along one axis; of more, those with the largest values are drawn
MAX_PANELS = 12
WIDTH = 14  # inches
COLOR = "#1f5fbf"


def draw(explanation: Mapping[str, Any], title: str, file: Path) -> None:
    """Draws `told` (`artifact.explanation.worded`), which has at least one axis, under a title and its meaning."""
    with rc_context({"text.parse_math": False}):  # an item may be called $a_b$
        _draw(explanation, title, file)


def _draw(explanation: Mapping[str, Any], title: str, file: Path) -> None:
    values = np.asarray(explanation["values"], dtype=np.float64)
    names = [axis["name"] for axis in explanation["axes"]]
    labels = [axis["labels"] for axis in explanation["axes"]]
    if values.size == 0:
        values, labels = np.zeros([max(n, 1) for n in values.shape]), [texts or ["none"] for texts in labels]
    notes = []
    for axis, texts in enumerate(labels):
        if axis >= len(labels) - 2 and len(texts) > MAX_LABELS:
            others = tuple(n for n in range(values.ndim) if n != axis)
            largest = np.sort(np.argsort(-np.abs(values).mean(axis=others))[:MAX_LABELS])
            notes.append(f"the {MAX_LABELS} largest of {len(texts)} along {names[axis]}")
            values, labels[axis] = values.take(largest, axis=axis), [texts[n] for n in largest]
    panels = list(product(*(range(len(texts)) for texts in labels[:-2])))
    if len(panels) > MAX_PANELS:
        notes.append(f"the first {MAX_PANELS} of {len(panels)} maps")
        panels = panels[:MAX_PANELS]

    text = textwrap.wrap(explanation["meaning"] + (f" ({'; '.join(notes)})" if notes else ""), 100)
    if len(labels) == 1:
        figure = _bars(values, names[0], labels[0], len(text))
    else:
        figure = _maps(values, names, labels, panels, len(text))
    figure.suptitle("\n".join([title, *text]), fontsize=9)
    figure.savefig(file)


def _maps(
    values: NDArray[np.float64],
    names: Sequence[str],
    labels: Sequence[Sequence[str]],
    panels: Sequence[tuple[int, ...]],
    num_lines: int,
) -> Figure:
    long, high = (len(labels[axis]) for axis in (-1, -2))
    width, height = (min(max(0.28 * cells, 1.6), 12) for cells in (long, high))
    margin_x, margin_y = (0.085 * max(map(len, labels[axis])) + 0.5 for axis in (-2, -1))
    columns = min(max(int(WIDTH / (width + margin_x)), 1), len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(
        figsize=(
            max(columns * (width + margin_x) + 1.2, 7),
            rows * (height + margin_y + 0.3) + 0.7 + 0.2 * num_lines,
        ),
        dpi=110,
        layout="constrained",
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    low, top, colors = _scale(values)
    for axes, panel in zip(grid.flat, panels, strict=False):
        image = axes.imshow(values[panel], vmin=low, vmax=top, cmap=colors, aspect="auto", interpolation="nearest")
        title = ", ".join(f"{names[n]} {labels[n][place]}" for n, place in enumerate(panel) if names[n] != "request")
        axes.set_title(title, fontsize=8)
        _ticks(axes, labels[-2], labels[-1])
        axes.set_ylabel(names[-2].replace("_", " "), fontsize=8)
        axes.set_xlabel(names[-1].replace("_", " "), fontsize=8)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=grid, shrink=0.8, pad=0.02).ax.tick_params(labelsize=7)
    return figure


def _bars(values: NDArray[np.float64], name: str, labels: Sequence[str], num_lines: int) -> Figure:
    figure = Figure(figsize=(8, 0.25 * len(labels) + 1.1 + 0.2 * num_lines), dpi=110, layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(range(len(labels)), values, color=COLOR)
    axes.bar_label(drawn, fmt="%.3g", fontsize=7, padding=2)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_ylabel(name.replace("_", " "), fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _ticks(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    upright = max(map(len, columns)) > 2
    axes.set_xticks(range(len(columns)), columns, fontsize=7, rotation=90 if upright else 0)


def _scale(values: NDArray[np.float64]) -> tuple[float, float, str]:
    """From 0 up where nothing is below it, else the same distance both ways, so that white is 0."""
    largest = float(np.abs(values).max()) or 1.0
    return (-largest, largest, "RdBu_r") if values.min() < 0 else (0.0, largest, "viridis")
