"""A comparison as people read it: Markdown, CSV and a plot."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

from matplotlib.figure import Figure

from training.comparison import published
from training.comparison.leaderboard import Standing
from training.comparison.published import Figures as Published
from training.data.batches import PARTS, Prepared
from training.evaluation import significance
from training.evaluation.run_report import CALIBRATED, MUTED
from training.evaluation.significance import Difference

FIGURES = {"auc": "test AUC", "gauc": "gAUC by user", "logloss": "log loss", "calibrated.logloss": "calibrated"}
OF_A_RUN = ("parameters", "epochs", "best_epoch", "train_seconds", "samples_per_s", "threads")
FAR_OUT = 3  # quartile ranges below the lower quartile: Tukey's outer fence
MIN_SEEDS_OF_INTERVAL = 3  # with two, Student's t is 9 deviations wide and would be all that the plot shows


def markdown(
    standings: Sequence[Standing], data: Prepared, *, reference: str | None, chosen: bool, commands: str
) -> str:
    """The whole comparison. `chosen`: the reference is the best baseline, not one that was asked for."""
    figures = {standing.name: _figures(standing, data) for standing in standings}
    blocks = [
        f"# {data.name}: {len(standings)} models compared",
        _caption(standings, data),
        _table(_columns(standings, reference, figures)),
        _how_to_read(standings, data, reference, chosen=chosen),
        _differences(standings, reference),
        _published(standings, data, figures),
        _unfinished(standings),
        f"## Made by\n\n```\n{commands.strip()}\n```" if commands.strip() else "",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def of_models(standings: Sequence[Standing], data: Prepared, reference: str | None) -> str:
    """CSV, one row per model; what is not known is empty."""
    lines = []
    for standing in standings:
        line: dict[str, Any] = {
            "name": standing.name,
            "model": standing.model,
            "seeds": " ".join(str(cell.seed) for cell in standing.cells),
            "failed": "; ".join(f"{cell.seed}: {cell.failure}" for cell in standing.failed),
            "valid_auc_mean": standing.mean("auc", "valid"),
        }
        for figure in FIGURES:
            name = figure.replace("calibrated.", "calibrated_")
            line |= {f"{name}_mean": standing.mean(figure), f"{name}_sd": standing.deviation(figure)}
        line |= _training(standing)
        line["reference"] = reference if standing.over_rows else None
        for over, found in (("seeds", standing.over_seeds), ("rows", standing.over_rows)):
            if over == "seeds":
                line["auc_difference"] = found.value if found else None
            for part in ("low", "high", "p"):
                line[f"over_{over}_{part}"] = getattr(found, part, None)
        line["published"] = "; ".join(f"{_pair(f)} ({f.source})" for f in _figures(standing, data))
        lines.append(line)
    return _csv(lines)


def of_cells(standings: Sequence[Standing]) -> str:
    """CSV, one row per finished cell."""
    lines = []
    for standing in standings:
        for cell in standing.cells:
            figures = cell.figures or {}
            test = figures["test"]
            lines.append(
                {
                    "name": standing.name,
                    "model": standing.model,
                    "seed": cell.seed,
                    "valid_auc": figures["valid"]["auc"],
                    **{name: test[name] for name in ("auc", "gauc", "logloss")},
                    "calibrated_logloss": test["calibrated"]["logloss"],
                    **{name: figures.get(name) for name in OF_A_RUN},
                    "run": cell.path.name,
                }
            )
    return _csv(lines)


def plot(standings: Sequence[Standing], dataset: str, file: Path) -> None:
    """Each seed's test AUC as a dot, the mean as a bar, its 95 % interval as a line; the best on top.

    A model far below all others is an arrow with its mean, for on one scale it would press the others into one dot.
    """
    shown = [standing for standing in standings if standing.cells][::-1]
    means = [mean(standing.values("auc")) for standing in shown]
    first, _, third = quantiles(means, method="inclusive") if len(means) > 1 else means * 3
    lowest = first - FAR_OUT * (third - first)
    figure = Figure(figsize=(8, 1.3 + 0.36 * len(shown)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for y, standing in enumerate(shown):
        aucs = standing.values("auc")
        if mean(aucs) < lowest:
            axes.annotate(
                f"\N{LEFTWARDS ARROW} {mean(aucs):.4f}",
                (0.01, y),
                xycoords=("axes fraction", "data"),
                fontsize=8,
                va="center",
            )
            continue
        bounds = significance.interval(aucs) if len(aucs) >= MIN_SEEDS_OF_INTERVAL else None
        if bounds:
            axes.plot(bounds, [y, y], color=MUTED, lw=1.5, zorder=1)
        axes.plot([mean(aucs)], [y], "|", color="black", ms=13, mew=1.5, zorder=2)
        axes.plot(aucs, [y] * len(aucs), "o", color=CALIBRATED, ms=4.5, alpha=0.7, mew=0, zorder=3)
    axes.set_yticks(range(len(shown)), [standing.name for standing in shown], fontsize=9)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.grid(axis="x", color=MUTED, lw=0.4, alpha=0.4)
    axes.locator_params(axis="x", nbins=7)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.tick_params(labelsize=8, axis="x")
    axes.set_xlabel("test AUC: dot one seed, bar the mean, line its 95 % interval (from 3 seeds)", fontsize=8)
    axes.set_title(dataset, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def _caption(standings: Sequence[Standing], data: Prepared) -> str:
    rows = {part: data.rows(part) for part in PARTS}
    total = sum(len(part) for part in rows.values())
    counts = ", ".join(f"{len(of_part):,} {part}" for part, of_part in rows.items())
    shares = "/".join(f"{len(part) / total:.0%}".rstrip("%") for part in rows.values())
    clicked = "/".join(f"{100 * float(part.label.mean()):#.3g}" for part in rows.values())
    seeds = sorted({cell.seed for standing in standings for cell in standing.cells})
    notes = json.loads((data.path / "dataset.json").read_bytes()).get("notes", [])
    lines = [
        f"Rows: {counts} ({shares} %), of which {clicked} % were clicked; split as `prepare` made it, {data.path}.",
        f"Seeds: {', '.join(map(str, seeds)) or 'none finished'}.",
        "All figures are of the test part; the validation part chose the epoch to keep and the calibration.",
        *(f"Note of `prepare`: {note}." for note in notes),
    ]
    return "\n".join(lines)


def _columns(
    standings: Sequence[Standing], reference: str | None, figures: Mapping[str, Sequence[Published]]
) -> dict[str, list[str]]:
    """The table by columns, without those that have nothing to tell."""
    columns = {"model": [s.name for s in standings], "seeds": [_seeds(s) for s in standings]}
    for figure, title in FIGURES.items():
        best = _best(standings, figure)
        columns[title] = [_mean(s, figure, bold=s.name in best) for s in standings]
    if reference is not None:
        seeds, rows = [s.over_seeds for s in standings], [s.over_rows for s in standings]
        columns[f"AUC - {reference}"] = [f"{d.value:+.4f}" if d else "" for d in rows]
        columns["p, seeds"] = [_p(d) for d in seeds]
        columns["p, rows"] = [_p(d) for d in rows]
    numbers = {source: number for number, source in enumerate(_sources(figures), start=1)}
    columns["published AUC / log loss"] = [
        ", ".join(f"{_pair(f)} [{numbers[f.source]}]" for f in figures[s.name]) for s in standings
    ]
    trainings = [_training(s) for s in standings]
    forms = {"parameters": ("parameters", ",.0f"), "epochs_mean": ("epochs", ".1f")}
    forms["samples_per_s_median"] = ("training rows/s", ",.0f")
    for key, (title, form) in forms.items():
        columns[title] = ["" if found[key] is None else format(found[key], form) for found in trainings]
    return {title: cells for title, cells in columns.items() if any(cells)}


def _how_to_read(standings: Sequence[Standing], data: Prepared, reference: str | None, *, chosen: bool) -> str:
    group = data.rows("test").group
    by_user = (group >= 0).any()
    unit = "drawn user by user (Obuchowski 1997)" if by_user else "drawn row by row"
    text = (
        "Mean ± sample standard deviation over the seeds. Bold is the best and whatever lies within one standard"
        " deviation of it, the larger of the two; a best with a single seed is not marked. `log loss` is the model's"
        " own, `calibrated` that of the probabilities the service answers with. Training rows/s: the median."
    )
    if reference is None:
        return f"{text}\n\nNo baseline is finished, so nothing is tested; --against NAME compares with another model."
    why = (
        "the baseline of the best mean validation AUC; the test part chose nothing"
        if chosen
        else "asked for with --against"
    )
    return (
        f"{text}\n\n`AUC - {reference}`: on the seeds that both have; {reference} is {why}. `p, seeds`: paired t-test"
        " over the seeds, would other seeds change it? `p, rows`: test of DeLong et al. (1988) between the two mean"
        f" AUCs, the test rows {unit}, would other test rows change it? Two-sided; believe a difference where both are"
        f" small, and the less the more models there are ({len(standings)} here, no correction)."
    )


def _differences(standings: Sequence[Standing], reference: str | None) -> str:
    found = [s for s in standings if s.over_seeds and s.over_rows]
    if not found:
        return ""
    columns = {
        f"test AUC minus {reference}": [s.name for s in found],
        "mean": [f"{s.over_rows.value:+.5f}" if s.over_rows else "" for s in found],
        "95 % interval over seeds": [_bounds(s.over_seeds) for s in found],
        "over test rows": [_bounds(s.over_rows) for s in found],
    }
    return f"## The differences\n\n{_table(columns)}"


def _published(standings: Sequence[Standing], data: Prepared, figures: Mapping[str, Sequence[Published]]) -> str:
    """What the column's numbers mean, and in one line which figures of these models are of other rows or forms."""
    test_rows = len(data.rows("test"))
    left_out = [r for s in standings for r in published.incomparable(data.name, test_rows, s.runs())]
    sources = _sources(figures)
    blocks = ["\n".join(f"{number}. {text}." for number, text in enumerate(sources.values(), start=1))]
    if left_out:
        beginning = "Of other rows or forms, and not shown" if sources else "None is of these rows and models"
        blocks.append(f"{beginning}: {'; '.join(dict.fromkeys(left_out))}. Here: {test_rows:,} test rows.")
    found = [block for block in blocks if block]
    return "\n\n".join(["## Published figures", *found]) if found else ""


