"""The knee: the highest rate at which a service keeps its promise."""

from collections.abc import Callable

from loadtest.errors import BenchError

STEP = 1.3  # from one rate to the next until the knee lies between two
TOLERANCE = 0.04  # of the knee
LOWEST = 10.0  # requests a second


def find_knee(holds: Callable[[float], bool], lasts: Callable[[float], bool], *, start: float) -> float:
    """The highest rate found to hold, which also lasts; one up to TOLERANCE above it does not.

    A rate is given up only when it fails twice: on a machine with other work a short window can be spoilt. As that also
    lets through rates that were lucky, the one found has to last for a whole run, and falls until one does. Raises
    BenchError where not even the lowest rate holds.
    """

    def stands(rate: float) -> bool:
        return holds(rate) or holds(rate)

    good, bad = 0.0, 0.0
    rate = max(start, LOWEST)
    while not (good and bad):
        if stands(rate):
            good, rate = rate, rate * STEP
        elif rate <= LOWEST:
            raise _no_knee()
        else:
            bad, rate = rate, max(rate / STEP, LOWEST)
    while bad > good * (1 + TOLERANCE):
        middle = (good * bad) ** 0.5
        if stands(middle):
            good = middle
        else:
            bad = middle
    while not lasts(good):
        if good <= LOWEST:
            raise _no_knee()
        good = max(good / (1 + TOLERANCE), LOWEST)
    return good


def _no_knee() -> BenchError:
    return BenchError(f"not even {LOWEST:g} requests a second are answered within the bound: there is no knee")
