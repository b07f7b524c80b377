"""Several models, each trained with the same seeds and judged in one table: DIR is

    DIR/runs/<name>-<seed>/            one cell: a run's folder (`fit.run_folder`), test_logits.npy, or failed.json
    DIR/commands.txt                   the command lines that trained them
    DIR/compare.md, .csv, .png         one row per model
    DIR/runs.csv                       one row per finished cell

The table shows every finished cell of DIR, whichever command trained it, so it grows by models and seeds.
"""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models import zoo
from training import recipes
from training.comparison import leaderboard, tables
from training.config import Run, difference, override
from training.data.batches import Prepared
from training.errors import UserError
from training.evaluation import metrics
from training.fit import run_folder
from training.fit.checkpoint import write_atomically
from training.progress import say

FIRST_SEED = 2026


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row to be: a model, the recipe (None: the data set's own) and what differs from that, as `--set` takes it."""

    name: str
    model: str
    recipe: str | None = None
    settings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Planned:
    path: Path
    variant: Variant
    settings: tuple[str, ...]
    run: Run


def variants(models: str | None, named: Sequence[Sequence[str]]) -> list[Variant]:
    """What `--models a,b:recipe` and every `--variant NAME=MODEL[:RECIPE] key=value ...` ask for, in this order.

    A model stands under its own name, one with a recipe under the recipe's.
    """
    found = []
    for word in (models or "").split(",") if models is not None else []:
        model, recipe = _model_and_recipe(word.strip(), "--models")
        found.append(Variant(name=recipe or model, model=model, recipe=recipe))
    for first, *settings in named:
        name, equals, word = first.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise UserError(
                "--variant: expected NAME=MODEL[:RECIPE] [key=value ...], where NAME is of letters, digits, dots,"
                f" dashes and underlines and at most 64 long, got {first!r}"
            )
        model, recipe = _model_and_recipe(word, f"--variant {name}")
        found.append(Variant(name=name, model=model, recipe=recipe, settings=tuple(settings)))
    names = [variant.name for variant in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name} is named twice; give one of them another name with --variant NAME=...")
    return found


def compare(
    out: Path,
    data: Prepared,
    variants: Sequence[Variant],
    num_seeds: int,
    settings: Sequence[str],
    *,
    command: str,
    against: str | None = None,
) -> list[str]:
    """Train every cell that is not finished yet, go on with those that were interrupted; returns what failed and why.

    All is checked before anything is trained. A cell that cannot be trained is noted as failed and the others go on;
    the next call tries it again. Raises UserError where a cell was begun with other settings or on other data, and
    where `report` would find nothing of the name `against`.
    """
    _check_target(out)
    _check_labels(data)
    plan = [
        _planned(out, data, variant, seed, settings)
        for seed in range(FIRST_SEED, FIRST_SEED + num_seeds)
        for variant in variants
    ]
    cells = leaderboard.read(out, data)
    begun = {cell.path: cell for cell in cells}
    names = sorted({variant.name for variant in variants} | {cell.name for cell in cells})
    if against is not None and against not in names:
        raise UserError(f"--against {against}: no model has this name; there are {', '.join(names)}")
    for cell in plan:
        if cell.path in begun:
            change = difference(Run.from_json(begun[cell.path].run), cell.run)
            if change is not None:
                raise UserError(
                    f"{cell.path} was begun with other settings: {change};"
                    " remove it, name this one otherwise with --variant, or compare into another folder"
                )
        else:
            run_folder.check_new(cell.path)
            if cell.run.seed == FIRST_SEED:
                _check_fits(cell, data)
    _remember(out, command)
    threads, failures = torch.get_num_threads(), []
    for number, cell in enumerate(plan, start=1):
        where = f"[{number} of {len(plan)}] {cell.path.name}"
        if cell.path in begun and begun[cell.path].figures is not None:
            say(f"{where} is finished")
            continue
        say(f"{where}: {cell.path}")
        torch.set_num_threads(threads)  # going on with a run sets its own number
        failure = _train(cell, data)
        if failure is not None:
            failures.append(f"{cell.path.name}: {failure}")
    return failures


def report(out: Path, data: Prepared, against: str | None = None) -> str:
    """Write the table of all finished cells, beside others still in training; returns it as Markdown."""
    if not (out / "runs").is_dir():
        raise UserError(f"{out} holds no comparison (it has no folder runs)")
    _check_labels(data)
    cells = leaderboard.read(out, data)
    judged, reference = leaderboard.judge(cells, data, against)
    commands = "".join(f"{line}\n" for line in _commands(out))
    text = tables.markdown(judged, data, reference=reference, chosen=against is None, commands=commands)
    write_atomically(out / "compare.md", text.encode())
    write_atomically(out / "compare.csv", tables.of_models(judged, data, reference).encode())
    write_atomically(out / "runs.csv", tables.of_cells(judged).encode())
    if any(standing.cells for standing in judged):
        tables.plot(judged, data.name, out / "compare.png")
    return text


def _model_and_recipe(word: str, where: str) -> tuple[str, str | None]:
    model, colon, recipe = word.partition(":")
    try:
        zoo.configure(model, {})
        if colon:
            recipes.recipe(recipe, model)
    except (ValueError, UserError) as err:
        raise UserError(f"{where}: {str(err).removeprefix('--recipe ')}") from err
    return model, recipe if colon else None


def _check_target(out: Path) -> None:
    if out.exists() and not (out / "runs").is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{out}: expected a new or an empty folder or an earlier comparison, found something else there"
        )


