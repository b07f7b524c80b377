"""Numbers that real columns hold: outliers, sentinels, heavy tails, negatives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.features.column_encoding import EncodingError, ScalarEncoder
from models.features.encoder import Encoder
from models.features.field import Field, FieldSpec
from models.features.schema import Schema, SchemaSpec

TRANSFORMS = ("none", "log", "quantile")
finite = st.floats(-1e15, 1e15, allow_nan=False).map(lambda v: round(v, 6))


def fitted(values, **options) -> Schema:
    field = FieldSpec(name="x", kind="numeric", group="user", **options)
    return SchemaSpec(fields=(field,)).fit({"x": values})


def encoded(schema, values):
    return Encoder(schema).encode_requests({"x": values}, np.zeros(len(values)))["user.x"]


def spread(schema, values):
    """How far apart the quarters of the usual values come out: near 0, a model cannot tell them apart."""
    low, high = np.quantile(encoded(schema, values), [0.25, 0.75])
    return high - low


USUAL = np.random.default_rng(1).gamma(2.0, 20.0, size=1000)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("strange", "share"), [(1e12, 0.001), (-1e12, 0.001), (-999999999.0, 0.1), (-1.0, 0.1), (1e300, 0.4)]
)
def test_outliers_and_sentinels_leave_the_usual_numbers_apart(transform, strange, share):
    values = np.concatenate([USUAL, np.full(max(1, int(share * 1000)), strange)])

    assert spread(fitted(values, transform=transform), USUAL) > 0.2


def test_unclipped_one_outlier_makes_all_other_numbers_one():
    values = np.append(USUAL, 1e12)

    assert spread(fitted(values, clip=False), USUAL) < 1e-6


def test_a_column_that_is_mostly_zero_keeps_its_other_numbers_apart_beside_a_sentinel():
    values = np.concatenate([np.zeros(8000), USUAL, np.full(500, -999999999.0)])

    assert spread(fitted(values), USUAL) > 0.3


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_a_usual_tail_is_cut_at_its_half_per_cent_only(sigma):
    values = np.exp(np.random.default_rng(2).normal(0, sigma, size=10_000))

    field = fitted(values).field("x")

    assert np.mean(values > field.high) == pytest.approx(0.005, abs=0.0005)
    assert np.mean(values < field.low) == pytest.approx(0.005, abs=0.0005)


@pytest.mark.parametrize("transform", TRANSFORMS)
@given(values=st.lists(finite, min_size=1, max_size=40), probes=st.lists(finite, min_size=2, max_size=20))
def test_the_order_of_numbers_is_kept_and_negatives_are_numbers(transform, values, probes):
    out = encoded(fitted(values, transform=transform), sorted(probes))

    assert np.isfinite(out).all()
    assert (np.diff(out) >= 0).all()


@pytest.mark.parametrize("transform", TRANSFORMS)
@given(values=st.lists(finite, min_size=1, max_size=40), probes=st.lists(finite, min_size=1, max_size=20))
def test_one_request_and_a_column_of_many_encode_alike(transform, values, probes):
    schema = fitted(values, transform=transform)
    single = ScalarEncoder(schema.field("x"), {})

    assert [single.array_of(v)[0] for v in probes] == encoded(schema, probes).tolist()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_an_absent_number_is_zero_and_an_infinite_one_is_refused(transform):
    schema = fitted([1.0, 2.0, None, 5.0], transform=transform)

    assert encoded(schema, [None, float("nan")]).tolist() == [0.0, 0.0]
    with pytest.raises(EncodingError, match="expected a finite number"):
        encoded(schema, [float("inf")])


def test_the_log_is_that_of_one_more_and_mirrored_for_negatives():
    schema = fitted([-np.expm1(3.0), 0.0, np.expm1(3.0)], transform="log")

    field = schema.field("x")

    assert (field.low, field.high, field.shift) == pytest.approx((-3.0, 3.0, 0.0))
    assert field.scale is not None
    assert encoded(schema, [np.expm1(1.5)])[0] == pytest.approx(1.5 / field.scale)


def test_quantiles_make_the_training_part_uniform():
    values = np.exp(np.random.default_rng(3).normal(0, 3, size=20_000))

    out = encoded(fitted(values, transform="quantile", normalise="min_max", clip=False), values)

    assert np.quantile(out, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.01)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_fitted_number_comes_back_from_json(transform):
    schema = fitted(USUAL, transform=transform)

    assert Schema.from_json(schema.to_json()) == schema


def test_a_field_fitted_before_there_was_clipping_encodes_as_it_did():
    text = (
        '{"user_key":null,"item_key":null,"history_length":0,'
        '"fields":[{"name":"x","kind":"numeric","group":"user","shift":1.0,"scale":2.0}]}'
    )

    assert encoded(Schema.from_json(text), [5.0, -1e9]).tolist() == [2.0, -100.0]


@pytest.mark.parametrize("options", [{"transform": "log"}, {"clip": False}])
def test_only_numbers_are_transformed_or_clipped(options):
    with pytest.raises(ValueError, match="are for kind numeric, got kind categorical"):
        FieldSpec(name="x", kind="categorical", group="item", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 1.0}, "low and high go together"),
        ({"low": 2.0, "high": 1.0}, "low and high go together, low first"),
        ({"transform": "quantile"}, "transform quantile needs quantiles"),
        ({"transform": "quantile", "quantiles": (2.0, 1.0)}, "in ascending order"),
    ],
)
def test_a_fitted_number_that_contradicts_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Field(name="x", kind="numeric", group="item", shift=0.0, scale=1.0, **options)
