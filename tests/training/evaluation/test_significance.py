import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from training.evaluation import metrics
from training.evaluation.significance import interval, over_rows, over_seeds, placements

NO_USER = np.full(300, -1)


def scored(num_rows=300, num_seeds=3, *, seed=0):
    """A label, and the scores of several seeds of two models, correlated and with ties."""
    rng = np.random.default_rng(seed)
    label = (rng.random(num_rows) < 0.3).astype(np.float32)
    shared = label + rng.normal(size=num_rows)
    first, second = (
        [np.round(shared + noise * rng.normal(size=num_rows), 1).astype(np.float32) for _ in range(num_seeds)]
        for noise in (0.5, 1.0)
    )
    return label, first, second


def test_the_paired_t_test_is_scipys():
    first, second = [0.981, 0.983, 0.979, 0.984], [0.980, 0.981, 0.9795, 0.981]

    found = over_seeds(first, second)

    expected = stats.ttest_rel(first, second)
    bounds = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.low == pytest.approx(bounds.low)
    assert found.high == pytest.approx(bounds.high)
    assert found.value == pytest.approx(np.mean(first) - np.mean(second))


def test_the_paired_t_test_by_hand():
    # Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t = 2 sqrt(3), two degrees of freedom.
    found = over_seeds([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])

    t = 2 * math.sqrt(3)
    assert found.value == 2
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)


@pytest.mark.parametrize(("first", "second"), [([0.75], [0.5]), ([0.5, 0.75], [0.5, 0.75]), ([0.5, 0.75], [0.25, 0.5])])
def test_seeds_that_show_no_spread_tell_nothing(first, second):
    found = over_seeds(first, second)

    assert found.value == pytest.approx(first[0] - second[0])
    assert (found.low, found.high, found.p) == (None, None, None)


def test_one_value_has_no_interval():
    assert interval([0.5]) is None
    assert interval([0.5, 0.5]) == (0.5, 0.5)


def kernel(click, other):
    return float(click > other) + 0.5 * float(click == other)


def test_a_placement_is_the_share_of_the_other_class_that_a_row_is_ordered_rightly_to():
    label, (first, *_), _ = scored(60)

    found = placements(label, [first])

    for row in range(60):
        others = first[label != label[row]]
        rightly = [kernel(first[row], s) if label[row] else kernel(s, first[row]) for s in others]
        assert found[row] == pytest.approx(np.mean(rightly))


def test_the_mean_placement_of_either_class_is_the_mean_auc():
    label, first, _ = scored()

    found = placements(label, first)

    expected = np.mean([roc_auc_score(label, score) for score in first])
    assert found[label == 1].mean() == pytest.approx(expected)
    assert found[label == 0].mean() == pytest.approx(expected)
    assert metrics.auc(label, first[0]) == pytest.approx(placements(label, first[:1])[label == 1].mean())


def test_over_rows_is_the_contrast_of_delong_written_as_loops_and_covariances():
    label, first, second = scored(120)
    scores = [*first, *second]
    clicks, others = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
    won = np.array([[[kernel(s[i], s[j]) for j in others] for i in clicks] for s in scores])
    covariance = np.cov(won.mean(axis=2)) / len(clicks) + np.cov(won.mean(axis=1)) / len(others)
    contrast = np.array([1, 1, 1, -1, -1, -1]) / 3
    value, error = contrast @ won.mean(axis=(1, 2)), math.sqrt(contrast @ covariance @ contrast)

    found = over_rows(label, placements(label, first), placements(label, second), NO_USER[:120])

    assert found.value == pytest.approx(value)
    assert found.p == pytest.approx(math.erfc(abs(value) / error / math.sqrt(2)))
    assert found.low == pytest.approx(value - 1.959964 * error, abs=1e-7)
    assert found.high == pytest.approx(value + 1.959964 * error, abs=1e-7)


def test_groups_of_one_row_each_are_no_groups():
    label, first, second = scored()
    a, b = placements(label, first), placements(label, second)

    assert over_rows(label, a, b, np.arange(300)) == over_rows(label, a, b, NO_USER)


def test_rows_of_one_user_are_drawn_together_as_a_bootstrap_over_users_draws_them():
    rng = np.random.default_rng(1)
    user = np.repeat(np.arange(150), 6)
    taste = rng.normal(size=(2, 150))[:, user]
    # Each model knows another half of the user's taste, which decides nearly all, so all rows of a user err alike.
    label = (rng.random(900) < 1 / (1 + np.exp(1 - 5 * taste.sum(0)))).astype(np.float32)
    first, second = (side + 0.3 * rng.normal(size=900) for side in taste)

    found = over_rows(label, placements(label, [first]), placements(label, [second]), user)

    drawn = []
    for _ in range(500):
        rows = (6 * rng.integers(150, size=150)[:, None] + np.arange(6)).ravel()
        drawn.append(metrics.auc(label[rows], first[rows]) - metrics.auc(label[rows], second[rows]))
    by_row = over_rows(label, placements(label, [first]), placements(label, [second]), np.full(900, -1))
    assert half_width(found) / 1.959964 == pytest.approx(np.std(drawn), rel=0.1)
    assert half_width(by_row) / 1.959964 < 0.75 * np.std(drawn)


def half_width(found):
    assert found.low is not None and found.high is not None
    return (found.high - found.low) / 2


def test_of_two_models_of_equal_auc_about_one_pair_in_twenty_seems_to_differ():
    rng = np.random.default_rng(2)
    label = np.repeat([1.0, 0.0], [80, 220])
    seeming = 0
    for _ in range(400):
        first, second = (placements(label, [label + rng.normal(size=300)]) for _ in range(2))
        found = over_rows(label, first, second, NO_USER)
        seeming += found.p is not None and found.p < 0.05

    assert 8 <= seeming <= 34  # 20 expected; beyond these bounds one time in a thousand


def test_the_same_scores_or_a_single_click_tell_nothing():
    label, first, second = scored()
    one_click = np.zeros(300, np.float32)
    one_click[7] = 1

    same = over_rows(label, placements(label, first), placements(label, first), NO_USER)
    single = over_rows(one_click, placements(one_click, first), placements(one_click, second), NO_USER)

    assert (same.value, same.p) == (0, None)
    assert single.p is None