def _unfinished(standings: Sequence[Standing]) -> str:
    failed = [f"- {cell.path.name} failed: {cell.failure}" for standing in standings for cell in standing.failed]
    pending = [f"- {cell.path.name} is not finished" for standing in standings for cell in standing.pending]
    return "\n".join(["## Not in the figures\n", *failed, *pending]) if failed or pending else ""


def _figures(standing: Standing, data: Prepared) -> list[Published]:
    return published.comparable(data.name, len(data.rows("test")), standing.runs())


def _sources(figures: Mapping[str, Sequence[Published]]) -> dict[str, str]:
    """{source: what it has of these rows}, in the order of the table."""
    return {f.source: f"{f.source}: {f.split}" for of_model in figures.values() for f in of_model}


def _best(standings: Sequence[Standing], figure: str) -> set[str]:
    sign = 1 if figure.endswith("auc") else -1
    means = {s.name: m for s in standings if (m := s.mean(figure)) is not None}
    spread = {s.name: s.deviation(figure) for s in standings}
    best = max(means, key=lambda name: sign * means[name], default=None)
    if best is None or (best_spread := spread[best]) is None:
        return set()
    return {name for name, value in means.items() if abs(value - means[best]) <= max(best_spread, spread[name] or 0)}


def _training(standing: Standing) -> dict[str, float | None]:
    if not standing.cells:
        return {"parameters": None, "epochs_mean": None, "samples_per_s_median": None}
    return {
        "parameters": standing.training("parameters")[0],
        "epochs_mean": mean(standing.training("epochs")),
        "samples_per_s_median": median(standing.training("samples_per_s")),
    }