def _check_labels(data: Prepared) -> None:
    if np.isnan(metrics.auc(label := data.rows("test").label, label)):
        raise UserError(f"{data.path}: the test part's {len(label)} rows need both clicks and non-clicks to compare by")


def _check_fits(cell: _Planned, data: Prepared) -> None:
    try:
        run_folder.check_fits(cell.run, data)
    except UserError as err:
        raise UserError(f"{cell.variant.name}: {err}") from err


def _planned(out: Path, data: Prepared, variant: Variant, seed: int, settings: Sequence[str]) -> _Planned:
    everything = (*settings, *variant.settings)
    if any(assignment.partition("=")[0] == "seed" for assignment in everything):
        raise UserError(f"--seeds counts the seeds, from {FIRST_SEED} on; seed cannot be set for a model")
    everything = (*everything, f"seed={seed}")
    recipe = recipes.recipe(variant.recipe or recipes.choose(variant.model, data.name).name, variant.model)
    try:
        run = override(recipe, everything)
    except UserError as err:
        raise UserError(f"{variant.name}: {str(err).removeprefix('--set ')}") from err
    return _Planned(path=out / "runs" / f"{variant.name}-{seed}", variant=variant, settings=everything, run=run)


def _remember(out: Path, command: str) -> None:
    if command not in _commands(out):
        (out / "runs").mkdir(parents=True, exist_ok=True)
        with (out / "commands.txt").open("a", encoding="utf-8") as file:  # others may be adding theirs
            file.write(f"{command}\n")


def _commands(out: Path) -> list[str]:
    file = out / "commands.txt"
    return file.read_text("utf-8", errors="replace").splitlines() if file.exists() else []


def _train(cell: _Planned, data: Prepared) -> str | None:
    """Finish a cell; returns why it failed, if it did."""
    failed = cell.path / "failed.json"
    failed.unlink(missing_ok=True)
    run = run_folder.begin(cell.path, data, cell.variant.model, cell.variant.recipe, cell.settings, resume=True)
    try:
        run_folder.train(cell.path, data, run)
        logits = run_folder.score(run_folder.read(cell.path), data, "test")
    except UserError as err:
        say(f"{cell.path.name} failed: {err}")
        write_atomically(failed, json.dumps({"reason": str(err)}).encode())
        return str(err)
    content = io.BytesIO()
    np.save(content, logits)
    write_atomically(cell.path / "test_logits.npy", content.getvalue())
    return None
