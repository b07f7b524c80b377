import numpy as np
import pytest

from service.experiments.analysis import click_rate, lift


def test_a_rate_is_clicks_over_impressions_not_the_mean_of_users_rates():
    measured = click_rate(np.array([1, 9]), np.array([1, 0]))

    assert measured.rate == 0.1
    assert (measured.num_users, measured.num_impressions, measured.num_clicks) == (2, 10, 1)


def test_the_variance_is_that_of_the_linearised_ratio():
    k, c = np.array([4.0, 2.0, 6.0]), np.array([1.0, 1.0, 1.0])

    measured = click_rate(k, c)

    # R = 3/12; c - R k = 0, 1/2, -1/2; sample variance 1/4; n mean(k)^2 = 3 * 16
    assert measured.variance == pytest.approx(0.25 / 48)


def test_two_arms_of_the_same_law_are_called_different_once_in_twenty():
    rng = np.random.default_rng(0)
    num_tests, outside = 400, 0

    for _ in range(num_tests):
        arms = []
        for _ in range(2):
            impressions = 1 + rng.geometric(0.1, size=600)  # heavy users, and users unlike each other
            arms.append(click_rate(impressions, rng.binomial(impressions, rng.beta(1, 12, size=600))))
        measured = lift(*arms)
        outside += not measured.low <= 0 <= measured.high

    assert 0.02 <= outside / num_tests <= 0.08


def test_a_better_arm_is_found_with_its_size():
    rng = np.random.default_rng(1)
    impressions = np.full(20_000, 10)
    control = click_rate(impressions, rng.binomial(impressions, 0.10))
    treatment = click_rate(impressions, rng.binomial(impressions, 0.11))

    measured = lift(control, treatment)

    assert measured.low < 0.10 < measured.high
    assert measured.low > 0.05
    assert measured.probability > 0.999


def test_too_little_to_compare_is_refused():
    with pytest.raises(ValueError, match="two users and one click, got 1 users"):
        click_rate(np.array([5]), np.array([1]))
