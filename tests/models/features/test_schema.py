import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.features.field import Field, FieldSpec
from models.features.schema import Schema, SchemaSpec
from models.features.values import SchemaError, canonical


def spec(*fields: FieldSpec, **options) -> SchemaSpec:
    return SchemaSpec(fields=fields, **options)


CITY = FieldSpec(name="city", kind="categorical", group="user")
PRICE = FieldSpec(name="price", kind="numeric", group="item")
TAGS = FieldSpec(name="tags", kind="multi", group="item")
AD = FieldSpec(name="ad", kind="categorical", group="item")
HOUR = FieldSpec(name="hour", kind="time", group="context", part="hour")
SPENT = FieldSpec(name="spent", kind="numeric", group="behaviour")


def sequence(name: str, *, of: str) -> FieldSpec:
    return FieldSpec(name=name, kind="sequence", group="behaviour", of=of)


def test_a_vocabulary_is_ordered_by_count_and_then_by_value():
    schema = spec(CITY).fit({"city": ["b", "a", "c", "c", None, ""]})

    assert schema.field("city").vocabulary == ("c", "a", "b")
    assert schema.field("city").num_ids == 5


def test_values_rarer_than_min_count_are_left_out():
    schema = spec(CITY.model_copy(update={"min_count": 2})).fit({"city": ["a", "a", "b"]})

    assert schema.field("city").vocabulary == ("a",)


def test_a_value_counts_once_however_it_is_typed():
    schema = spec(CITY.model_copy(update={"min_count": 4})).fit({"city": [1, 1.0, "1", True]})

    assert schema.field("city").vocabulary == ("1",)


def test_numeric_statistics_leave_absent_values_out():
    schema = spec(PRICE).fit({"price": [1.0, 3.0, None, float("nan")]})

    assert (schema.field("price").shift, schema.field("price").scale) == (2.0, 1.0)


def test_a_constant_number_has_scale_one():
    schema = spec(PRICE).fit({"price": np.array([7, 7])})

    assert (schema.field("price").shift, schema.field("price").scale) == (7.0, 1.0)


def test_a_constant_number_is_its_own_centre_however_its_mean_rounds():
    schema = spec(PRICE).fit({"price": [0.1, 0.1, 0.1]})

    assert (schema.field("price").shift, schema.field("price").scale) == (0.1, 1.0)


def test_min_max_maps_the_training_range_to_0_and_1():
    schema = spec(PRICE.model_copy(update={"normalise": "min_max"})).fit({"price": [2.0, 6.0]})

    assert (schema.field("price").shift, schema.field("price").scale) == (2.0, 4.0)


def test_a_multi_valued_field_is_as_wide_as_its_longest_row():
    schema = spec(TAGS).fit({"tags": [["x"], None, ["x", "y", "z"]]})

    assert schema.field("tags").max_values == 3
    assert schema.field("tags").vocabulary == ("x", "y", "z")


def test_inputs_are_listed_request_constant_first():
    fields = (AD, TAGS, CITY, HOUR, FieldSpec(name="past", kind="sequence", group="behaviour", of="tags"))
    schema = spec(*fields, history_length=7).fit({"ad": ["a"], "tags": [["x", "y"]], "city": ["c"]})

    inputs = {i.name: (i.dtype, i.dims) for i in schema.inputs}

    assert list(inputs) == [
        "user.city",
        "ctx.hour",
        "hist.past",
        "hist_mask",
        "hist_age",
        "item.ad",
        "item.tags",
        "user_index",
    ]
    assert inputs["hist.past"] == ("int64", ("U", 7, 2))
    assert inputs["hist_mask"] == ("bool", ("U", 7))
    assert inputs["hist_age"] == ("int64", ("U", 7))
    assert inputs["item.tags"] == ("int64", ("C", 2))


def test_json_keeps_the_schema_and_its_fingerprint():
    schema = spec(CITY, PRICE, HOUR, user_key="city").fit({"city": ["a"], "price": [1.5]})

    again = Schema.from_json(schema.to_json())

    assert again == schema
    assert again.fingerprint == schema.fingerprint


