"""The project's proof in small: a model's answers over HTTP are its offline scores, on the same rows."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest

from service.store.local_server import RedisServer
from tests.service.running_process import started
from tests.trained_models import prepared_data, trained_and_exported

ROOT = Path(__file__).parents[2]
ARMS = [
    {"name": "mian", "model": "mian", "share": 50, "backend": "onnx"},
    {"name": "stec", "model": "stec", "share": 50, "backend": "torchscript"},
]
EXPERIMENT = {"experiment": "small", "salt": "s", "arms": ARMS}


def run(*arguments: str | Path, **environment: str) -> str:
    """One of the project's commands, as a user calls it."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A simulated log, the artifacts of two models that were trained a little on it, and their offline scores."""
    folder: Path = tmp_path_factory.mktemp("trained")
    (folder / "data").symlink_to(prepared_data(tmp_path_factory).path)
    for model in ("mian", "stec"):
        offline, written = trained_and_exported(tmp_path_factory, model)
        shutil.copytree(written.path.parent, folder / "artifacts" / model)
        run("-m", "training", "evaluate", offline.path, "--predictions", folder / f"{model}.parquet")
    return folder


@contextmanager
def serving(trained: Path, redis_url: str) -> Iterator[str]:
    # A test is in no hurry: on a busy machine the service must not answer without the store.
    patient = {"workers": 1, "store_timeout_ms": 5000, "timeout_ms": 20_000, "keep_behaviours_days": 36_500}
    with started(trained, trained / "artifacts", experiment=EXPERIMENT, redis_url=redis_url, **patient) as service:
        yield service.opened().url


def test_http_answers_have_the_offline_auc_of_the_same_rows(trained: Path, redis_url: str, session_redis: RedisServer):
    raw = trained / "data" / "raw"
    run("-m", "service", "load-features", "users", raw / "users.parquet", CLICKSERVE_REDIS_URL=redis_url)
    run("-m", "service", "load-features", "items", raw / "items.parquet", CLICKSERVE_REDIS_URL=redis_url)
    run("-m", "service", "load-behaviours", raw / "behaviours.parquet", CLICKSERVE_REDIS_URL=redis_url)
    files = [f"--offline={arm}={trained / arm}.parquet" for arm in ("mian", "stec")]
    answers = trained / "answers.parquet"

    with serving(trained, redis_url) as url:
        # Exits 1 where an AUC differs by more than 1e-6, or an answer was degraded.
        table = run("deploy/demo/replay.py", "--data", trained / "data", "--url", url, *files, "--out", answers)

    differences = [float(d) for d in re.findall(r"\d\.\de[-+]\d\d", table)]  # of the AUC and of any answer, each arm
    answered = pl.read_parquet(answers)
    assert len(differences) == 4
    assert max(differences) < 1e-5
    assert answered.height == pl.read_parquet(raw / "test.parquet").height
    assert set(answered["arm"]) == {"mian", "stec"}


def test_the_replay_tells_when_the_service_knows_another_past(trained: Path, redis_url: str):
    files = [f"--offline={arm}={trained / arm}.parquet" for arm in ("mian", "stec")]
    command = [sys.executable, "deploy/demo/replay.py", f"--data={trained / 'data'}", *files]

    with serving(trained, redis_url) as url:  # nothing was loaded into the store
        done = subprocess.run([*command, f"--url={url}"], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 1, done.stdout + done.stderr
