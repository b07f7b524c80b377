import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.artifact.calibration import Calibration
from training.evaluation import metrics
from training.fit import calibration as calibrate

logits = st.floats(-8, 8, width=32)


@given(rows=st.lists(st.tuples(logits, st.integers(0, 1)), min_size=1, max_size=40))
def test_calibrating_never_worsens_the_logloss_it_is_fitted_on(rows):
    x, label = (np.array(column, dtype=np.float32) for column in zip(*rows, strict=True))

    fitted = calibrate.fit(x, label)

    assert metrics.logloss(label, fitted(x)) <= metrics.logloss(label, Calibration()(x)) + 1e-12


def test_calibrating_keeps_every_auc():
    rng = np.random.default_rng(0)
    x = rng.normal(size=2000).astype(np.float32).round(2)
    label = (rng.random(2000) < 0.2).astype(np.float32)

    fitted = calibrate.fit(x, label)

    assert metrics.auc(label, fitted(x)) == metrics.auc(label, x)


@pytest.mark.parametrize(("slope", "intercept"), [(0.5, -2.0), (2.0, 1.0), (1.0, -6.0), (20.0, 3.0)])
def test_the_map_that_the_labels_were_drawn_from_is_found_again(slope, intercept):
    rng = np.random.default_rng(1)
    x = rng.normal(-intercept / slope, 2 / slope, size=200_000)
    label = (rng.random(len(x)) < Calibration(slope=slope, intercept=intercept)(x)).astype(np.float32)

    fitted = calibrate.fit(x, label)

    assert fitted.slope == pytest.approx(slope, rel=0.02)
    assert fitted.intercept == pytest.approx(intercept, rel=0.02)
    # At the optimum predicted and real clicks agree, which is what a bid needs.
    assert metrics.calibration_ratio(label, fitted(x)) == pytest.approx(1.0, abs=1e-6)


def test_labels_that_a_threshold_separates_give_a_finite_map():
    x = np.array([-2.0, -1.0, 1.0, 2.0])

    fitted = calibrate.fit(x, np.array([0, 0, 1, 1]))

    assert 1 < fitted.slope <= calibrate.MAX_SLOPE
    assert fitted(x) == pytest.approx(np.array([0, 0, 1, 1]), abs=1e-6)


def test_logits_that_rank_backwards_are_flattened_but_not_turned_round():
    x = np.array([-2.0, -1.0, 1.0, 2.0] * 5)

    fitted = calibrate.fit(x, np.array([1, 1, 0, 0] * 5))

    assert fitted.slope == calibrate.MIN_SLOPE
    assert fitted.intercept == pytest.approx(0.0, abs=1e-6)


def test_equal_logits_become_the_click_rate():
    fitted = calibrate.fit(np.full(10, 3.0), np.array([1] + [0] * 9))

    assert fitted(np.array([3.0])) == pytest.approx(0.1)


def test_clicks_alone_say_nothing_about_probabilities():
    assert calibrate.fit(np.array([0.1, 0.2]), np.array([1, 1])) == Calibration()
