"""How good predicted probabilities are: ranking, likelihood and calibration, each in one sorted pass."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.floating] | NDArray[np.integer]

CLIP = 1e-7  # log(0) would let one row decide the whole figure
NUM_BINS = 20


def auc(label: Vector, score: Vector) -> float:
    """The chance that a click is scored above a non-click, a tie counting one half. NaN unless both classes occur."""
    return gauc(label, score, np.zeros(len(label), dtype=np.int64)).value


@dataclass(frozen=True, kw_only=True)
class Gauc:
    """The impression-weighted mean of the groups' AUCs. A group without both a click and a non-click has none."""

    value: float
    num_groups: int
    num_left_out: int


def gauc(label: Vector, score: Vector, group: NDArray[np.integer]) -> Gauc:
    """AUC inside each group (a user), weighted by the group's rows; NaN when no group has both classes."""
    if len(label) == 0:
        return Gauc(value=math.nan, num_groups=0, num_left_out=0)
    order = np.lexsort((score, group))
    click, score, group = label[order] > 0.5, score[order], group[order]
    group_starts = _run_starts(group[1:] != group[:-1])
    tie_starts = _run_starts((group[1:] != group[:-1]) | (score[1:] != score[:-1]))

    # Twice the number of rightly ordered pairs, a tie counting one: whole numbers, hence exact.
    clicks, others = _sums(click, tie_starts), _sums(~click, tie_starts)
    group_of_tie = np.searchsorted(group_starts, tie_starts, side="right") - 1
    first_tie = np.searchsorted(tie_starts, group_starts)
    before = np.cumsum(others) - others
    before -= before[first_tie][group_of_tie]
    twice_won = np.add.reduceat(clicks * (2 * before + others), first_tie)

    clicks, others = _sums(click, group_starts), _sums(~click, group_starts)
    both = (clicks > 0) & (others > 0)
    left_out = len(both) - int(both.sum())
    if left_out == len(both):
        return Gauc(value=math.nan, num_groups=0, num_left_out=left_out)
    aucs = twice_won[both] / (2 * clicks[both] * others[both])
    value = float(np.average(aucs, weights=(clicks + others)[both]))
    return Gauc(value=value, num_groups=int(both.sum()), num_left_out=left_out)


def logloss(label: Vector, prob: Vector) -> float:
    """Mean negative log-likelihood in nats, probabilities clipped to [1e-7, 1 - 1e-7]."""
    prob = np.clip(prob.astype(np.float64), CLIP, 1 - CLIP)
    return float(-np.mean(np.where(label > 0.5, np.log(prob), np.log1p(-prob))))


def normalised_entropy(label: Vector, prob: Vector) -> float:
    """Logloss over that of always predicting the parts' click rate: below 1 is better than knowing nothing."""
    rate = float(np.mean(label, dtype=np.float64))
    if rate in (0.0, 1.0):
        return math.nan
    return logloss(label, prob) / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))


def calibration_ratio(label: Vector, prob: Vector) -> float:
    """Predicted clicks over clicks: above 1 bids too much. NaN without clicks."""
    clicks = float(np.sum(label, dtype=np.float64))
    return float(np.sum(prob, dtype=np.float64)) / clicks if clicks else math.nan


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Bins of nearly equal count by predicted probability: how many rows, what was predicted, what came."""

    count: NDArray[np.int64]
    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]

    @property
    def error(self) -> float:
        """Expected calibration error: |predicted - observed| of each bin, weighted by its rows."""
        return float(np.average(np.abs(self.predicted - self.observed), weights=self.count))


def reliability(label: Vector, prob: Vector, num_bins: int = NUM_BINS) -> Reliability:
    """Bins by quantile, since click rates crowd near 0. Equal predictions share a bin, so there may be fewer bins."""
    edges = np.unique(np.quantile(prob, np.linspace(0, 1, num_bins + 1)[1:-1], method="inverted_cdf"))
    bin_of_row = np.searchsorted(edges, prob, side="left")
    count = np.bincount(bin_of_row)
    held = count > 0
    predicted = np.bincount(bin_of_row, weights=prob)[held] / count[held]
    observed = np.bincount(bin_of_row, weights=label)[held] / count[held]
    return Reliability(count=count[held], predicted=predicted, observed=observed)


def _run_starts(changes: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.concatenate(([0], np.flatnonzero(changes) + 1))


def _sums(flags: NDArray[np.bool_], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.add.reduceat(flags.astype(np.int64), starts)
