"""The knee: the highest rate at which a service keeps its promise."""

from collections.abc import Callable

from service.bench.errors import BenchError

STEP = 1.3  # from one rate to the next until the knee lies between two
TOLERANCE = 0.04  # of the knee
LOWEST = 10.0  # requests a second


def find_knee(holds: Callable[[float], bool], *, start: float) -> float:
    """The highest rate found to hold; one up to TOLERANCE above it does not.

    A rate is given up only when it fails twice: on a machine with other work a short window can be spoilt. Raises
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
            raise BenchError(f"not even {LOWEST:g} requests a second are answered within the bound: there is no knee")
        else:
            bad, rate = rate, max(rate / STEP, LOWEST)
    while bad > good * (1 + TOLERANCE):
        middle = (good * bad) ** 0.5
        if stands(middle):
            good = middle
        else:
            bad = middle
    return good
