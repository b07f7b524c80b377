"""When requests are due, how many candidates they hold and who is in them: drawn before a run begins."""

import math

import numpy as np
from numpy.typing import NDArray

SPREAD = 0.7  # of the logarithm of a request's candidates: with a median of 100, one in a hundred has over 500


def poisson(rate: float, seconds: float, draw: np.random.Generator) -> NDArray[np.float64]:
    """The times, in seconds from the start, at which requests are due: independent gaps of mean 1 / rate."""
    expected = rate * seconds
    due_s = np.cumsum(draw.exponential(1 / rate, size=int(expected + 5 * math.sqrt(expected)) + 10))
    while due_s[-1] < seconds:
        due_s = np.append(due_s, due_s[-1] + np.cumsum(draw.exponential(1 / rate, size=len(due_s))))
    return due_s[due_s < seconds]


def lognormal(num: int, draw: np.random.Generator, *, median: int, cap: int) -> NDArray[np.int64]:
    """Whole numbers from 1 to `cap`; the few that would be larger are `cap`."""
    drawn = np.rint(draw.lognormal(math.log(median), SPREAD, size=num))
    return np.clip(drawn, 1, cap).astype(np.int64)


class Zipf:
    """Ranks from 0, the rank r with a probability proportional to 1 / (r + 1) ** exponent."""

    def __init__(self, num: int, exponent: float) -> None:
        self._log_weights = -exponent * np.log(np.arange(1, num + 1))
        weights = np.exp(self._log_weights)
        self._cumulated = np.cumsum(weights) / weights.sum()

    def __len__(self) -> int:
        return len(self._cumulated)

    def draw(self, num: int, draw: np.random.Generator) -> NDArray[np.int64]:
        return np.minimum(np.searchsorted(self._cumulated, draw.random(num), side="right"), len(self) - 1)

    def distinct(self, num: int, draw: np.random.Generator) -> NDArray[np.int64]:
        """`num` different ranks, in any order: an auction names an ad once. All and some again if there are fewer."""
        if num > len(self):
            return np.concatenate([np.arange(len(self)), self.draw(num - len(self), draw)])
        # The largest of log weight + Gumbel noise are a draw without replacement (Efraimidis and Spirakis 2006).
        noisy = self._log_weights + draw.gumbel(size=len(self))
        return draw.permutation(np.argpartition(noisy, len(self) - num)[len(self) - num :])
