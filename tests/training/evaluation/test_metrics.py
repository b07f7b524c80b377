import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from training.evaluation import metrics

# Few different scores, so that ties are the rule.
labelled = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=60)


def columns(rows):
    label, score, group = (np.array(column) for column in zip(*rows, strict=True))
    return label.astype(np.float32), (score / 7 + 0.01).astype(np.float32), group


def auc_by_pairs(label, score):
    pairs = [(c, n) for c in score[label == 1] for n in score[label == 0]]
    return sum((c > n) + 0.5 * (c == n) for c, n in pairs) / len(pairs) if pairs else math.nan


@given(rows=labelled)
def test_auc_is_the_share_of_rightly_ordered_pairs_a_tie_counting_half(rows):
    label, score, _ = columns(rows)

    assert metrics.auc(label, score) == pytest.approx(auc_by_pairs(label, score), abs=1e-15, nan_ok=True)


def test_auc_of_a_hundred_thousand_scores_is_that_of_scikit_learn():
    rng = np.random.default_rng(1)
    label, score = rng.random(100_000) < 0.03, rng.normal(size=100_000).round(3).astype(np.float32)

    assert metrics.auc(label.astype(np.float32), score) == pytest.approx(roc_auc_score(label, score), abs=1e-12)


def test_auc_by_hand():
    label, score = np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.8, 0.1])

    assert metrics.auc(label, score) == 3.5 / 4


@given(rows=labelled)
def test_gauc_is_the_mean_of_the_groups_aucs_weighted_by_their_rows(rows):
    label, score, group = columns(rows)
    aucs = {g: auc_by_pairs(label[group == g], score[group == g]) for g in set(group.tolist())}
    judged = {g: value for g, value in aucs.items() if not math.isnan(value)}
    weights = [int(np.sum(group == g)) for g in judged]

    found = metrics.gauc(label, score, group)

    assert (found.num_groups, found.num_left_out) == (len(judged), len(aucs) - len(judged))
    expected = np.average(list(judged.values()), weights=weights) if judged else math.nan
    assert found.value == pytest.approx(expected, abs=1e-14, nan_ok=True)


def test_figures_of_a_part_with_one_class_are_undefined_and_not_wrong():
    label, prob = np.zeros(4), np.full(4, 0.5)

    assert math.isnan(metrics.auc(label, prob))
    assert math.isnan(metrics.normalised_entropy(label, prob))
    assert math.isnan(metrics.calibration_ratio(label, prob))


@given(rows=labelled)
def test_logloss_is_that_of_scikit_learn(rows):
    label, prob, _ = columns(rows)
    prob = prob.astype(np.float64)

    assert metrics.logloss(label, prob) == pytest.approx(log_loss(label, prob, labels=[0, 1]), rel=1e-9)


def test_a_certain_and_wrong_prediction_costs_sixteen_nats_and_not_infinity():
    assert metrics.logloss(np.array([1.0]), np.array([0.0])) == pytest.approx(-math.log(1e-7))


def test_always_predicting_the_click_rate_has_a_normalised_entropy_of_one():
    label = np.array([1, 0, 0, 0])

    assert metrics.normalised_entropy(label, np.full(4, 0.25)) == pytest.approx(1.0)
    assert metrics.normalised_entropy(label, np.array([0.7, 0.1, 0.1, 0.1])) < 1


def test_calibration_ratio_is_predicted_over_real_clicks():
    assert metrics.calibration_ratio(np.array([1, 0, 1, 0]), np.array([0.9, 0.6, 0.9, 0.6])) == pytest.approx(1.5)


def test_calibration_error_by_hand():
    # Two bins: 0.2 predicted and 0.5 came, 0.8 predicted and 1.0 came.
    label, prob = np.array([1, 0, 1, 1]), np.array([0.2, 0.2, 0.8, 0.8])

    found = metrics.reliability(label, prob)

    assert found.count.tolist() == [2, 2]
    assert found.error == pytest.approx((0.3 + 0.2) / 2)


@given(rows=labelled, bins=st.integers(1, 8), seed=st.integers(0, 9))
def test_reliability_bins_hold_every_row_once_and_do_not_depend_on_row_order(rows, bins, seed):
    label, prob, _ = columns(rows)
    shuffle = np.random.default_rng(seed).permutation(len(label))

    found, shuffled = metrics.reliability(label, prob, bins), metrics.reliability(label[shuffle], prob[shuffle], bins)

    assert found.count.sum() == len(label)
    assert len(found.count) <= bins
    assert np.all(np.diff(found.predicted) > 0)
    assert np.dot(found.count, found.observed) == pytest.approx(label.sum())
    assert found.error == pytest.approx(shuffled.error)


def test_reliability_bins_are_equally_full_where_predictions_differ():
    prob = np.linspace(0.001, 0.03, 1000)

    found = metrics.reliability(np.zeros(1000), prob, 20)

    assert len(found.count) == 20
    assert np.all(np.abs(found.count - 50) <= 1)


@given(rows=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 3), st.integers(1, 4)), min_size=1))
def test_a_row_of_weight_n_counts_as_n_rows_in_every_figure(rows):
    label, score, group = columns([row[:3] for row in rows])
    times = np.array([row[3] for row in rows])
    many = [np.repeat(column, times) for column in (label, score, group)]
    weight = times.astype(np.float64)

    for figure in (metrics.auc, metrics.logloss, metrics.normalised_entropy, metrics.calibration_ratio):
        assert figure(label, score, weight) == pytest.approx(figure(*many[:2]), rel=1e-9, nan_ok=True)
    assert metrics.gauc(label, score, group, weight).value == pytest.approx(
        metrics.gauc(*many).value, rel=1e-9, nan_ok=True
    )
    assert metrics.reliability(label, score, weight=weight).error == pytest.approx(
        metrics.reliability(many[0], many[1]).error, rel=1e-9, abs=1e-12
    )
