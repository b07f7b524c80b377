"""How good predicted probabilities are: ranking, likelihood and calibration, each in one sorted pass.

Where rows have weights, every figure is what it would be if each row stood there `weight` times.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.floating] | NDArray[np.integer]

CLIP = 1e-7  # log(0) would let one row decide the whole figure
NUM_BINS = 20


def auc(label: Vector, score: Vector, weight: Vector | None = None) -> float:
    """The chance that a click is scored above a non-click, a tie counting one half. NaN unless both classes occur."""
    return gauc(label, score, np.zeros(len(label), dtype=np.int64), weight).value


@dataclass(frozen=True, kw_only=True)
class Gauc:
    """The impression-weighted mean of the groups' AUCs. A group without both a click and a non-click has none."""

    value: float
    num_groups: int
    num_left_out: int


def gauc(label: Vector, score: Vector, group: NDArray[np.integer], weight: Vector | None = None) -> Gauc:
    """AUC inside each group (a user), weighted by the group's rows; NaN when no group has both classes."""
    if len(label) == 0:
        return Gauc(value=math.nan, num_groups=0, num_left_out=0)
    order = np.lexsort((score, group))
    click, score, group = label[order] > 0.5, score[order], group[order]
    group_starts = _run_starts(group[1:] != group[:-1])
    tie_starts = _run_starts((group[1:] != group[:-1]) | (score[1:] != score[:-1]))

    # Twice the number of rightly ordered pairs, a tie counting one: without weights whole numbers, hence exact.
    amount = None if weight is None else weight[order].astype(np.float64)
    clicks, others = _sums(click, tie_starts, amount), _sums(~click, tie_starts, amount)
    group_of_tie = np.searchsorted(group_starts, tie_starts, side="right") - 1
    first_tie = np.searchsorted(tie_starts, group_starts)
    before = np.cumsum(others) - others
    before -= before[first_tie][group_of_tie]
    twice_won = np.add.reduceat(clicks * (2 * before + others), first_tie)

    clicks, others = _sums(click, group_starts, amount), _sums(~click, group_starts, amount)
    both = (clicks > 0) & (others > 0)
    left_out = len(both) - int(both.sum())
    if left_out == len(both):
        return Gauc(value=math.nan, num_groups=0, num_left_out=left_out)
    aucs = twice_won[both] / (2 * clicks[both] * others[both])
    value = float(np.average(aucs, weights=(clicks + others)[both]))
    return Gauc(value=value, num_groups=int(both.sum()), num_left_out=left_out)


def logloss(label: Vector, prob: Vector, weight: Vector | None = None) -> float:
    """Mean negative log-likelihood in nats, probabilities clipped to [1e-7, 1 - 1e-7]."""
    prob = np.clip(prob.astype(np.float64), CLIP, 1 - CLIP)
    return float(-np.average(np.where(label > 0.5, np.log(prob), np.log1p(-prob)), weights=weight))


def normalised_entropy(label: Vector, prob: Vector, weight: Vector | None = None) -> float:
    """Logloss over that of always predicting the parts' click rate: below 1 is better than knowing nothing."""
    rate = float(np.average(label.astype(np.float64), weights=weight))
    if rate in (0.0, 1.0):
        return math.nan
    return logloss(label, prob, weight) / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))


def calibration_ratio(label: Vector, prob: Vector, weight: Vector | None = None) -> float:
    """Predicted clicks over clicks: above 1 bids too much. NaN without clicks."""
    amount = 1.0 if weight is None else weight.astype(np.float64)
    clicks = float(np.sum(label * amount, dtype=np.float64))
    return float(np.sum(prob * amount, dtype=np.float64)) / clicks if clicks else math.nan


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Bins of nearly equal weight by predicted probability: how many rows, what was predicted, what came."""

    count: NDArray[np.int64] | NDArray[np.float64]
    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]

    @property
    def error(self) -> float:
        """Expected calibration error: |predicted - observed| of each bin, weighted by its rows."""
        return float(np.average(np.abs(self.predicted - self.observed), weights=self.count))


def reliability(
    label: Vector, prob: Vector, num_bins: int = NUM_BINS, weight: NDArray[np.float64] | None = None
) -> Reliability:
    """Bins by quantile, since click rates crowd near 0. Equal predictions share a bin, so there may be fewer bins."""
    shares = np.linspace(0, 1, num_bins + 1)[1:-1]
    edges = np.unique(np.quantile(prob, shares, method="inverted_cdf", weights=weight))
    bin_of_row = np.searchsorted(edges, prob, side="left")
    count = np.bincount(bin_of_row, weights=weight)
    held = count > 0
    amount = 1.0 if weight is None else weight
    predicted = np.bincount(bin_of_row, weights=prob * amount)[held] / count[held]
    observed = np.bincount(bin_of_row, weights=label * amount)[held] / count[held]
    return Reliability(count=count[held], predicted=predicted, observed=observed)


def _run_starts(changes: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.concatenate(([0], np.flatnonzero(changes) + 1))


def _sums(
    flags: NDArray[np.bool_], starts: NDArray[np.int64], amount: NDArray[np.float64] | None
) -> NDArray[np.int64] | NDArray[np.float64]:
    values: NDArray[Any] = flags.astype(np.int64) if amount is None else flags * amount
    sums: NDArray[Any] = np.add.reduceat(values, starts)
    return sums
