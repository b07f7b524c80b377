"""Which arm is better, and how sure: click-through rates compared with the user, not the impression, as the unit."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class ClickRate:
    """One arm's click-through rate: clicks over impressions, and the variance of that ratio between users."""

    rate: float
    variance: float
    num_users: int
    num_impressions: int
    num_clicks: int


@dataclass(frozen=True, kw_only=True)
class Lift:
    """The treatment's rate relative to the control's: +0.02 is two per cent more clicks per impression.

    `low` and `high` bound the 95 % interval of one look at a moment fixed beforehand: looking every day and stopping
    at the first good day makes it mean much less. `probability` is that of the treatment being the better one.
    """

    relative: float
    low: float
    high: float
    probability: float


def click_rate(impressions: NDArray[Any], clicks: NDArray[Any]) -> ClickRate:
    """The rate from each user's impressions and clicks, with the delta-method variance of a ratio of means.

    A user's impressions depend on each other; counting each as independent would declare far too many winners
    (A. Deng et al., "Applying the delta method in metric analytics", KDD 2018, section 3). Needs two users, one click.
    """
    k, c = np.asarray(impressions, np.float64), np.asarray(clicks, np.float64)
    if len(k) < 2 or c.sum() == 0:
        raise ValueError(f"a click rate needs two users and one click, got {len(k)} users and {int(c.sum())} clicks")
    rate = c.sum() / k.sum()
    variance = float(np.var(c - rate * k, ddof=1) / (len(k) * k.mean() ** 2))
    return ClickRate(
        rate=float(rate),
        variance=variance,
        num_users=len(k),
        num_impressions=int(k.sum()),
        num_clicks=int(c.sum()),
    )


def lift(control: ClickRate, treatment: ClickRate) -> Lift:
    """How much better the treatment is, on the log scale, where the interval is symmetric."""
    log_ratio = math.log(treatment.rate / control.rate)
    error = math.sqrt(treatment.variance / treatment.rate**2 + control.variance / control.rate**2)
    return Lift(
        relative=math.expm1(log_ratio),
        low=math.expm1(log_ratio - 1.959964 * error),
        high=math.expm1(log_ratio + 1.959964 * error),
        probability=0.5 * (1 + math.erf(log_ratio / error / math.sqrt(2))) if error > 0 else 0.5,
    )