def test_another_vocabulary_has_another_fingerprint():
    one = spec(CITY).fit({"city": ["a"]})
    other = spec(CITY).fit({"city": ["b"]})

    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ((), {}, "at least one field"),
        ((CITY, CITY), {}, "city is declared more than once"),
        ((CITY,), {"user_key": "town"}, "user_key names a categorical user field, got 'town'"),
        ((CITY,), {"item_key": "city"}, "item_key names a categorical item field"),
        ((AD,), {"history_length": 5}, "history_length 5 and 0 sequence fields"),
        ((FieldSpec(name="p", kind="sequence", group="behaviour", of="x"),), {"history_length": 5}, "is of 'x'"),
        (
            (FieldSpec(name="u", kind="categorical", group="user"), sequence("p", of="u")),
            {"history_length": 5, "user_key": "u"},
            "is of 'u', no context, item or user field, or the user's id",
        ),
        ((SPENT, sequence("p", of="spent")), {"history_length": 5}, "is of 'spent', no context"),
        ((SPENT, AD, sequence("spent", of="ad")), {"history_length": 5}, "spent is declared more"),
        (
            (SPENT, SPENT.model_copy(update={"group": "user"})),
            {"history_length": 5},
            "spent is declared more than once",
        ),
        ((SPENT,), {}, "history_length 0 and 1 sequence fields do not go together"),
    ],
)
def test_a_schema_that_contradicts_itself_is_refused(fields, options, message):
    with pytest.raises(ValidationError, match=message):
        spec(*fields, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "time"}, "'part'"),
        ({"kind": "categorical", "of": "x"}, "'of'"),
        ({"kind": "categorical", "max_values": 3}, "'max_values' is for kind multi"),
        ({"kind": "sequence", "of": "x"}, "needs group behaviour"),
        ({"kind": "time", "part": "hour"}, "belongs to the context"),
        ({"kind": "categorical", "name": "a b"}, "pattern"),
    ],
)
def test_a_field_whose_options_do_not_fit_its_kind_is_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        FieldSpec.model_validate({"name": "f", "group": "user", **options})


@pytest.mark.parametrize(
    ("field", "columns", "message"),
    [
        (CITY, {"town": ["a"]}, "field city: no such column; there are town"),
        (CITY, {"city": [["a"]]}, "field city: kind categorical wants strings or numbers"),
        (PRICE, {"price": ["cheap"]}, "field price: kind numeric wants numbers"),
        (PRICE, {"price": [None]}, "field price: no number in the training part"),
        (PRICE, {"price": [float("inf")]}, "field price: infinite"),
        (PRICE, {"price": ["3.5"]}, "field price: kind numeric wants numbers, got '3.5'"),
        (PRICE, {"price": [1, True]}, "field price: kind numeric wants numbers, got True"),
        (PRICE, {"price": [10**400]}, "field price: kind numeric wants numbers"),
        (PRICE, {"price": [1e308, -1e308]}, "field price: numbers from -1e.308 to 1e.308 have no mean and spread"),
        (TAGS, {"tags": ["x"]}, "field tags: kind multi wants a list"),
    ],
)
def test_columns_that_cannot_be_fitted_are_named(field, columns, message):
    with pytest.raises(SchemaError, match=message):
        spec(field).fit(columns)


CITY_FILE = '{"user_key":null,"item_key":null,"history_length":0,"fields":[{"name":"city","group":"user","kind":%s}]}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"user_key": null, "item_key": null, "history_length": 0}', "at fields: Field required"),
        (CITY_FILE % '"categorical","vocabulary":["a",7]', "field city: a vocabulary holds strings, got 7"),
        (CITY_FILE % '"categorical","vocabulary":["a","a"]', "field city: the values of a vocabulary are different"),
        (CITY_FILE % '"categorical","vocabulary":"a"', "at fields.0.vocabulary: Input should be a valid tuple"),
        (CITY_FILE % '"categorical"', "at fields.0: Value error, field city: kinds categorical and multi need"),
        (CITY_FILE % '"time","vocabulary":["a"]', "at fields.0: "),
        (CITY_FILE % '"categorical","vocabulary":["a"', "no JSON: "),
        ("", "no JSON: "),
        ("[]", "at top level: "),
        ("7", "at top level: "),
    ],
)
def test_a_schema_file_of_another_shape_is_one_clear_error(text, message):
    with pytest.raises(SchemaError, match=f"^not a fitted schema: {re.escape(message)}"):
        Schema.from_json(text)


@given(st.lists(st.text(min_size=1), min_size=1, unique=True), st.floats(allow_nan=False, allow_infinity=False))
def test_json_keeps_any_words_and_numbers(words, number):
    schema = spec(CITY, PRICE).fit({"city": words, "price": [number] * len(words)})

    assert Schema.from_json(schema.to_json()) == schema


@pytest.mark.parametrize(
    ("fitted", "message"),
    [
        ({"vocabulary": ["a", "a"]}, "are different, and none is empty"),
        ({"vocabulary": ["a", ""]}, "are different, and none is empty"),
        ({"kind": "numeric", "shift": 0.0, "scale": 1.0, "vocabulary": ["a"]}, "others have none"),
        ({"kind": "numeric", "shift": 0.0, "scale": float("inf")}, "finite number"),
        ({}, "need a vocabulary"),
    ],
)
def test_a_fitted_field_that_contradicts_itself_is_refused(fitted, message):
    with pytest.raises(ValidationError, match=message):
        Field.model_validate({"name": "f", "kind": "categorical", "group": "user", **fitted})


@given(st.integers(-(2**62), 2**62))
def test_an_integer_spells_like_its_text_and_its_float(number):
    assert canonical(number) == canonical(str(number))
    if float(number) == number:
        assert canonical(float(number)) == canonical(number)
