"""Latency model: how long a request keeps the process busy, base + per candidate, measured at load, learnt online."""

import time
from collections.abc import Sequence
from typing import Self

import numpy as np

from models.features.arrays import Arrays
from models.features.packing import num_candidates, slice_candidates
from service.runtime.backend import Backend

# Every size is run so often, the fastest counts (a machine is disturbed one way only), and the first round not at all.
MIN_ROUNDS, MAX_ROUNDS, ROUNDS_S = 3, 20, 0.2
SIZES = (1, 10, 50, 100, 200, 500, 1000)  # candidates: the first run of a new size allocates
REQUEST_S, CANDIDATE_S = 250e-6, 1e-6  # prior for all that a request takes beside the model

MEMORY = 200  # requests, about: older ones fade
REFIT_EVERY = 8  # requests; between them the coefficients stay
PRIOR_WEIGHT = 0.1  # of what was measured at load, in requests: sizes that traffic never shows stay as they were
CAP = 4.0  # a request that the system interrupted counts as at most so many times as long as expected


class LatencyModel:
    """Seconds of a request with C candidates: `base_s + per_candidate_s * C`, by decaying least squares in ratios.

    In ratios to the prior, so that 0.2 ms counts as much as 20 ms.
    """

    def __init__(self, *, base_s: float, per_candidate_s: float) -> None:
        self._prior = (max(base_s, 1e-9), max(per_candidate_s, 1e-9))
        self.base_s, self.per_candidate_s = self._prior
        self._moments = [0.0, 0.0, 0.0]  # of base^2, base * candidates, candidates^2, each relative to the prior
        self._sums = [0.0, 0.0]
        self._observed = 0

    @classmethod
    def measured(cls, backend: Backend, request: Arrays, *, max_candidates: int) -> Self:
        """By running one request's packed tensors with 1 to `max_candidates` candidates, which warms the graph too."""
        sizes = [size for size in SIZES if size < max_candidates] + [max_candidates]
        seconds = _fastest(backend, request, sizes)
        weights = 1 / np.maximum(seconds, 1e-5)
        rows = np.stack([np.ones(len(sizes)), np.array(sizes, dtype=np.float64)], axis=1)
        base_s, per_candidate_s = np.linalg.lstsq(rows * weights[:, None], seconds * weights, rcond=None)[0].tolist()
        return cls(base_s=max(base_s, 0.0) + REQUEST_S, per_candidate_s=max(per_candidate_s, 0.0) + CANDIDATE_S)

    def expected_s(self, candidates: int) -> float:
        return self.base_s + self.per_candidate_s * candidates

    def observe(self, candidates: int, seconds: float) -> None:
        """One request more to learn from: how long the process was busy with it, waiting not counted."""
        base, slope = self._prior
        expected = base + slope * candidates
        x, y = base / expected, slope * candidates / expected
        ratio = min(seconds, CAP * self.expected_s(candidates)) / expected
        moments, sums = self._moments, self._sums
        moments[0] += x * x
        moments[1] += x * y
        moments[2] += y * y
        sums[0] += x * ratio
        sums[1] += y * ratio
        self._observed += 1
        if self._observed == REFIT_EVERY:
            self._refit()
            self.decay(REFIT_EVERY)
            self._observed = 0

    def decay(self, requests: int = 1) -> None:
        """Let what was learnt fade toward the prior by so many requests.

        Call when the estimate alone caused a rejection: a model that was slow once would be rejected for ever.
        """
        fade = (1 - 1 / MEMORY) ** requests
        self._moments = [value * fade for value in self._moments]
        self._sums = [value * fade for value in self._sums]
        self._refit()

    def _refit(self) -> None:
        a, b, d = self._moments[0] + PRIOR_WEIGHT, self._moments[1], self._moments[2] + PRIOR_WEIGHT
        u, v = self._sums[0] + PRIOR_WEIGHT, self._sums[1] + PRIOR_WEIGHT
        determinant = a * d - b * b
        self.base_s = self._prior[0] * max((u * d - v * b) / determinant, 0.0)
        self.per_candidate_s = self._prior[1] * max((a * v - b * u) / determinant, 0.0)


def _fastest(backend: Backend, request: Arrays, sizes: Sequence[int]) -> np.ndarray:
    """Seconds of a run of each size."""
    available = num_candidates(request)
    requests = [slice_candidates(request, np.arange(size) % available) for size in sizes]
    fastest = np.full(len(sizes), np.inf)
    began = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - began > ROUNDS_S:
            break
        for position, arrays in enumerate(requests):
            started = time.perf_counter()
            backend.run(arrays)
            if done:
                fastest[position] = min(fastest[position], time.perf_counter() - started)
    return fastest
