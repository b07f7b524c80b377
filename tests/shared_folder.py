"""A folder that several tests read and none writes: made once a run, whichever of pytest's processes asks first."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(temp: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name, after `make` has filled it."""
    # Under xdist every process has a folder of its own in the run's.
    run = temp.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else temp.getbasetemp()
    folder = run / "shared" / name.replace(" ", "_")
    folder.parent.mkdir(exist_ok=True)
    finished = folder / "finished"
    with FileLock(f"{folder}.lock"):
        if not finished.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            finished.touch()
    return folder
