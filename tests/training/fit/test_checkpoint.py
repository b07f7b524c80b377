import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import zoo
from tests.training.tiny import KILLED
from training.__main__ import main
from training.data.batches import Prepared
from training.errors import UserError
from training.fit import checkpoint
from training.fit.checkpoint import State

pytestmark = pytest.mark.usefixtures("undrawn_runs")
SETTINGS = ["max_epochs=3", "patience=9", "batch_size=50", "checkpoint_s=0", "ema_decay=0.9"]
SETTINGS += ["model.dropout=0.2", "model.emb_dim=8"]
EVERY = {"by epoch": [], "by steps": ["eval_every_steps=17", "plateau_monitor=logloss"]}  # 24 steps an epoch
KILLS = {"by epoch": [13, 41], "by steps": [41]}  # before so many files, counted anew each time


def command(data, run, *more):
    return ["train", "stec", "--data", str(data), "--out", str(run), "--threads", "1", "--set", *SETTINGS, *more]


@pytest.fixture(scope="module")
def uninterrupted_runs(data, tmp_path_factory):
    runs = {every: tmp_path_factory.mktemp("runs") / every for every in EVERY}
    for every, run in runs.items():
        assert main(command(data, run, *EVERY[every])) == 0
    return runs


@pytest.fixture(scope="module")
def uninterrupted(uninterrupted_runs):
    return uninterrupted_runs["by epoch"]


def assert_same_run(torn, uninterrupted):
    for name in ("weights.safetensors", "calibration.json", "config.json"):
        assert (torn / name).read_bytes() == (uninterrupted / name).read_bytes()
    logs = [
        [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (torn, uninterrupted)
    ]
    torn_log, uninterrupted_log = ([{k: v for k, v in e.items() if not k.endswith("_s")} for e in log] for log in logs)
    assert torn_log == uninterrupted_log
    assert not (torn / "checkpoint.pt").exists()


@pytest.mark.parametrize("every", EVERY)
def test_a_run_killed_inside_an_epoch_once_or_twice_ends_with_the_weights_of_one_left_alone(
    data, uninterrupted_runs, tmp_path, every
):
    torn = command(data, tmp_path / "torn", *EVERY[every], "--resume")
    for after in KILLS[every]:
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(after), *torn],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL

    assert main(torn) == 0

    assert_same_run(tmp_path / "torn", uninterrupted_runs[every])


def test_a_run_interrupted_at_every_file_it_writes_ends_the_same_too(data, uninterrupted, tmp_path, monkeypatch):
    rename, names = Path.replace, set()

    def interrupt_once_per_name(path, target):
        if target.name not in names:
            names.add(target.name)
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", interrupt_once_per_name)

    codes = [main(command(data, tmp_path / "torn", "--resume")) for _ in range(8)]

    written = {"config.json", "schema.json", "checkpoint.pt", "log.jsonl", "weights.safetensors", "calibration.json"}
    assert names == written | {"metrics.json"}
    assert codes == [130] * 7 + [0]
    assert_same_run(tmp_path / "torn", uninterrupted)


def test_a_full_disk_is_told_with_the_file(data, tmp_path, monkeypatch):
    """Torch has words of its own for it."""

    def full(*_args):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 67968 vs 67856")

    monkeypatch.setattr(torch, "save", full)
    model = zoo.build("lr", {}, Prepared.open(data).schema)

    with pytest.raises(UserError, match=r"c.pt.tmp: cannot be written, is the disk full\?"):
        checkpoint.save(tmp_path / "c.pt", model, torch.optim.Adam(model.parameters()), State())


def test_a_checkpoint_gives_back_model_optimiser_random_numbers_and_position(data, tmp_path):
    schema = Prepared.open(data).schema
    model = zoo.build("lr", {}, schema)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.125)
    torch.stack([p.sum() for p in model.parameters()]).sum().backward()
    optimizer.step()
    state = State(step=14, loss_sum=0.5, best=0.7, bad_evals=1, log=[{"step": 12, "auc": 0.7, "best": True}])
    checkpoint.save(tmp_path / "c.pt", model, optimizer, state)
    drawn = torch.rand(3)

    other = zoo.build("lr", {}, schema)
    its_optimizer = torch.optim.Adam(other.parameters(), lr=9.0)
    found = checkpoint.load(tmp_path / "c.pt", other, its_optimizer)

    assert found == state
    assert torch.equal(torch.rand(3), drawn)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert its_optimizer.param_groups[0]["lr"] == 0.125
    assert list(its_optimizer.state) == list(other.parameters())


def test_a_checkpoint_that_runs_code_is_refused(data, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    model = zoo.build("lr", {}, Prepared.open(data).schema)
    torch.save({"model": Evil()}, tmp_path / "c.pt")

    with pytest.raises(UserError, match="not a checkpoint of this model"):
        checkpoint.load(tmp_path / "c.pt", model, torch.optim.Adam(model.parameters()))

    assert not (tmp_path / "evil").exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "f"
    checkpoint.write_atomically(file, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(file, b"new")

    assert file.read_bytes() == b"old"
