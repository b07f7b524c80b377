"""Measurements in turns: every side once a round, in shuffled order, compared by ratios within a round.

A machine that changes its speed from one second to the next changes it for all sides of a round alike. What is left of
that is what two copies of the same side differ by.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Of per-round ratios."""

    median: float
    low: float  # first quartile
    high: float  # third quartile

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def run_rounds(
    names: Sequence[str], run: Callable[[str], T], num_rounds: int, *, draw: random.Random
) -> list[dict[str, T]]:
    """Each side's result in every round, in the order of `names`. One more round comes first and does not count."""
    rounds = []
    for _ in range(1 + num_rounds):
        found = {name: run(name) for name in draw.sample(names, len(names))}
        rounds.append({name: found[name] for name in names})
    return rounds[1:]


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Of two sides' results, round by round."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return Ratio(median=median, low=low, high=high)
