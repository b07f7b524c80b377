"""Capacity search: the knee, the highest request rate at which a service keeps its latency bound."""

from collections.abc import Callable

from loadtest.errors import BenchError

STEP = 1.3  # from one rate to the next until the knee lies between two
TOLERANCE = 0.04  # of the knee
LOWEST = 10.0  # requests a second


def find_knee(holds: Callable[[float], bool], holds_for_long: Callable[[float], bool], *, start: float) -> float:
    """The highest rate found to hold, in a short window and for long; one up to TOLERANCE above it does not.

    A rate is given up only when it fails twice: on a machine with other work a short window can be spoilt. As that also
    lets through rates that were lucky, the one found has to hold for long too, and is lowered until one does. Raises
    BenchError where not even the lowest rate holds.
    """

    def holds_once_in_two(rate: float) -> bool:
        return holds(rate) or holds(rate)

    good, bad = 0.0, 0.0
    rate = max(start, LOWEST)
    while not (good and bad):
        if holds_once_in_two(rate):
            good, rate = rate, rate * STEP
        elif rate <= LOWEST:
            raise _no_knee()
        else:
            bad, rate = rate, max(rate / STEP, LOWEST)
    while bad > good * (1 + TOLERANCE):
        middle = (good * bad) ** 0.5
        if holds_once_in_two(middle):
            good = middle
        else:
            bad = middle
    while not holds_for_long(good):
        if good <= LOWEST:
            raise _no_knee()
        good = max(good / (1 + TOLERANCE), LOWEST)
    return good


def _no_knee() -> BenchError:
    return BenchError(f"not even {LOWEST:g} requests a second are answered within the bound: there is no knee")
