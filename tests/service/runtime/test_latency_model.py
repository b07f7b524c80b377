"""The latency model against what really takes time: measured, learnt, forgotten."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.features.packing import num_candidates
from service.runtime.latency_model import CANDIDATE_S, REQUEST_S, LatencyModel
from tests.service.fake_backend import FakeBackend, packed


@given(base=st.floats(1e-4, 1e-2), slope=st.floats(1e-6, 1e-4), factor=st.floats(0.5, 3))
def test_it_learns_a_model_that_became_slower_or_faster(base, slope, factor):
    model = LatencyModel(base_s=base, per_candidate_s=slope)
    draw = np.random.default_rng(1)

    for candidates in draw.integers(1, 1000, 400):
        model.observe(int(candidates), factor * (base + slope * int(candidates)))

    for candidates in (100, 300, 1000):
        assert model.expected_s(candidates) == pytest.approx(factor * (base + slope * candidates), rel=0.05)


def test_one_interrupted_request_says_little():
    model = LatencyModel(base_s=1e-3, per_candidate_s=1e-5)
    for _ in range(200):
        model.observe(100, 2e-3)

    model.observe(100, 10.0)
    for _ in range(7):
        model.observe(100, 2e-3)

    assert model.expected_s(100) < 1.1 * 2e-3


def test_sizes_that_traffic_never_shows_stay_as_they_were_measured():
    model = LatencyModel(base_s=1e-3, per_candidate_s=1e-5)

    for _ in range(1000):
        model.observe(100, 2e-3)  # exactly as expected

    assert model.expected_s(1000) == pytest.approx(1e-3 + 1e-2, rel=1e-3)


def test_doubt_leads_back_to_what_was_measured():
    model = LatencyModel(base_s=1e-3, per_candidate_s=1e-5)
    for _ in range(500):
        model.observe(100, 4 * 2e-3)
    slow = model.expected_s(100)

    for _ in range(3000):
        model.decay()

    assert slow > 3 * 2e-3
    assert model.expected_s(100) == pytest.approx(2e-3, rel=0.01)


def test_it_never_expects_less_than_nothing():
    model = LatencyModel(base_s=1e-3, per_candidate_s=1e-5)

    for _ in range(500):
        model.observe(1000, 1e-9)
        model.observe(1, 1.0)

    assert model.base_s >= 0
    assert model.per_candidate_s >= 0


def test_measuring_runs_every_size_and_no_larger_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.runtime.latency_model.ROUNDS_S", 0.0)
    backend = FakeBackend()

    model = LatencyModel.measured(backend, packed(1, 2), max_candidates=300)

    assert {len(run) for run in backend.runs} == {1, 10, 50, 100, 200, 300}
    assert model.base_s >= REQUEST_S
    assert model.per_candidate_s >= CANDIDATE_S
    assert num_candidates(packed(1, 2)) == 2
