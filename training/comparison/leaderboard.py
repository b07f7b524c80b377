"""What the finished cells of a comparison come to: one standing per model, each judged against one of them.

A cell is the run of one model with one seed, in a folder COMPARISON/runs/<name>-<seed>/ as `fit.run_folder` makes it,
with test_logits.npy beside the rest (written last: a cell that has it is finished) or failed.json.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.config import Run
from training.data.batches import Prepared
from training.errors import UserError
from training.evaluation import significance
from training.evaluation.significance import Difference
from training.fit import run_folder

PAPERS = ("mian", "stec", "dynint", "deepmr", "feseq")  # every other model is a baseline


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model with one seed. `figures` are those of metrics.json, None until the cell is finished."""

    path: Path
    name: str
    model: str
    seed: int
    data: Mapping[str, str]
    """What config.json tells of the data: path, data_hash, schema_fingerprint."""
    run: Mapping[str, Any]
    figures: Mapping[str, Any] | None
    failure: str | None

    def test_logits(self) -> NDArray[np.float32]:
        file = self.path / "test_logits.npy"
        try:
            logits: NDArray[np.float32] = np.load(file)
        except (OSError, ValueError, EOFError) as err:
            raise UserError(f"{file}: damaged, remove it and compare again ({err})") from err
        return logits


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One row of the table: all the cells of one name, and how its AUC differs from the reference's."""

    name: str
    model: str
    cells: tuple[Cell, ...]
    """The finished ones, by seed."""
    failed: tuple[Cell, ...]
    pending: tuple[Cell, ...]
    """Begun, neither finished nor failed."""
    over_seeds: Difference | None = None
    over_rows: Difference | None = None

    def values(self, figure: str, part: str = "test") -> list[float]:
        """A figure of every finished cell, such as `auc` or `calibrated.logloss`; empty where the part has none."""
        found = [_value(cell.figures or {}, f"{part}.{figure}") for cell in self.cells]
        return [value for value in found if value is not None]

    def mean(self, figure: str, part: str = "test") -> float | None:
        values = self.values(figure, part)
        return mean(values) if values else None

    def deviation(self, figure: str) -> float | None:
        """The sample standard deviation over the seeds; None for fewer than two."""
        values = self.values(figure)
        return stdev(values) if len(values) > 1 else None

    def training(self, figure: str) -> list[float]:
        """What metrics.json tells of the training itself, such as `parameters`, for every finished cell."""
        return [float(cell.figures[figure]) for cell in self.cells if cell.figures]

    def runs(self) -> list[Run]:
        """What the finished cells were trained with."""
        return [Run.from_json(cell.run) for cell in self.cells]


def read(folder: Path, data: Prepared) -> list[Cell]:
    """The cells of a comparison, by name and seed. Raises UserError for one on other data than `data`."""
    cells = [_cell(config.parent) for config in sorted(folder.glob("runs/*/config.json"))]
    for cell in cells:
        check_data(cell, data)
    return sorted(cells, key=lambda cell: (cell.name, cell.seed))


def check_data(cell: Cell, data: Prepared) -> None:
    """Raises UserError unless the cell was begun on `data`."""
    if (cell.data["data_hash"], cell.data["schema_fingerprint"]) != (data.data_hash, data.schema.fingerprint):
        raise UserError(
            f"{cell.path} was begun on other data: on {cell.data['path']} as it was then, not on {data.path};"
            " compare into another folder"
        )


def judge(cells: Sequence[Cell], data: Prepared, against: str | None = None) -> tuple[list[Standing], str | None]:
    """The standings, best mean test AUC first, and the name that they are judged against.

    That is `against` or, without one, the baseline of the best mean validation AUC: the test part chooses nothing.
    It is None where there is no baseline. A pair of models is judged on the seeds that both have.
    """
    standings = [_standing(name, cells) for name in dict.fromkeys(cell.name for cell in cells)]
    finished = [s for s in standings if s.cells]
    reference = _reference(finished, against)
    if reference is not None:
        judged = _against(reference, data)
        standings = [judged(s) if s.cells and s is not reference else s for s in standings]
    standings.sort(key=lambda s: -(s.mean("auc") or 0))
    return standings, reference.name if reference else None


