"""Numbers as levels: the three published ways, against slow oracles and numbers worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.features.column_encoding import EncodingError
from models.features.encoder import Encoder
from models.features.field import FIRST, OOV, PAD, FieldSpec
from models.features.schema import SchemaSpec
from models.features.values import SchemaError, buckets

WAYS = ("log_square", "ln_square_plus_one", "winners")


def slow(way, v):
    if way == "log_square":
        return math.floor(math.log(v * v)) if abs(v) >= 1 else -1
    if way == "ln_square_plus_one":
        return math.floor(math.log(v * v + 1))
    return math.floor(math.log(v) ** 2) if v > 2 else math.floor(v)


@pytest.mark.parametrize("way", WAYS)
@given(value=st.integers(-(10**6), 10**7) | st.floats(-1e12, 1e12))
def test_buckets_are_the_formula(way, value):
    assert buckets(way, np.array([value], dtype=np.float64))[0] == slow(way, value)


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        # of -1e300, -3, -1, 0, 1, 2, 3, 20, 1000, 1e300: ln 3 = 1.10, ln 20 = 3.00, ln 1000 = 6.91, ln 1e15 = 34.54
        ("log_square", [69, 2, 0, -1, 0, 1, 2, 5, 13, 69]),
        ("ln_square_plus_one", [69, 2, 0, 0, 0, 1, 2, 5, 13, 69]),
        ("winners", [-1e15, -3, -1, 0, 1, 2, 1, 8, 47, 1192]),
    ],
)
def test_buckets_worked_out_by_hand(way, expected):
    numbers = np.array([-1e300, -3, -1, 0, 1, 2, 3, 20, 1000, 1e300])

    assert buckets(way, numbers).tolist() == expected


def schema_of(way, values, min_count=1):
    field = FieldSpec(name="n", kind="categorical", group="item", discretise=way, min_count=min_count)
    return SchemaSpec(fields=(field,)).fit({"n": values})


def test_a_vocabulary_is_of_buckets_and_counts_them():
    schema = schema_of("winners", [20, 20.5, 21, 0, 0, None, 1], min_count=2)  # 8, 9, 9, 0, 0, absent, 1

    assert schema.field("n").vocabulary == ("0", "9")
    ids = Encoder(schema).encode_items({"n": [0, 21, 20, None, math.nan, 1]}, 6)["item.n"]
    assert ids.tolist() == [FIRST, FIRST + 1, OOV, PAD, PAD, OOV]


def test_an_absent_number_is_a_level_only_where_the_authors_made_it_one():
    for way in WAYS:
        encoder = Encoder(schema_of(way, [7, None]))
        absent = encoder.encode_items({"n": [None]}, 1)["item.n"][0]
        assert (absent != PAD) == (way == "ln_square_plus_one")
        assert encoder.encode_items({}, 1)["item.n"][0] == absent


@pytest.mark.parametrize("way", WAYS)
@given(values=st.lists(st.none() | st.integers(-5, 10**4), min_size=1, max_size=30), cut=st.integers(0, 30))
def test_a_value_seen_in_training_is_known_and_rows_do_not_influence_each_other(way, values, cut):
    encoder = Encoder(schema_of(way, values))

    together = encoder.encode_items({"n": values}, len(values))["item.n"]

    parts = [encoder.encode_items({"n": part}, len(part))["item.n"] for part in (values[:cut], values[cut:])]
    assert np.concatenate(parts).tolist() == together.tolist()
    assert OOV not in together


@pytest.mark.parametrize("wrong", ["12", True, math.inf, [1]])
def test_what_is_no_finite_number_is_refused(wrong):
    with pytest.raises(EncodingError, match=r"field n, row 1: expected a"):
        Encoder(schema_of("winners", [1])).encode_items({"n": [1, wrong]}, 2)
    with pytest.raises(SchemaError, match="field n"):
        schema_of("winners", [1, wrong])


def test_only_a_categorical_field_is_discretised():
    with pytest.raises(ValueError, match="'discretise' is for kind categorical, got kind numeric"):
        FieldSpec(name="n", kind="numeric", group="item", discretise="winners")
