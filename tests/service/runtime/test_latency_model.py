"""What a run is said to take, against models whose time is a formula."""

from collections.abc import Callable

import numpy as np
import pytest

from service.runtime.latency_model import Cost
from tests.service.engine import Clock, Timed, request


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("service.runtime.latency_model.time.perf_counter", clock)
    return clock


def measured(clock: Clock, seconds: Callable[[int, int], float], *, at_most: int = 1000) -> Cost:
    return Cost.measured(Timed(clock, seconds), request(7), max_candidates=at_most)


def linear(candidates: int, users: int) -> float:
    several = 3e-4 * users + 4e-6 * candidates if users > 1 else 0.0
    return 1e-3 + 2e-6 * candidates + several


@pytest.mark.parametrize(("candidates", "users"), [(1, 1), (100, 1), (1000, 1), (2, 2), (80, 8), (1000, 40)])
def test_a_model_whose_time_is_linear_is_known_as_soon_as_it_is_measured(
    clock: Clock, candidates: int, users: int
) -> None:
    cost = measured(clock, linear)

    assert cost.run_s(candidates, users) == pytest.approx(linear(candidates, users), rel=1e-6)
    assert cost.piece == 1000


def test_runs_that_no_longer_pay_are_cut(clock: Clock) -> None:
    """Beyond 100 candidates each costs twice as much, as when a cache is left."""
    cost = measured(clock, lambda candidates, _: 1e-4 + 1e-5 * candidates * (2 if candidates > 100 else 1))

    assert cost.piece == 100
    assert cost.runs(1000) == 10
    assert cost.request_s(1000, 1) == pytest.approx(10 * 1e-4 + 1000 * 1e-5, rel=1e-3)


def test_no_run_is_larger_than_the_limit(clock: Clock) -> None:
    assert measured(clock, linear, at_most=70).piece == 70


def test_with_a_limit_of_one_candidate_joining_is_taken_not_to_pay(clock: Clock) -> None:
    cost = measured(clock, linear, at_most=1)

    assert cost.piece == 1
    assert cost.run_s(2, 2) >= 2 * cost.run_s(1, 1)


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_traffic_corrects_what_was_measured_at_the_start(factor: float) -> None:
    cost = Cost(a=1e-3, b=1e-5, u=1e-4, d=1e-6, piece=1000)
    draw = np.random.default_rng(1)

    for candidates in draw.integers(1, 1000, size=400).tolist():
        noise = 1 + 0.1 * draw.standard_normal()
        cost.ran(candidates, 1, factor * (3e-3 + 2e-5 * candidates) * noise)

    for candidates in (1, 100, 1000):
        assert cost.run_s(candidates, 1) == pytest.approx(factor * (3e-3 + 2e-5 * candidates), rel=0.1)


def test_what_traffic_never_shows_stays_as_it_was_measured() -> None:
    cost = Cost(a=1e-3, b=1e-5, u=3e-4, d=2e-6, piece=1000)

    for candidates in [1, 10, 100, 1000] * 50:
        cost.ran(candidates, 1, 1e-3 + 1e-5 * candidates)

    assert cost.run_s(40, 4) == pytest.approx(1e-3 + 40e-5 + 4 * 3e-4 + 40 * 2e-6, rel=1e-3)


def test_a_run_that_was_interrupted_hardly_counts() -> None:
    cost = Cost(a=1e-3, b=1e-5, u=1e-3, d=1e-6, piece=1000)

    for number in range(64):
        cost.ran(100, 1, 10.0 if number == 60 else 2e-3)

    assert cost.run_s(100, 1) < 1.2 * 2e-3


def test_a_model_that_became_slower_is_known_to_be_within_fifty_runs() -> None:
    cost = Cost(a=1e-3, b=1e-5, u=1e-3, d=1e-6, piece=1000)

    for _ in range(200):
        cost.ran(100, 1, 2e-3)
    for _ in range(150):
        cost.ran(100, 1, 20e-3)

    assert cost.run_s(100, 1) == pytest.approx(20e-3, rel=0.1)


def test_doubt_leads_back_to_what_was_measured(clock: Clock) -> None:
    cost = measured(clock, linear)
    for _ in range(400):
        cost.ran(100, 1, 1000 * linear(100, 1))
    assert cost.run_s(100, 1) > 100 * linear(100, 1)

    for _ in range(1000):
        cost.doubt()

    assert cost.run_s(100, 1) == pytest.approx(linear(100, 1), rel=0.1)
