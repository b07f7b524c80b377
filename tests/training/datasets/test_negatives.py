"""Drawn negatives: never a positive of their user, and in the odds that were asked for."""

from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from training.datasets import negatives
from training.datasets.negatives import with_negatives
from training.errors import UserError

# Item "z" is nobody's, so there is a negative for everyone; repeated pairs are common.
PAIRS = st.lists(st.tuples(st.sampled_from(["u", "v", "w"]), st.sampled_from(list("abcde"))), min_size=1, max_size=25)


def table(pairs):
    return pl.DataFrame(pairs, schema=["user", "item"], orient="row")


@given(pairs=PAIRS, each=st.integers(1, 3), seed=st.integers(0, 5))
def test_each_positive_gets_its_negatives_and_none_is_a_positive_of_its_user(pairs, each, seed):
    positives = table(pairs).with_row_index("ts")

    rows = with_negatives(positives, table([*pairs, ("nobody", "z")]), each=each, seed=seed)

    blocks = [rows[i : i + each + 1] for i in range(0, rows.height, each + 1)]
    assert [block.row(0, named=True)["item"] for block in blocks] == [item for _, item in pairs]
    for number, block in enumerate(blocks):
        assert block["label"].to_list() == [1] + [0] * each
        assert block["user"].to_list() == [pairs[number][0]] * (each + 1)
        assert block["ts"].to_list() == [number] * (each + 1)
    assert not set(rows.filter(pl.col("label") == 0).select("user", "item").rows()) & set(pairs)


def test_the_same_seed_gives_the_same_negatives_whatever_the_order_of_what_is_known():
    rng = np.random.default_rng(0)
    known = table([(f"u{u}", f"i{i}") for u, i in rng.integers(60, size=(400, 2))])
    positives = known[:100]

    first = with_negatives(positives, known, each=2, seed=3)

    assert first.equals(with_negatives(positives, known.sample(fraction=1, shuffle=True, seed=1), each=2, seed=3))
    assert not first.equals(with_negatives(positives, known, each=2, seed=4))


@pytest.mark.parametrize("rounds", [0, negatives.ROUNDS])  # 0: only the exact draw that ends what tries leave over
@pytest.mark.parametrize(
    ("sampling", "odds"),
    [("uniform", {"b": 1, "c": 1, "d": 1, "e": 1, "f": 1}), ("popularity", {"b": 10, "c": 20, "d": 30, "e": 40})],
)
def test_negatives_fall_in_the_odds_asked_for(sampling, odds, rounds, monkeypatch):
    monkeypatch.setattr(negatives, "ROUNDS", rounds)
    others = [("x", item) for item, times in {"b": 10, "c": 20, "d": 30, "e": 40}.items() for _ in range(times)]
    positives = table([("u", "a")] * 4000 + others)
    known = positives.vstack(table([("w", "f")]))  # an item without positives: of the pool, but of no popularity

    rows = with_negatives(positives, known, each=1, seed=1, sampling=sampling)

    drawn = Counter(rows.filter((pl.col("user") == "u") & (pl.col("label") == 0))["item"])
    assert set(drawn) == set(odds)
    expected = [4000 * weight / sum(odds.values()) for weight in odds.values()]
    assert chisquare([drawn[item] for item in odds], expected).pvalue > 0.001


def test_a_user_that_has_nearly_everything_still_gets_its_negatives():
    positives = table([("u", f"i{i:04}") for i in range(3000)])

    rows = with_negatives(positives, positives.vstack(table([("v", "the only one left")])), each=1, seed=1)

    assert set(rows.filter(pl.col("label") == 0)["item"]) == {"the only one left"}


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
def test_a_user_that_has_everything_is_told(sampling):
    positives = table([("v", "a"), ("u", "a"), ("u", "b")])

    with pytest.raises(UserError, match="no negative can be drawn for user u: all 2 items are among its positives"):
        with_negatives(positives, positives, each=1, seed=1, sampling=sampling)
