"""How sure a difference of AUC is: would other seeds change it, would other test rows?

Two doubts, two tests; neither answers for the other, so a difference is to be believed where both p-values are small.
Neither is corrected for how many models are compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from training.evaluation.metrics import Vector

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Difference:
    """First minus second. `low` and `high` bound its 95 % interval; `p` is two-sided, against there being none.

    The three are None where what was seen does not vary, or is too little to tell.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = _t_quantile(len(values)) * _standard_error(values)
    mean = float(np.mean(values))
    return mean - half, mean + half


def over_seeds(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The paired t-test of one figure of two models, pair by pair of one seed: would other seeds change the order?

    `p` is how often seeds alone would part two models of equal mean by as much, on these very test rows. It takes the
    differences for normal; with three to five pairs that is an assumption, not a finding.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    value = float(np.mean(differences))
    bounds = interval(differences)
    error = _standard_error(differences) if bounds else 0.0
    if bounds is None or error == 0:
        return Difference(value=value)
    p = 2 * float(stats.t.sf(abs(value) / error, len(differences) - 1))
    return Difference(value=value, low=bounds[0], high=bounds[1], p=p)


def placements(label: Vector, scores: Sequence[Vector]) -> NDArray[np.float64]:
    """Each row's placement, the mean over several scorings: the share of the other class that it is ordered rightly to.

    A tie counts one half. The mean placement of the clicks, and that of the others, is the scorings' mean AUC. By
    midranks in one sort each: X. Sun and W. Xu, "Fast Implementation of DeLong's Algorithm for Comparing the Areas
    Under Correlated Receiver Operating Characteristic Curves", IEEE Signal Processing Letters 21(11), 2014.
    """
    click = label > 0.5
    num_clicks, num_others = int(click.sum()), int((~click).sum())
    total = np.zeros(len(label))
    for score in scores:
        among_all = stats.rankdata(score)
        total[click] += (among_all[click] - stats.rankdata(score[click])) / num_others
        total[~click] += 1 - (among_all[~click] - stats.rankdata(score[~click])) / num_clicks
    return total / len(scores)


def over_rows(
    label: Vector, first: NDArray[np.float64], second: NDArray[np.float64], group: NDArray[np.integer]
) -> Difference:
    """The test of DeLong et al. between two models' `placements` on the same rows: would other test rows change it?

    `p` is how often the draw of the test rows alone would part two trained models of equal true AUC by as much. With
    the placements of several seeds the two are the mean AUCs over those seeds, a contrast of as many correlated AUCs:
    E. DeLong, D. DeLong and D. Clarke-Pearson, "Comparing the Areas under Two or More Correlated Receiver Operating
    Characteristic Curves", Biometrics 44, 1988. Scores are not averaged: that would judge an ensemble nobody serves.

    Rows of one `group` (a user) are alike, so groups count as drawn, not rows: N. Obuchowski, "Nonparametric Analysis
    of Clustered ROC Curve Data", Biometrics 53, 1997. Rows of group -1 stand for themselves, and where all do this
    is DeLong's own variance.
    """
    click = label > 0.5
    difference = first - second
    value = float(difference[click].mean())
    alone = group < 0
    of_row = np.where(alone, int(group.max()) + 1 + np.cumsum(alone), group)
    _, cluster = np.unique(of_row, return_inverse=True)
    pulls, counts = [], []
    for rows in (click, ~click):
        pulls.append(np.bincount(cluster[rows], difference[rows] - value, cluster.max() + 1) / rows.sum())
        counts.append(len(np.unique(cluster[rows])))
    if min(counts) < 2:
        return Difference(value=value)
    both = len(pulls[0])
    variance = sum(n / (n - 1) * float(pull @ pull) for n, pull in zip(counts, pulls, strict=True))
    variance += 2 * both / (both - 1) * float(pulls[0] @ pulls[1])
    if variance <= 0:
        return Difference(value=value)
    error = math.sqrt(variance)
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * error
    return Difference(value=value, low=value - half, high=value + half, p=2 * float(stats.norm.sf(abs(value) / error)))


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _t_quantile(num: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, num - 1))
