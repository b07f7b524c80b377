"""The AUC and log loss that known probabilities allow."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.simulator.bayes_optimal import expected_auc, expected_logloss

ROWS = st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5]), st.floats(0.05, 0.95)), min_size=2, max_size=7)


@given(rows=ROWS)
def test_expected_auc_is_the_mean_over_all_labellings(rows):
    scores, truth = np.array(rows).T

    found = expected_auc(scores, truth)

    right = pairs = 0.0
    for labels in product((0, 1), repeat=len(rows)):
        weight = np.prod(np.where(labels, truth, 1 - truth))
        for i, j in product(range(len(rows)), repeat=2):
            if labels[i] > labels[j]:
                pairs += weight
                right += weight * (float(scores[i] > scores[j]) + 0.5 * float(scores[i] == scores[j]))
    assert found == pytest.approx(right / pairs, abs=1e-12)


@given(rows=ROWS)
def test_nothing_beats_the_truth(rows):
    scores, truth = np.array(rows).T

    assert expected_auc(scores, truth) <= expected_auc(truth, truth) + 1e-12
    assert expected_logloss(scores, truth) >= expected_logloss(truth, truth) - 1e-12


def test_a_fair_coin_has_an_entropy_of_ln_2():
    coins = np.full(3, 0.5)

    assert expected_logloss(coins, coins) == pytest.approx(np.log(2))
