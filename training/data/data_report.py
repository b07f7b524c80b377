"""The page about what `prepare` read: rows, times, click rates, and each column's gaps and oddities, with remedies."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from models.features.encoder import Encoder
from models.features.field import FIRST, OOV, Field
from models.features.schema import Schema
from models.features.values import transformed
from training.data.past import values_of
from training.datasets import times
from training.log import PARTS, Log

MUTED, CLICKS = "#8b949e", "#1f5fbf"
NUM_BINS, ROWS_A_BIN = 60, 20
_COUNT = " count"  # a column for a while
RARE, OFTEN = 0.01, 0.5  # shares of rows from which an oddity is worth a word


def report(log: Log, rows: pl.LazyFrame, schema: Schema) -> dict[str, Any]:
    """What data.json holds: of the completed rows, of each part and of each column."""
    parts = {part: _part(rows.filter(pl.col("part") == part)) for part in PARTS}
    columns = {f.name: _column(f, rows, schema) for f in schema.fields if f.kind not in ("time", "sequence")}
    warnings = [text for name, figures in columns.items() for text in _warnings(schema.field(name), figures)]
    return {
        "name": log.name,
        "rows": sum(part["rows"] for part in parts.values()),
        "parts": parts,
        "columns": columns,
        "dropped": dict(log.dropped),
        "unread_columns": list(log.unread),
        "notes": list(log.notes),
        "warnings": warnings,
        "label_rate_over_time": _over_time(rows),
    }


def write(folder: Path, about: Mapping[str, Any]) -> None:
    (folder / "data.json").write_text(json.dumps(about, indent=2, allow_nan=False))
    (folder / "data.txt").write_text(page(about))
    _plot(about["label_rate_over_time"], about["parts"], folder / "data.png")


def page(about: Mapping[str, Any]) -> str:
    """The figures as a person reads them."""
    lines = [f"{about['name']}: {about['rows']:,} rows", ""]
    lines.append(f"{'part':<8}{'rows':>14}{'clicked':>10}  {'from':<25}{'to':<25}")
    for name, part in about["parts"].items():
        first, last = (_when(part[end]) for end in ("first", "last"))
        lines.append(f"{name:<8}{part['rows']:>14,}{part['click_rate']:>10.4f}  {first:<25}{last:<25}")
    width = max([6, *(len(name) for name in about["columns"])])
    lines += ["", f"{'column':<{width}}  {'values':>10}{'missing':>10}{'unknown at test':>17}"]
    for name, figures in about["columns"].items():
        unknown = "" if figures["unknown_at_test"] is None else f"{figures['unknown_at_test']:.1%}"
        lines.append(f"{name:<{width}}  {figures['different']:>10,}{figures['missing']:>10.1%}{unknown:>17}")
    dropped = [f"{num:,} {what}" for what, num in about["dropped"].items() if num]
    lists = (
        ("dropped", dropped),
        ("columns that no field reads", [", ".join(about["unread_columns"])] if about["unread_columns"] else []),
        ("notes", about["notes"]),
        ("warnings", about["warnings"]),
    )
    for title, entries in lists:
        lines += ["", f"{title}:", *(f"  {entry}" for entry in entries)] if entries else []
    return "\n".join(lines) + "\n"


def _part(rows: pl.LazyFrame) -> dict[str, Any]:
    figures: dict[str, Any] = (
        rows.select(rows=pl.len(), click_rate=pl.col("label").mean(), first=pl.col("ts").min(), last=pl.col("ts").max())
        .collect(engine="streaming")
        .row(0, named=True)
    )
    return figures


def _column(field: Field, rows: pl.LazyFrame, schema: Schema) -> dict[str, Any]:
    value = pl.col(field.name)
    rows = values_of(field.name, rows)
    is_missing = value.is_null()
    if field.kind == "multi":
        is_missing = value.list.len().fill_null(0) == 0
    elif field.kind == "numeric":
        is_missing = value.is_null() | value.is_nan()
    figures: dict[str, Any] = {"missing": _share(rows, is_missing), "unknown_at_test": None}
    train = rows.filter(pl.col("part") == "train")
    if field.kind == "numeric":
        return figures | _of_numbers(field, train.filter(~is_missing).select(value))
    test = rows.filter((pl.col("part") == "test") & ~is_missing).select(value)
    figures["different"] = len(field.vocabulary or ())
    figures["unknown_at_test"] = _unknown(field, test, Encoder(schema))
    return figures


def _of_numbers(field: Field, numbers: pl.LazyFrame) -> dict[str, Any]:
    value = pl.col(field.name)
    counts = numbers.group_by(value).agg(pl.len().alias(_COUNT)).collect(engine="streaming").sort(field.name)
    values, weights = counts[field.name].to_numpy().astype(np.float64), counts[_COUNT].to_numpy().astype(np.float64)
    if not values.size:
        return {"different": 0, "cut": 0.0}
    scaled = transformed(field.transform, values, field.quantiles)
    low = -np.inf if field.low is None else field.low
    high = np.inf if field.high is None else field.high
    outside = (scaled < low) | (scaled > high)
    cut = float(weights[outside].sum() / weights.sum())
    kept = np.clip(scaled, low, high)
    assert field.scale is not None
    middle = kept[np.searchsorted(np.cumsum(weights), weights.sum() / 2)]
    near = np.abs(kept - middle) < 0.01 * field.scale
    figures: dict[str, Any] = {
        "different": len(values),
        "min": float(values[0]),
        "max": float(values[-1]),
        "cut": cut,
        "collapsed": float(weights[near].sum() / weights.sum()) if near.sum() > 1 else 0.0,
    }
    if outside.any():
        odd = int(np.argmax(np.where(outside, weights, 0)))
        figures |= {"usual_cut_value": float(values[odd]), "usual_cut_share": float(weights[odd] / weights.sum())}
    return figures


def _unknown(field: Field, test: pl.LazyFrame, encoder: Encoder) -> float:
    """The share of the test part's present values that the training part did not have often enough."""
    values = test.explode(field.name) if field.kind == "multi" else test
    counts = values.group_by(field.name).agg(pl.len().alias(_COUNT)).collect(engine="streaming")
    if counts.is_empty():
        return 0.0
    column = counts[field.name]
    raw: Any = [[value] for value in column] if field.kind == "multi" else column.to_list()
    ids = encoder.encode_column(field, raw).reshape(len(column), -1)[:, 0]
    weights = counts[_COUNT].to_numpy().astype(np.float64)
    return float(weights[ids == OOV].sum() / weights[ids >= OOV].sum()) if (ids >= OOV).any() else 0.0


