"""Every model of the zoo, trained by its recipe on one small simulated log and exported, once a run for all tests."""

from pathlib import Path

import pytest
import torch

from models.artifact import folder as artifact
from models.artifact.folder import Artifact
from tests.shared_folder import shared_folder
from tests.training.tiny import without_pictures
from training.data.batches import Prepared
from training.data.prepare import prepare
from training.datasets import simulated
from training.fit import run_folder
from training.fit.run_folder import Trained
from training.run_export import export_run
from training.simulator.simulate import simulate

# Exports take most of the time, more with every field and with every click that DIEN steps through: DeepFM's 3 s and
# DIEN's 7 s of CPU with these, 5 s and 23 s with all the fields and 20 clicks of a simulated log.
FIELDS = ("user_id", "gender", "hour", "device", "ad_id", "price", "tags")
HISTORY_LENGTH = 3
BRIEF = ("max_epochs=1", "batch_size=64", "lr=0.02")
# What a model has only if it is asked for. MIAN's weights start near zero: only longer steps make each of them matter.
OPTIONS = {
    "mian": ("lr=0.05", "model.cross_layers=1"),
    "finalmlp": ("model.heads=2", "model.gate_1=user", "model.gate_2=item"),
    **dict.fromkeys(("din", "dien", "dmr", "bst"), ("model.age_buckets=8",)),
}


def prepared_data(temp: pytest.TempPathFactory) -> Prepared:
    """A simulated log with a field of every kind in it, and a sequence of each kind that has one."""

    def make(folder: Path) -> None:
        fields = tuple(f for f in simulated.SPEC.fields if f.name in FIELDS)
        simulate(folder / "log", users=60, items=40, rows=2000, seed=3)
        with pytest.MonkeyPatch.context() as patch:
            small = {"fields": fields, "history_length": HISTORY_LENGTH}
            patch.setattr(simulated, "SPEC", simulated.SPEC.model_copy(update=small))
            prepare("simulated", folder / "log", folder / "data")

    return Prepared.open(shared_folder(temp, "simulated", make) / "data")


def trained_and_exported(temp: pytest.TempPathFactory, name: str) -> tuple[Trained, Artifact]:
    """The run and its artifact, which lies in a folder of artifacts beside the run's."""
    data = prepared_data(temp)

    def make(folder: Path) -> None:
        settings = (*BRIEF, *OPTIONS.get(name, ()))
        run = run_folder.begin(folder / "run", data, name, None, settings, resume=False)
        try:
            with without_pictures():
                run_folder.train(folder / "run", data, run)
        finally:
            torch.use_deterministic_algorithms(mode=False)
        export_run(run_folder.read(folder / "run"), folder / "artifacts")

    folder = shared_folder(temp, name, make)
    return run_folder.read(folder / "run"), artifact.read(artifact.resolve(folder / "artifacts", name))
