"""How good the best possible model is, where the true click probabilities are known."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def expected_auc(scores: NDArray[Any], truth: NDArray[Any]) -> float:
    """The AUC of `scores` that labels drawn from `truth` have on average, ties counting half.

    It is E[number of rightly ordered (click, no click) pairs] / E[number of pairs], over pairs of two different rows.
    `expected_auc(truth, truth)` is the Bayes-optimal AUC: no scores have a higher one.
    """
    order = np.argsort(scores, kind="stable")
    p = np.asarray(truth, dtype=np.float64)[order]
    _, first = np.unique(np.asarray(scores)[order], return_index=True)
    clicks, misses = np.add.reduceat(p, first), np.add.reduceat(1 - p, first)
    of_itself = np.add.reduceat(p * (1 - p), first)  # a row makes no pair with itself
    below = np.cumsum(misses) - misses
    right = np.sum(clicks * below) + 0.5 * np.sum(clicks * misses - of_itself)
    pairs = p.sum() * (1 - p).sum() - np.sum(p * (1 - p))
    return float(right / pairs)


def expected_logloss(scores: NDArray[Any], truth: NDArray[Any]) -> float:
    """The log loss that `scores`, probabilities inside 0 and 1, have on average over labels drawn from `truth`.

    `expected_logloss(truth, truth)` is the entropy of the labels: no scores have a lower one.
    """
    q, p = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    return float(np.mean(-p * np.log(q) - (1 - p) * np.log1p(-q)))
