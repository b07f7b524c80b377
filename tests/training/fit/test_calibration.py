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


@given(rows=st.lists(st.tuples(logits, st.integers(0, 1), st.integers(1, 4)), min_size=2, max_size=30))
def test_a_row_of_weight_n_calibrates_as_n_rows(rows):
    x, label, times = (np.array(column) for column in zip(*rows, strict=True))

    weighted = calibrate.fit(x, label.astype(np.float32), times.astype(np.float32))
    repeated = calibrate.fit(np.repeat(x, times), np.repeat(label, times).astype(np.float32))

    assert weighted(x) == pytest.approx(repeated(x), abs=1e-4)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_on_thinned_negatives_the_calibrated_probability_is_that_of_the_whole_traffic(rate):
    rng = np.random.default_rng(7)
    x = rng.normal(-4.0, 1.5, size=400_000)
    truth = Calibration()(x)
    label = (rng.random(len(x)) < truth).astype(np.float32)
    kept = (label > 0.5) | (rng.random(len(x)) < rate)

    # The model of a thinned log has learnt the thinned odds, and is a little off, as models are.
    thinned_logits = 0.8 * (x[kept] - np.log(rate)) + 0.3
    fitted = calibrate.fit(thinned_logits, label[kept], negative_rate=rate)
    predicted = fitted(0.8 * (x - np.log(rate)) + 0.3)

    # Within what chance allows the click count of the whole traffic: both the labels' and the sample's.
    clicks = label.sum()
    spread = np.sqrt(np.sum(truth * (1 - truth)) * (1 + 1 / rate * truth.mean()))
    assert abs(predicted.sum() - clicks) < 3 * spread
    for part in np.array_split(np.argsort(x), 5):
        spread = np.sqrt(np.sum(truth[part] * (1 - truth[part])))
        assert abs(predicted[part].sum() - label[part].sum()) < 4 * spread
    represented = np.where(label[kept] > 0.5, 1.0, 1 / rate)
    ratio = metrics.calibration_ratio(label[kept], fitted(thinned_logits), represented)
    assert ratio == pytest.approx(1, abs=4 / float(clicks) ** 0.5)
