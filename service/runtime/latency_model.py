"""How long a run of a model takes: measured when it is loaded, then learnt from its runs."""

import time
from collections.abc import Sequence
from typing import Self

import numpy as np

from models.features.arrays import Arrays, concat
from service.runtime.backend import Backend

# Every shape is run so often, the fastest counts (a machine is disturbed one way only), and the first round not at all.
LEAST_ROUNDS, MOST_ROUNDS, ROUNDS_S = 3, 20, 0.2
SIZES = (1, 10, 25, 50, 100, 200, 500, 1000)  # candidates: the first run of a new size allocates
JOINED = ((2, 5), (8, 5), (2, 25), (4, 25), (2, 50), (8, 25), (2, 100))  # users, and candidates of each
NEARLY = 1.1  # of two sizes that are so close per candidate, the larger makes fewer runs

REMEMBERED = 50  # runs, about: older ones fade
REFIT_EVERY = 8  # runs; between them the coefficients stay
TRUST = 0.1  # in the measured start, in runs: what traffic never shows (a joined run, a large one) stays as it was
CAP = 4.0  # a run that the system interrupted says nothing of the model: it counts as at most so many times as expected


class Cost:
    """Seconds of a run of C candidates of U users: a + b C, and for U > 1 also u U + d C.

    The last two because a graph takes its general form for several users: each brings work of its own, and every
    candidate has to be given its user's part. `piece` is the largest run that pays.
    """

    def __init__(self, *, a: float, b: float, u: float, d: float, piece: int) -> None:
        self.piece = piece
        self._start = np.maximum([a, b, u, d], 1e-9)
        self._now: tuple[float, float, float, float] = tuple(self._start.tolist())
        # Weighted sums of least squares in ratios to the start, so that 0.2 ms counts as much as 20 ms.
        self._moments, self._sums = np.zeros((4, 4)), np.zeros(4)
        self._runs: list[tuple[float, ...]] = []  # that are not in them yet

    @classmethod
    def measured(cls, backend: Backend, request: Arrays, *, max_candidates: int) -> Self:
        """Runs the model at many sizes with one request's arrays, which warms it too. Raises BackendError.

        Beyond some size a run may cost more for each candidate, as what it computes no longer fits the processor's
        caches: `piece` is where it is cheapest. On MovieLens-1M, ms of 1000 candidates at once and in hundreds:
        MIAN 1.5 and 3.4, DeepFM 10 and 8, FESeq 25 and 20, STEC 33 and 17, DIN 40 and 20 (one core, ONNX Runtime).
        """
        shapes = [(1, size) for size in SIZES if size < max_candidates] + [(1, max_candidates)]
        shapes += [(users, each) for users, each in JOINED if users * each <= max_candidates]
        took = _fastest(backend, request, shapes)
        alone = [(size, took[1, size]) for users, size in shapes if users == 1]
        best = min(seconds / size for size, seconds in alone)
        piece = max(size for size, seconds in alone if seconds / size <= NEARLY * best)
        kept = [(users, each) for users, each in shapes if users * each <= piece]
        a, b = _fitted([(1.0, each) for users, each in kept if users == 1], [took[s] for s in kept if s[0] == 1])
        joined = [(users, each) for users, each in kept if users > 1]
        beyond = [took[users, each] - a - b * users * each for users, each in joined]
        # Where too little fits into a piece to tell, joining is taken not to pay.
        u, d = _fitted([(float(users), users * each) for users, each in joined], beyond) if len(joined) > 1 else (a, b)
        return cls(a=a, b=b, u=u, d=d, piece=piece)

    def run_s(self, candidates: int, users: int) -> float:
        a, b, u, d = self._now
        return a + b * candidates + (u * users + d * candidates if users > 1 else 0.0)

    def request_s(self, candidates: int, users: int) -> float:
        """Of a request on its own, in as many runs as it needs."""
        return self.run_s(candidates, users) + (self.runs(candidates) - 1) * self._now[0]

    def runs(self, candidates: int) -> int:
        return max(-(-candidates // self.piece), 1)

    def joined_s(self, candidates: int, users: int) -> float:
        """What a request adds to a run of several."""
        _, b, u, d = self._now
        return u * users + (b + d) * candidates

    def ran(self, candidates: int, users: int, seconds: float) -> None:
        """One run more to learn from; for one thread at a time."""
        joined = users > 1
        counted = min(seconds, CAP * self.run_s(candidates, users))
        self._runs.append((1, candidates, users * joined, candidates * joined, counted))
        if len(self._runs) == REFIT_EVERY:  # one at a time would cost 20 microseconds each
            self._refit()
            self._runs.clear()

    def doubt(self) -> None:
        """To be said where what was learnt keeps all runs from being made: some of it is forgotten for the start."""
        self._forget(1)
        self._fit()

    def _refit(self) -> None:
        runs = np.array(self._runs, dtype=np.float64)
        parts = runs[:, :4] * self._start
        expected = parts.sum(axis=1)
        parts /= expected[:, None]
        self._forget(len(runs))
        self._moments += parts.T @ parts
        self._sums += parts.T @ (runs[:, 4] / expected)
        self._fit()

    def _forget(self, runs: int) -> None:
        fade = (1 - 1 / REMEMBERED) ** runs
        self._moments *= fade
        self._sums *= fade

    def _fit(self) -> None:
        factors = np.linalg.solve(self._moments + TRUST * np.eye(4), self._sums + TRUST)
        a, b, u, d = (self._start * np.maximum(factors, 0)).tolist()
        self._now = (a, b, u, d)


def _fastest(backend: Backend, request: Arrays, shapes: Sequence[tuple[int, int]]) -> dict[tuple[int, int], float]:
    """Seconds of a run of so many users with so many candidates each, joining them included."""
    requests = {each: _repeated(request, each) for _, each in shapes}
    took = dict.fromkeys(shapes, np.inf)
    began = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - began > ROUNDS_S:
            break
        for users, each in shapes:
            started = time.perf_counter()
            backend.run(requests[each] if users == 1 else concat([requests[each]] * users))
            if done:
                took[users, each] = min(took[users, each], time.perf_counter() - started)
    return took


def _fitted(rows: Sequence[tuple[float, float]], seconds: Sequence[float]) -> tuple[float, float]:
    """Two coefficients, none below 0, by least squares in relative errors."""
    weights = 1 / np.maximum(seconds, 1e-5)
    first, second = np.array(rows, dtype=np.float64).T * weights
    wanted = np.asarray(seconds) * weights
    both = np.linalg.lstsq(np.stack([first, second], axis=1), wanted, rcond=None)[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    alone = [max(float(x @ wanted / (x @ x)), 0.0) for x in (first, second)]
    errors = [float(((x * factor - wanted) ** 2).sum()) for x, factor in zip((first, second), alone, strict=True)]
    return (alone[0], 0.0) if errors[0] <= errors[1] else (0.0, alone[1])


def _repeated(arrays: Arrays, num_candidates: int) -> Arrays:
    """One request with its first candidate, that many times."""
    rows = np.zeros(num_candidates, dtype=np.int64)
    return {n: a[rows] if n.startswith("item.") or n == "user_index" else a for n, a in arrays.items()}