def _warnings(field: Field, figures: Mapping[str, Any]) -> list[str]:
    name, found = f"column {field.name}", []
    if figures["missing"] >= OFTEN:
        found.append(f"{name}: {figures['missing']:.0%} of its values are missing; is it joined and spelled right?")
    if figures["different"] <= 1:
        found.append(f"{name}: has one value in the training part; leave it out, it tells a model nothing")
    unknown = figures["unknown_at_test"]
    if unknown is not None and unknown >= OFTEN and field.num_ids > FIRST:
        what = f"{unknown:.0%} of the test part's values were never seen in training"
        found.append(f"{name}: {what}; take a coarser column beside it, or split later")
    if figures.get("usual_cut_share", 0) >= RARE:
        value, share = figures["usual_cut_value"], figures["usual_cut_share"]
        what = f"{figures['cut']:.1%} of its numbers are far from the rest and cut ({value:g} is {share:.1%} of all)"
        remedy = "if that stands for nothing, name it in `null_values:`, else try `transform: log` or `quantile`"
        found.append(f"{name}: {what}; {remedy}")
    if figures.get("collapsed", 0) >= OFTEN:
        found.append(
            f"{name}: {figures['collapsed']:.0%} of its numbers, different ones, are nearly one on its scale; try"
            " `transform: log` or `quantile`"
        )
    return found


def _over_time(rows: pl.LazyFrame) -> dict[str, list[float]]:
    """Rows and click rate in bins of equal width."""
    first, last = rows.select(pl.col("ts").min(), pl.col("ts").max().alias("last")).collect(engine="streaming").row(0)
    num_rows = rows.select(pl.len()).collect(engine="streaming").item()
    num_bins = min(max(num_rows // ROWS_A_BIN, 1), NUM_BINS)
    width = max(last - first, 1.0) / num_bins
    place = ((pl.col("ts") - first) / width).floor().clip(0, num_bins - 1).cast(pl.Int64)
    bins = rows.group_by(place.alias("bin")).agg(pl.len(), rate=pl.col("label").mean()).collect(engine="streaming")
    bins = bins.sort("bin")
    return {
        "ts": [first + width * (number + 0.5) for number in bins["bin"]],
        "rows": bins["len"].to_list(),
        "click_rate": bins["rate"].to_list(),
    }


def _plot(bins: Mapping[str, Sequence[float]], parts: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    is_time = bins["ts"][0] >= times.FIRST_S
    at: Any = np.array(bins["ts"])
    at = (at * 1e6).astype("datetime64[us]") if is_time else at
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[2, 1], sharex=True)
    upper.plot(at, bins["click_rate"], "o-", color=CLICKS, ms=3, lw=1)
    upper.set_ylabel("share clicked", fontsize=9)
    upper.set_ylim(bottom=0)
    upper.set_title("Label rate over time, and rows", fontsize=10)
    lower.step(at, bins["rows"], where="mid", color=MUTED)
    lower.set_ylim(bottom=0)
    lower.set_ylabel("rows", fontsize=9)
    lower.set_xlabel(f"time (UTC), from {times.spoken(bins['ts'][0])[:10]}" if is_time else "row", fontsize=9)
    starts = {part: parts[part]["first"] for part in PARTS}
    if starts["train"] < starts["valid"] < starts["test"] and parts["train"]["last"] < starts["valid"]:
        for part in ("valid", "test"):
            start = np.array(starts[part] * 1e6).astype("datetime64[us]") if is_time else starts[part]
            for axes in (upper, lower):
                axes.axvline(start, color=MUTED, lw=0.8, ls=":")
            upper.annotate(
                f" {part}", (start, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8, color=MUTED
            )
    for axes in (upper, lower):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def _share(rows: pl.LazyFrame, condition: pl.Expr) -> float:
    return float(rows.select(condition.fill_null(value=True).mean()).collect(engine="streaming").item())


def _when(ts: float) -> str:
    return times.spoken(ts) if ts >= times.FIRST_S else f"row {ts:.0f}"
