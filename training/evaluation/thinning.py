"""A log that kept only a share of its rows without a click, and what its model says about the whole traffic."""

import math

from models.artifact.calibration import Calibration


def unthinned(negative_rate: float) -> Calibration:
    """The map from the logits of a model of the thinned log to click probabilities of the whole traffic.

    Dropping rows without a click multiplies the odds of one by 1 / negative_rate, so its logarithm comes off the logit:
    exact for every row. Source: G. King, L. Zeng, "Logistic regression in rare events data", 2001, section 4.1.
    """
    return Calibration(intercept=math.log(negative_rate))