def _seeds(standing: Standing) -> str:
    failed = f"{len(standing.failed)} failed" if standing.failed else ""
    return ", ".join(word for word in (str(len(standing.cells)) if standing.cells else "", failed) if word) or "0"


def _mean(standing: Standing, figure: str, *, bold: bool) -> str:
    value, spread = standing.mean(figure), standing.deviation(figure)
    if value is None:
        return ""
    digits = 4 if value >= 0.05 else 6
    text = f"**{value:.{digits}f}**" if bold else f"{value:.{digits}f}"
    return text if spread is None else f"{text} ± {spread:.{digits}f}"


def _pair(figures: Published) -> str:
    loss = "-" if figures.logloss is None else format(figures.logloss, ".4f" if figures.logloss >= 0.05 else ".6f")
    return f"{figures.auc:.4f} / {loss}"


def _p(difference: Difference | None) -> str:
    if difference is None:
        return ""
    if difference.p is None:
        return "-"
    return "<0.001" if difference.p < 0.001 else f"{difference.p:.3f}"


def _bounds(difference: Difference | None) -> str:
    if difference is None or difference.low is None or difference.high is None:
        return "-"
    return f"{difference.low:+.5f} to {difference.high:+.5f} (p {_p(difference)})"


def _table(columns: Mapping[str, Sequence[str]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *map(list, zip(*columns.values(), strict=True))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _csv(lines: Sequence[Mapping[str, Any]]) -> str:
    if not lines:
        return ""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()
