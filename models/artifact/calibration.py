"""The probability contract: a model's raw logit to the click probability that bids are multiplied with."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field


class Calibration(BaseModel):
    """Platt scaling: p = sigmoid(slope * logit + intercept), fitted on the validation part.

    The slope is positive, so calibrating never changes a ranking (nor an AUC, ties included).
    Source: J. Platt, "Probabilistic outputs for support vector machines", 1999.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    slope: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    intercept: float = Field(default=0.0, allow_inf_nan=False)

    def __call__(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """Click probabilities, float64, of the logits' shape; strictly between 0 and 1."""
        z = self.slope * np.asarray(logits, dtype=np.float64) + self.intercept
        # np.clip takes longer than all else here.
        return 1.0 / (1.0 + np.exp(-np.maximum(np.minimum(z, _LIMIT), -_LIMIT)))


_LIMIT = 36.0  # beyond it sigmoid rounds to exactly 0 or 1 in double precision, and log loss to infinity