def _reference(finished: Sequence[Standing], against: str | None) -> Standing | None:
    if against is not None:
        for standing in finished:
            if standing.name == against:
                return standing
        names = ", ".join(s.name for s in finished) or "none"
        raise UserError(f"--against {against}: no finished cell has this name; there are {names}")
    baselines = [s for s in finished if s.model not in PAPERS]
    return max(baselines, key=lambda s: s.mean("auc", "valid") or 0, default=None)


def _against(reference: Standing, data: Prepared) -> Callable[[Standing], Standing]:
    rows = data.rows("test")
    of_reference: dict[tuple[int, ...], NDArray[np.float64]] = {}  # by seeds, mostly one entry

    def placements(standing: Standing, seeds: tuple[int, ...]) -> NDArray[np.float64]:
        logits = [cell.test_logits() for cell in standing.cells if cell.seed in seeds]
        if any(len(one) != len(rows) for one in logits):
            raise UserError(f"{standing.cells[0].path}: damaged, its test logits are not as many as the test rows")
        return significance.placements(rows.label, logits)

    def judged(standing: Standing) -> Standing:
        aucs, of_other = ({c.seed: (c.figures or {})["test"]["auc"] for c in s.cells} for s in (standing, reference))
        seeds = tuple(seed for seed in aucs if seed in of_other)
        if not seeds:
            return standing
        if seeds not in of_reference:
            of_reference[seeds] = placements(reference, seeds)
        over_rows = significance.over_rows(rows.label, placements(standing, seeds), of_reference[seeds], rows.group)
        over_seeds = significance.over_seeds([aucs[s] for s in seeds], [of_other[s] for s in seeds])
        return Standing(**{**vars(standing), "over_seeds": over_seeds, "over_rows": over_rows})

    return judged


def _standing(name: str, cells: Sequence[Cell]) -> Standing:
    cells_of_model = [cell for cell in cells if cell.name == name]
    return Standing(
        name=name,
        model=cells_of_model[0].model,
        cells=tuple(c for c in cells_of_model if c.figures is not None),
        failed=tuple(c for c in cells_of_model if c.figures is None and c.failure is not None),
        pending=tuple(c for c in cells_of_model if c.figures is None and c.failure is None),
    )


def _cell(path: Path) -> Cell:
    config = run_folder.json_of(path / "config.json")
    finished = (path / "metrics.json").exists() and (path / "test_logits.npy").exists()
    try:
        cell = Cell(
            path=path,
            name=path.name.rpartition("-")[0],
            model=config["run"]["model"],
            seed=config["run"]["seed"],
            data=config["data"],
            run=config["run"],
            figures=run_folder.json_of(path / "metrics.json") if finished else None,
            failure=_failure(path / "failed.json"),
        )
        _check_whole(cell)
    except (KeyError, TypeError, ValueError) as err:
        raise UserError(f"{path}: damaged run, remove it and compare again ({err!r})") from err
    return cell


def _check_whole(cell: Cell) -> None:
    """Raises KeyError, TypeError or ValueError where something is missing that the tables tell of every cell."""
    if not cell.name or cell.path.name != f"{cell.name}-{cell.seed}":  # a copy would stand in twice for its seed
        raise ValueError(f"expected a folder NAME-{cell.seed}")
    Run.from_json(cell.run)
    for name in ("path", "data_hash", "schema_fingerprint"):
        str(cell.data[name])
    if cell.figures is not None:
        for name in ("parameters", "epochs", "samples_per_s"):
            float(cell.figures[name])
        for part in ("valid", "test"):
            for measured in (cell.figures[part], cell.figures[part]["calibrated"]):
                float(measured["logloss"])
            float(cell.figures[part]["auc"])


def _failure(file: Path) -> str | None:
    try:
        return str(json.loads(file.read_bytes())["reason"])
    except FileNotFoundError:  # not failed, or just tried again by another process
        return None


def _value(figures: Mapping[str, Any], key: str) -> Any:
    found: Any = figures
    for name in key.split("."):
        found = found.get(name) if found is not None else None
    return found
