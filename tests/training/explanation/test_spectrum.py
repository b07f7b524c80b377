"""The singular values of a DynInt's weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.artifact.calibration import Calibration
from tests.models.small import lively, without_history
from training.config import Run
from training.errors import UserError
from training.explanation.spectrum import rank_of, spectrum
from training.fit.run_folder import Trained

SCHEMA = without_history()
OPTIONS = {"emb_dim": 4, "subspaces": 2, "layers": 2, "kernel_size": 3}


def trained(name: str, **options: Any) -> Trained:
    return Trained(
        path=Path("runs/some"),
        run=Run(model=name, batch_size=2, lr=1.0, max_epochs=1, patience=1),
        data=Path("data"),
        data_hash="",
        schema=SCHEMA,
        model=lively(name, SCHEMA, **options),
        calibration=Calibration(),
        metrics={},
    )


@pytest.mark.parametrize("mode", ["pin", "da", "dgp", "dwp"])
def test_a_spectrum_has_the_energy_of_the_weights_and_no_more_values_than_their_rank(mode, tmp_path):
    run = trained("dynint", **OPTIONS, mode=mode)

    numbers, picture = spectrum(run, tmp_path / "out")

    weights: Any = run.model.maps.shared_weights().detach().numpy()  # type: ignore[union-attr,operator]
    layers = json.loads(numbers.read_text())["layers"]
    assert len(layers) == len(weights) == 2
    for layer, matrix in zip(layers, weights, strict=True):
        values = np.array(layer["singular_values"])
        assert (values**2).sum() == pytest.approx((matrix**2).sum())
        assert (values > 1e-9 * values[0]).sum() == (3 if mode == "dgp" else len(matrix))
        assert 1 <= layer["rank_of_90_percent"] <= len(matrix)
    with Image.open(picture) as image:
        assert min(image.size) > 300


def test_the_weights_of_dgp_are_its_directions_at_strengths_of_one():
    maps: Any = lively("dynint", SCHEMA, **OPTIONS, mode="dgp").maps

    expected = sum(torch.einsum("lp,lq->lpq", maps.left_LKP[:, k], maps.right_LKP[:, k]) for k in range(3))

    torch.testing.assert_close(maps.shared_weights(), expected)


def test_a_rank_is_counted_from_the_largest_value():
    assert [rank_of(np.array([3.0, 1.0, 0.0]), share) for share in (0.9, 0.91, 1.0)] == [1, 2, 2]
    assert rank_of(np.zeros(3), 0.9) == 0


@pytest.mark.parametrize(("name", "options"), [("lr", {}), ("dynint", {"layers": 0})])
def test_a_model_without_such_weights_is_refused(name, options, tmp_path):
    with pytest.raises(UserError, match=f"expected a run of dynint with layers, got {name} without"):
        spectrum(trained(name, **options), tmp_path)
