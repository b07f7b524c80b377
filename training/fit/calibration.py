"""Fit the probability contract: the slope and intercept that make validation logits into probabilities."""

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from models.artifact.calibration import Calibration
from training.evaluation.thinning import unthinned

# Validation data that the model separates perfectly, or ranks backwards, would ask for an infinite or a negative slope.
MIN_SLOPE, MAX_SLOPE = 1e-2, 1e2
MAX_STEPS = 100


def fit(
    logits: NDArray[np.floating],
    label: NDArray[np.floating],
    weight: NDArray[np.floating] | None = None,
    *,
    negative_rate: float = 1.0,
) -> Calibration:
    """The maximum-likelihood Platt map with a slope in [0.01, 100], by Newton's method.

    Never worse on these rows than the raw logits, whose map (slope 1, intercept 0) is among those it chooses from.
    Rows of one class only say nothing about a probability: the map is then the raw one. Of a log that kept a share
    `negative_rate` of its rows without a click, the map to the probabilities of the whole traffic: that of the rows
    as they are, with the exact correction behind it.
    """
    fitted, correction = _of_the_rows(logits, label, weight), unthinned(negative_rate)
    return Calibration(slope=fitted.slope, intercept=fitted.intercept + correction.intercept)


def _of_the_rows(
    logits: NDArray[np.floating], label: NDArray[np.floating], weight: NDArray[np.floating] | None
) -> Calibration:
    x = logits.astype(np.float64)
    share = np.full(len(x), 1 / len(x)) if weight is None else weight / np.sum(weight, dtype=np.float64)
    if len(np.unique(label[share > 0])) < 2:
        return Calibration()
    # Knowing nothing, every row has the click rate; from there Newton's steps are short enough to converge.
    rate = float(label @ share)
    start = np.array([0.0, np.log(rate / (1 - rate))])
    slope, intercept = _newton(x, label, share, start, free=(True, True))
    if not MIN_SLOPE <= slope <= MAX_SLOPE:  # convex, so the best allowed map lies on the bound that was crossed
        bound = np.clip(slope, MIN_SLOPE, MAX_SLOPE)
        slope, intercept = _newton(x, label, share, np.array([bound, -bound * (x @ share)]), free=(False, True))
    fitted = Calibration(slope=float(slope), intercept=float(intercept))
    return fitted if _loss(x, label, share, slope, intercept) <= _loss(x, label, share, 1.0, 0.0) else Calibration()


def _newton(
    x: NDArray[np.float64],
    label: NDArray[np.floating],
    share: NDArray[np.floating],
    start: NDArray[np.float64],
    *,
    free: tuple[bool, bool],
) -> NDArray[np.float64]:
    """Minimise the logloss over the free ones of (slope, intercept), halving any step that does not lower it."""
    at = start
    moves = np.array(free)
    loss = _loss(x, label, share, *at)
    for _ in range(MAX_STEPS):
        prob = expit(at[0] * x + at[1])
        error, bend = (prob - label) * share, prob * (1 - prob) * share
        gradient = np.array([error @ x, error.sum()])[moves]
        curvature = np.array([[bend @ (x * x), bend @ x], [bend @ x, bend.sum()]])[np.ix_(moves, moves)]
        # lstsq, because equal logits leave the slope undetermined and saturated ones leave no curvature.
        step = np.zeros(2)
        step[moves] = np.linalg.lstsq(curvature, gradient, rcond=1e-12)[0]
        for _ in range(60):
            trial_loss = _loss(x, label, share, *(at - step))
            if trial_loss < loss:
                break
            step /= 2
        else:
            return at
        gain, loss, at = loss - trial_loss, trial_loss, at - step
        if gain < 1e-13:
            return at
    return at


def _loss(
    x: NDArray[np.float64], label: NDArray[np.floating], share: NDArray[np.floating], slope: float, intercept: float
) -> float:
    z = slope * x + intercept
    return float((np.logaddexp(0, z) - label * z) @ share)
