"""Where a training run stands, on disk: enough to go on from there to the same weights, bit by bit."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.errors import UserError


@dataclass(kw_only=True)
class State:
    """Where a run stands between two steps."""

    step: int = 0
    """Optimiser steps done, over all epochs."""
    loss_sum: float = 0.0
    """Sum of the losses of the steps since the last evaluation."""
    train_s: float = 0.0
    best: float | None = None
    bad_evals: int = 0
    """Evaluations in a row, up to now, without a better validation figure."""
    plateau_best: float | None = None
    plateau_bad_evals: int = 0
    """The same of the figure that lowers the learning rate, since it last fell."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """One line per evaluation."""
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def evaluated_step(self) -> int:
        """The step of the last evaluation; 0 before the first."""
        return int(self.log[-1]["step"]) if self.log else 0

    @property
    def best_evaluation(self) -> dict[str, Any]:
        """The log's line of the evaluation that `best_weights` are of."""
        return next(line for line in reversed(self.log) if line["best"])


def save(
    path: Path, model: nn.Module, optimizer: Optimizer, state: State, *, averaged: nn.Module | None = None
) -> None:
    """Replace the checkpoint at `path`. Killed at any moment, the file is the old one or the new one, whole."""
    contents = {
        "model": model.state_dict(),
        "averaged": None if averaged is None else averaged.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        # Not asdict: it would copy the best weights once more.
        "state": {f.name: getattr(state, f.name) for f in fields(state)},
    }
    draft = path.with_name(path.name + ".tmp")
    with draft.open("wb") as file:
        try:
            torch.save(contents, file)
        except RuntimeError as err:  # what torch makes of a disk that is full
            raise UserError(f"{draft}: cannot be written, is the disk full? ({str(err).splitlines()[0]})") from err
        file.flush()
        os.fsync(file.fileno())
    _rename(draft, path)


def load(path: Path, model: nn.Module, optimizer: Optimizer, *, averaged: nn.Module | None = None) -> State:
    """Put models, optimiser and random numbers back to where `save` found them. Runs no code from the file."""
    try:
        contents: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(contents["model"])
        if averaged is not None:
            averaged.load_state_dict(contents["averaged"])
        optimizer.load_state_dict(contents["optimizer"])
        torch.set_rng_state(contents["rng"])
        return State(**contents["state"])
    except Exception as err:  # torch.load has no common base for what a damaged file raises
        raise UserError(f"{path}: not a checkpoint of this model ({type(err).__name__}: {err})") from err


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is never seen half written."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _rename(draft, path)


def _rename(draft: Path, path: Path) -> None:
    draft.replace(path)
    # The new name itself is on disk only once its folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
