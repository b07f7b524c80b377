"""One run's folder: begun, trained into, read back.

RUN/config.json           the resolved run, and the data it saw
RUN/schema.json           a copy of the data's
RUN/weights.safetensors   the best evaluation's weights
RUN/calibration.json      fitted on the validation part
RUN/metrics.json          written last: a run that has it is finished
RUN/log.jsonl             one line per evaluation
RUN/curves.png, RUN/reliability.png
RUN/checkpoint.pt         while it is trained
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_weights
from safetensors.torch import save as save_weights

from models import zoo
from models.artifact.calibration import Calibration
from models.features.schema import Schema
from models.layers.base import CTRModel
from training import recipes
from training.config import Run, difference, override
from training.data.batches import Prepared
from training.errors import UserError
from training.evaluation import metrics, run_report
from training.fit import calibration as calibrate
from training.fit import constant_check, loop
from training.fit.checkpoint import write_atomically
from training.progress import say


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run, read back from its folder."""

    path: Path
    run: Run
    data: Path
    data_hash: str
    schema: Schema
    model: CTRModel
    calibration: Calibration
    metrics: dict[str, Any]


def begin(path: Path, data: Prepared, model: str, recipe: str | None, settings: Sequence[str], *, resume: bool) -> Run:
    """Settle what is trained, and write it down in a new folder; or check it against the folder to be resumed.

    Without a recipe or settings a resumed run keeps its own. Raises UserError for a folder that holds something else,
    and, before there is one, for a model that does not fit the data.
    """
    choice = recipes.Choice(name=recipe, reason="asked for") if recipe else recipes.choose(model, data.name)
    requested = override(recipes.recipe(choice.name, model), settings)
    file = path / "config.json"
    if not file.exists():
        check_new(path)
        check_fits(requested, data)
        say(recipes.announcement(choice, requested))
        path.mkdir(parents=True, exist_ok=True)
        fresh: dict[str, Any] = {
            "run": requested.to_json(),
            "data": {"path": str(data.path.resolve()), "name": data.name, **_identity(data)},
            "threads": torch.get_num_threads(),
        }
        write_atomically(file, json.dumps(fresh, indent=2).encode())
        return requested
    if not resume:
        raise UserError(f"{path} already holds a run; add --resume to go on with it, or name another folder")
    saved, seen, threads = _begun(file)
    change = difference(saved, requested) if recipe or settings or model != saved.model else None
    if change is not None:
        raise UserError(f"{path} cannot be resumed with other settings: {change}")
    if not _identity(data).items() <= seen.items():
        raise UserError(f"{path} cannot be resumed on other data: it was begun on {seen['path']}")
    # Sums of floats depend on how they are shared out, so the same bits need the same number of threads.
    torch.set_num_threads(threads)
    return saved


def check_fits(run: Run, data: Prepared) -> None:
    """Raises UserError where the run's model cannot be made for the data."""
    with _enough_memory(run):
        _build(run, data.schema)


def check_new(path: Path) -> None:
    """Raises UserError where `path` holds what no run that was killed while it began has left."""
    if path.exists() and (not path.is_dir() or any(p.suffix != ".tmp" for p in path.iterdir())):
        raise UserError(f"{path}: expected a new or an empty folder for the run, found something else there")


def train(path: Path, data: Prepared, run: Run) -> dict[str, Any]:
    """Train, calibrate, measure and draw; returns what metrics.json holds. A finished run is not trained again.

    Raises UserError while another process trains it, and where memory does not suffice, and ConstantModelError for a
    model that tells no rows apart: such a run is never finished.
    """
    with _alone(path), _enough_memory(run):
        return _train(path, data, run)


def _train(path: Path, data: Prepared, run: Run) -> dict[str, Any]:
    if (path / "metrics.json").exists():
        say(f"{path} is finished")
        return json_of(path / "metrics.json")
    write_atomically(path / "schema.json", data.schema.to_json().encode())
    torch.manual_seed(run.seed)
    torch.use_deterministic_algorithms(True)
    # Otherwise every new tensor is filled with NaN first, a tenth of the time; the operations are deterministic anyway.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module
    model = _build(run, data.schema)
    parts = {part: data.rows(part) for part in ("train", "valid", "test")}
    done = loop.fit(model, parts["train"], parts["valid"], run, folder=path, report=say)

    run_report.plot_curves({path.name: done.log}, path / "curves.png")
    valid = parts["valid"]
    valid_logits = loop.predict(model, valid, "valid")
    aucs, out_of_patience = [line["valid_auc"] for line in done.log], done.bad_evals >= run.patience
    constant_check.check(model, valid, valid_logits, run, aucs=aucs, out_of_patience=out_of_patience)
    weights = save_weights(model.state_dict())
    write_atomically(path / "weights.safetensors", weights)
    calibration = calibrate.fit(valid_logits, valid.label, valid.weight, negative_rate=valid.negative_rate)
    write_atomically(path / "calibration.json", calibration.model_dump_json(indent=2).encode())
    logits = {"valid": valid_logits, "test": loop.predict(model, parts["test"], "test")}
    figures = {
        "model": run.model,
        "dataset": data.name,
        "data_hash": data.data_hash,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "seed": run.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": done.log[-1]["epoch"],
        "best_epoch": done.best_evaluation["epoch"],
        "steps": done.step,
        "best_step": done.best_evaluation["step"],
        "train_seconds": round(done.train_s, 2),
        "samples_per_s": round(done.log[-1]["epoch"] * len(parts["train"]) / done.train_s, 1),
        "threads": torch.get_num_threads(),
        **{part: measure(data, part, logits[part], calibration) for part in logits},
    }
    run_report.plot_reliability(parts["test"], logits["test"], calibration, "test", path / "reliability.png")
    write_atomically(path / "metrics.json", json.dumps(figures, indent=2, allow_nan=False).encode())
    (path / "checkpoint.pt").unlink(missing_ok=True)
    return figures


