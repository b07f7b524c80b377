"""What the traps' tests share: a check that must fail, and small models to hold laws to."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from models.features.arrays import Arrays
from models.layers.base import CTRModel
from tests.models.small import tensors, with_history

SCHEMA = with_history()


def caught(check: Callable[..., None], *wrong: Any, **options: Any) -> None:
    with pytest.raises(AssertionError):
        check(*wrong, **options)


def logits_of(model: CTRModel, arrays: Arrays) -> Any:
    with torch.no_grad():
        return model(tensors(arrays)).numpy()


def assert_equal(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
