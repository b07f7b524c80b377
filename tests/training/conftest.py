import pytest

from tests.training.tiny import without_pictures, write_prepared


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small prepared folder."""
    return write_prepared(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def undrawn_runs():
    with without_pictures():
        yield
