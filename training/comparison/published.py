"""Published figures: what papers and BARS report, in published.csv, and which of them may stand beside a run of ours.

source, table    whose figure; its table there
dataset, split   ours, or the name of one that is not to be had; the rows of it, in words
test_rows        of its test part, where known
prepare          `reads`: the very test rows. `draws`: rows of its own, by the same law or another. Empty: no data
model            the zoo's name, or that of a model that is not in it
recipe           of which the figure is, where a paper's model has several forms; empty: any form
settings         what differs from the recipe, as `--set model.key=value` takes it
auc, logloss     as printed, empty where none is; the same row of a later table is left out
"""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from models import zoo
from training import recipes
from training.config import Run, override

CSV = Path(__file__).with_name("published.csv")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One line of published.csv."""

    source: str
    table: str
    dataset: str
    split: str
    test_rows: int | None
    prepare: Literal["reads", "draws", ""]
    model: str
    recipe: str
    settings: tuple[str, ...]
    auc: float
    logloss: float | None
    note: str

    def is_of(self, dataset: str, test_rows: int) -> bool:
        """Whether it is of these very test rows."""
        return self.dataset == dataset and self.prepare == "reads" and self.test_rows == test_rows


@cache
def read() -> tuple[Figures, ...]:
    """All of published.csv; raises ValueError, naming the line, for one that is not as described above."""
    with CSV.open(encoding="utf-8", newline="") as file:
        return tuple(_parsed(line, number) for number, line in enumerate(csv.DictReader(file, strict=True), start=2))


def comparable(dataset: str, test_rows: int, runs: Sequence[Run]) -> list[Figures]:
    """The figures of the same model, in the form of every one of these runs, on the same test rows."""
    return [
        figures
        for figures in read()
        if figures.is_of(dataset, test_rows) and runs and all(_is_same_form(figures, run) for run in runs)
    ]


def incomparable(dataset: str, test_rows: int, runs: Sequence[Run]) -> list[str]:
    """Why each source of figures of these runs' model on this data set has none that `comparable` finds, in words."""
    sources = {figures.source for figures in comparable(dataset, test_rows, runs)}
    reasons = []
    for figures in read():
        if figures.dataset != dataset or figures.source in sources or figures.model not in {run.model for run in runs}:
            continue
        if figures.is_of(dataset, test_rows):
            reasons.append(f"{figures.source}: another form of {figures.model}, that of {figures.recipe}")
            sources.add(figures.source)
        else:
            count = f" ({figures.test_rows:,} test rows)" if figures.test_rows else ""
            reasons.append(f"{figures.source}: {figures.split}{count}")
    return list(dict.fromkeys(reasons))


def _is_same_form(figures: Figures, run: Run) -> bool:
    """Whether the run's model has the switches of the published one; its sizes may be others.

    A setting that tells two published rows of the model apart is a switch, too, whatever its type.
    """
    if figures.model != run.model:
        return False
    published, found = _published_options(figures), _options(run)
    switches = {key for other in read() if other.model == run.model for key in _keys(other)}
    if figures.recipe:
        switches |= {key for key, value in published.items() if isinstance(value, bool | str)}
    return all(found[key] == published[key] for key in switches)


@cache
def _published_options(figures: Figures) -> dict[str, Any]:
    recipe = recipes.recipe(figures.recipe or f"{figures.model}_neutral", figures.model)
    return _options(override(recipe, [f"model.{setting}" for setting in figures.settings]))


def _options(run: Run) -> dict[str, Any]:
    return asdict(zoo.configure(run.model, run.model_config))


def _keys(figures: Figures) -> list[str]:
    return [setting.partition("=")[0] for setting in figures.settings]


def _parsed(line: dict[str, str], number: int) -> Figures:
    if None in (*line, *line.values()):
        raise ValueError(f"{CSV.name}, line {number}: expected {len(fields(Figures))} columns, got another number")
    optional = {name: line[name] or None for name in ("test_rows", "logloss")}
    try:
        return _LINE.validate_python({**line, **optional, "settings": line["settings"].split()})
    except ValidationError as err:
        first = err.errors()[0]
        raise ValueError(
            f"{CSV.name}, line {number}, {first['loc'][0]}: {first['msg']}, got {first['input']!r}"
        ) from err


_LINE = TypeAdapter(Figures)
