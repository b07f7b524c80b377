"""Real data sets, which stand beside the project and never in it: ../shared/data from its root."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "shared" / "data"


def real(name: str) -> Path:
    """The folder of a data set; the test that asks for it is skipped where there is none."""
    folder = ROOT / name
    if not folder.is_dir():
        pytest.skip(f"needs the real data in ../shared/data/{name}, beside the project")
    return folder