def read(path: Path) -> Trained:
    """A finished run. Raises UserError where `path` holds none."""
    if not (path / "metrics.json").exists():
        what = "a run that is not finished; train it with --resume" if (path / "config.json").exists() else "no run"
        raise UserError(f"{path} holds {what}")
    (run, seen, _), schema, figures = _begun(path / "config.json"), _schema(path), json_of(path / "metrics.json")
    model = _build(run, schema)
    try:
        weights = (path / "weights.safetensors").read_bytes()
        found = hashlib.sha256(weights).hexdigest()
        if found != figures.get("weights_sha256", found):
            raise UserError(f"{path}: damaged run, train it again (other weights than metrics.json tells of)")
        model.load_state_dict(load_weights(weights))
        calibration = Calibration.model_validate_json((path / "calibration.json").read_bytes())
    except (OSError, ValueError, RuntimeError, SafetensorError) as err:
        raise UserError(f"{path}: damaged run, train it again ({str(err).splitlines()[0]})") from err
    return Trained(
        path=path,
        run=run,
        data=Path(seen["path"]),
        data_hash=seen["data_hash"],
        schema=schema,
        model=model.eval(),
        calibration=calibration,
        metrics=figures,
    )


def logs(paths: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """The logs of runs, finished or not, under the shortest ends of their paths that tell them apart.

    Raises UserError where one has no evaluation yet, or one is named twice.
    """
    ends = [path.resolve().parts for path in paths]
    if len(set(ends)) < len(ends):
        raise UserError(f"{max(paths, key=paths.count)} is named twice")
    length = next(n for n in range(1, max(map(len, ends)) + 1) if len({end[-n:] for end in ends}) == len(ends))
    return {"/".join(end[-length:]): _log(path) for end, path in zip(ends, paths, strict=True)}


def score(trained: Trained, data: Prepared, part: str) -> NDArray[np.float32]:
    """The logits of a part of `data`, which must be encoded as the run's own."""
    if data.schema.fingerprint != trained.schema.fingerprint:
        raise UserError(f"{data.path} is encoded by another schema than {trained.path} was trained with")
    return loop.predict(trained.model, data.rows(part), part)


def measure(data: Prepared, part: str, logits: NDArray[np.float32], calibration: Calibration) -> dict[str, Any]:
    """The figures of a part; beside them, where the true probabilities are known, the AUC that these have.

    `bayes_auc` is of the probabilities themselves, `bayes_auc_blind` of the best guess without the ad's position.
    """
    rows = data.rows(part)
    figures = run_report.measure(rows, logits, calibration)
    for figure, name in (("bayes_auc", "true_ctr"), ("bayes_auc_blind", "true_ctr_blind")):
        truth = data.truth(part, name)
        if truth is not None:
            figures[figure] = metrics.auc(rows.label, truth)
    return figures


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
        except BlockingIOError as err:
            raise UserError(f"{path} is being trained by another process") from err
        except OSError:
            say(f"{path}: this file system has no locks; train in it with one process only")
        yield
    finally:
        os.close(folder)


@contextmanager
def _enough_memory(run: Run) -> Iterator[None]:
    try:
        yield
    except RuntimeError as err:  # torch has no type of its own for it
        if "allocate memory" not in str(err) and "overflow" not in str(err):
            raise
        what = str(err).splitlines()[0].rpartition("DefaultCPUAllocator: ")[2]
        raise UserError(f"not enough memory for {run.model} with these settings ({what})") from err


def _identity(data: Prepared) -> dict[str, str]:
    return {"data_hash": data.data_hash, "schema_fingerprint": data.schema.fingerprint}


def _begun(file: Path) -> tuple[Run, dict[str, str], int]:
    """What `begin` wrote down: the run, the data it saw, the threads it has."""
    config = json_of(file)
    try:
        seen = {name: str(config["data"][name]) for name in ("path", "data_hash", "schema_fingerprint")}
        return Run.from_json(config["run"]), seen, int(config["threads"])
    except (KeyError, TypeError, ValueError) as err:
        raise UserError(f"{file}: damaged ({err!r})") from err


def _build(run: Run, schema: Schema) -> CTRModel:
    try:
        return zoo.build(run.model, run.model_config, schema)
    except ValueError as err:
        raise UserError(str(err)) from err


def _schema(path: Path) -> Schema:
    try:
        return Schema.from_json((path / "schema.json").read_bytes())
    except (OSError, ValueError) as err:
        raise UserError(f"{path / 'schema.json'}: missing or damaged ({err})") from err


def _log(path: Path) -> list[dict[str, Any]]:
    file = path / "log.jsonl"
    if not file.exists():
        has = "no run" if not (path / "config.json").exists() else "a run without an evaluation yet"
        raise UserError(f"{path} holds {has} (it has no log.jsonl)")
    try:
        lines: list[dict[str, Any]] = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        for line in lines:
            [float(line[name]) for name in ("step", "loss", "valid_auc", "valid_logloss", "best")]
    except (OSError, ValueError, TypeError, KeyError) as err:
        raise UserError(f"{file}: damaged, or of a run before evaluations had steps ({err!r})") from err
    if not any(line["best"] for line in lines):
        raise UserError(f"{file}: damaged, expected the line of an evaluation whose weights were kept")
    return lines


def json_of(file: Path) -> dict[str, Any]:
    """A file of a run. Raises UserError where it is missing or holds no JSON object."""
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError) as err:
        raise UserError(f"{file}: missing or damaged ({err})") from err
    if not isinstance(content, dict):
        raise UserError(f"{file}: damaged (expected a JSON object)")
    return content
