from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.features.arrays import concat
from models.features.column_encoding import EncodingError
from models.features.encoder import Encoder
from models.features.field import OOV, PAD, FieldSpec
from models.features.history import Event, history
from models.features.request import Request
from models.features.schema import Schema, SchemaSpec
from models.features.values import canonical

SCHEMA: Schema = SchemaSpec(
    user_key="user",
    item_key="ad",
    history_length=3,
    fields=(
        FieldSpec(name="user", kind="categorical", group="user"),
        FieldSpec(name="age", kind="numeric", group="user"),
        FieldSpec(name="device", kind="categorical", group="context"),
        FieldSpec(name="hour", kind="time", group="context", part="hour"),
        FieldSpec(name="weekday", kind="time", group="context", part="weekday"),
        FieldSpec(name="ad", kind="categorical", group="item"),
        FieldSpec(name="tags", kind="multi", group="item"),
        FieldSpec(name="price", kind="numeric", group="item"),
        FieldSpec(name="ad", kind="sequence", group="behaviour", of="ad"),
        FieldSpec(name="tags", kind="sequence", group="behaviour", of="tags"),
        FieldSpec(name="hour", kind="sequence", group="behaviour", of="hour"),
    ),
).fit(
    {
        "user": ["u1", "u2"],
        "age": [20, 40],
        "device": ["mobile", "desktop"],
        "ad": [1, 2, 3],
        "tags": [["a", "b"], ["a"]],
        "price": [0.0, 2.0],
    }
)
ENCODER = Encoder(SCHEMA)
SUNDAY_21H = 1_795_000_000.25 - 1_795_000_000.25 % 86400 + 21 * 3600  # 2026-11-18 is a Wednesday


def request(**changes) -> Request:
    values = {
        "user": {"user": "u1", "age": 40},
        "context": {"device": "mobile"},
        "ts": 1000.0,
        "behaviours": (),
        "items": {"ad": [1, 9, None], "tags": [["b", "zz"], [], None], "price": [2.0, None, 1.0]},
        "num_items": 3,
    }
    return Request(**{**values, **changes})


def test_known_unknown_and_absent_values_are_told_apart():
    arrays = ENCODER.encode(request())

    assert arrays["item.ad"].tolist() == [2, OOV, PAD]
    assert arrays["item.tags"].tolist() == [[3, OOV], [PAD, PAD], [PAD, PAD]]
    assert arrays["item.price"].tolist() == [1.0, 0.0, 0.0]
    assert arrays["user.age"].tolist() == [1.0]


def test_inputs_have_the_names_types_and_shapes_the_schema_says():
    arrays = ENCODER.encode(request())

    sizes: dict[str | int, int] = {"U": 1, "C": 3}
    expected = {i.name: (i.dtype, tuple(sizes.get(d, d) for d in i.dims)) for i in SCHEMA.inputs}
    assert {name: (a.dtype.name, a.shape) for name, a in arrays.items()} == expected


def test_an_absent_column_is_absent_in_every_row():
    arrays = ENCODER.encode(request(items={}, user={}, context={}))

    assert not arrays["item.ad"].any()
    assert not arrays["item.tags"].any()
    assert not arrays["item.price"].any()
    assert arrays["user.user"].tolist() == [PAD]


@pytest.mark.parametrize(("ts", "hour", "weekday"), [(0.0, 0, 3), (4 * 86400 + 3599.9, 0, 0), (-1.0, 23, 2)])
def test_clock_fields_come_from_the_request_time_in_utc(ts, hour, weekday):
    arrays = ENCODER.encode(request(ts=ts, context={"hour": 5}))

    assert arrays["ctx.hour"].tolist() == [hour + 2]
    assert arrays["ctx.weekday"].tolist() == [weekday + 2]


@pytest.mark.parametrize(
    ("part", "ts", "expected"), [("day", "2024-02-29T12:00", 28), ("month", "2024-12-31T23:59", 11)]
)
def test_calendar_parts_count_from_zero(part, ts, expected):
    schema = SchemaSpec(fields=(FieldSpec(name="f", kind="time", group="context", part=part),)).fit({})
    seconds = np.array([np.datetime64(ts, "s").astype(np.int64)], dtype=np.float64)

    arrays = Encoder(schema).encode_requests({}, seconds)

    assert arrays["ctx.f"].tolist() == [expected + 2]
    assert expected + 2 < schema.field("f").num_ids


def test_history_is_left_padded_newest_last_and_strictly_earlier():
    behaviours = (
        Event(item="3", ts=7200.0, features={"tags": ["a"]}),
        Event(item="1", ts=3600.0, features={}),
        Event(item="2", ts=9000.0, features={}),
    )

    arrays = ENCODER.encode(request(ts=9000.0, behaviours=behaviours))

    assert arrays["hist.ad"].tolist() == [[PAD, 2, 4]]
    assert arrays["hist.tags"].tolist() == [[[0, 0], [0, 0], [2, 0]]]
    assert arrays["hist.hour"].tolist() == [[PAD, 3, 4]]
    assert arrays["hist_mask"].tolist() == [[False, True, True]]


def test_ages_are_whole_seconds_even_between_unix_times():
    now = 1_795_000_000.25
    behaviours = [Event(item="1", ts=now - age, features={}) for age in (40_000_001.0, 1.5, 0.25)]

    arrays = ENCODER.encode(request(ts=now, behaviours=behaviours[1:]))
    aged = ENCODER.encode(request(ts=now, behaviours=behaviours))

    assert arrays["hist_age"].tolist() == [[0, 1, 0]]
    assert aged["hist_age"].tolist() == [[40_000_001, 1, 0]]
    assert arrays["hist_mask"].tolist() == [[False, True, True]]


def test_an_absurd_age_is_still_a_whole_number():
    schema = SchemaSpec(
        history_length=1,
        fields=(
            FieldSpec(name="ad", kind="categorical", group="item"),
            FieldSpec(name="ad", kind="sequence", group="behaviour", of="ad"),
        ),
    ).fit({"ad": ["1"]})
    past = (Event(item="1", ts=-1e300, features={}),)

    arrays = Encoder(schema).encode(
        Request(user={}, context={}, ts=1e300, behaviours=past, items={"ad": ["1"]}, num_items=1)
    )

    assert arrays["hist_age"].tolist() == [[10**12]]


def test_an_empty_history_is_all_padding():
    arrays = ENCODER.encode(request(behaviours=()))

    assert not arrays["hist.ad"].any()
    assert arrays["hist.tags"].shape == (1, 3, 2)
    assert not arrays["hist_mask"].any()


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["10", "9", "a", "é"])), max_size=12), st.randoms())
def test_history_does_not_depend_on_the_order_events_arrived_in(clicks, random):
    events = [Event(item=item, ts=float(ts), features={}) for ts, item in clicks]
    shuffled = random.sample(events, len(events))

    chosen = history(shuffled, before=4.0, limit=3)

    assert chosen == sorted((e for e in events if e.ts < 4), key=lambda e: (e.ts, e.item))[-3:]


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_window_over_the_log_equals_each_request_encoded_alone(lengths, seed):
    rng = np.random.default_rng(seed)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    items = rng.integers(1, 5, size=sum(lengths))
    ts = np.concatenate([np.sort(rng.choice(50, n, replace=False)) for n in lengths]) + 0.25 * rng.integers(4, size=1)
    requested_at = 100.0 + 0.125 * np.arange(len(lengths), dtype=np.float64)
    events = ENCODER.encode_events({"ad": items}, ts)

    together = ENCODER.window(events, starts, ends, requested_at)

    for u, (start, end) in enumerate(zip(starts, ends, strict=True)):
        past = [Event(item=str(items[i]), ts=ts[i], features={}) for i in range(start, end)]
        alone = ENCODER.encode(request(ts=requested_at[u], behaviours=past))
        for name in ("hist.ad", "hist.tags", "hist.hour", "hist_mask", "hist_age"):
            np.testing.assert_array_equal(together[name][u], alone[name][0])


scalars = st.one_of(st.none(), st.text(max_size=3), st.integers(0, 9), st.floats(), st.booleans())
candidates = st.fixed_dictionaries(
    {
        "ad": scalars,
        "tags": st.one_of(st.none(), st.lists(scalars, max_size=4)),
        "price": st.one_of(st.none(), st.integers(-(10**9), 10**9), st.floats(allow_infinity=False)),
    }
)


@given(rows=st.lists(candidates, max_size=20), cut=st.integers(0, 20))
def test_rows_do_not_influence_each_other(rows, cut):
    def encode(part):
        return ENCODER.encode_items({name: [row[name] for row in part] for name in ("ad", "tags", "price")}, len(part))

    together = encode(rows)

    first, second = encode(rows[:cut]), encode(rows[cut:])
    for name, array in together.items():
        np.testing.assert_array_equal(array, np.concatenate([first[name], second[name]]))


@given(st.lists(scalars, max_size=20))
def test_ids_are_the_vocabulary_looked_up_one_by_one(values):
    encoded = ENCODER.encode_items({"ad": values}, len(values))["item.ad"]

    vocabulary = SCHEMA.field("ad").vocabulary
    assert vocabulary is not None
    for value, value_id in zip(values, encoded, strict=True):
        spelling = canonical(value)
        expected = PAD if spelling is None else vocabulary.index(spelling) + 2 if spelling in vocabulary else OOV
        assert value_id == expected


def test_a_list_and_an_array_of_the_same_values_encode_alike():
    for values in ([3, 1, 7], [3.0, 1.0, float("nan")], ["3", "x", ""]):
        listed = ENCODER.encode_items({"ad": values}, 3)
        arrayed = ENCODER.encode_items({"ad": np.array(values)}, 3)

        np.testing.assert_array_equal(listed["item.ad"], arrayed["item.ad"])


def test_numpys_own_numbers_in_a_list_are_numbers():
    ads: list[Any] = [np.int64(1), np.int64(99), np.float32(3.0), np.float32("nan"), np.bool_(1)]
    prices: list[Any] = [np.int64(2), np.float32(2.0), 2, None]

    tags: list[Any] = [np.array(["b", "a"])] * 5

    encoded = ENCODER.encode_items({"ad": ads, "tags": tags}, 5)

    assert encoded["item.ad"].tolist() == [2, OOV, 4, PAD, 2]
    assert encoded["item.tags"].tolist() == [[3, 2]] * 5
    assert ENCODER.encode_items({"price": prices}, 4)["item.price"].tolist() == [1.0, 1.0, 1.0, 0.0]


def test_an_infinite_category_is_the_one_value_it_was_in_training():
    schema = SchemaSpec(fields=(FieldSpec(name="x", kind="categorical", group="item"),)).fit(
        {"x": [float("inf"), -float("inf"), "nan"]}
    )

    encoded = Encoder(schema).encode_items({"x": [float("inf"), "inf", "nan", float("nan")]}, 4)

    assert encoded["item.x"].tolist() == [3, 3, 4, PAD]


def test_a_negative_number_is_the_value_it_is_spelled_as():
    schema = SchemaSpec(fields=(FieldSpec(name="x", kind="categorical", group="item"),)).fit({"x": [-7, -0.5, "-x"]})

    spelled = Encoder(schema).encode_items({"x": ["-7", "-0.5", "-x"]}, 3)["item.x"].tolist()

    assert Encoder(schema).encode_items({"x": [-7, -0.5, "-x"]}, 3)["item.x"].tolist() == spelled
    assert OOV not in spelled


def test_an_absent_value_takes_no_place_in_a_list():
    encoded = ENCODER.encode_items({"tags": [[None, "b", "", "a"], [float("nan")], ["a", None]]}, 3)

    assert encoded["item.tags"].tolist() == [[3, 2], [PAD, PAD], [2, PAD]]


@pytest.mark.parametrize("ts", [float("nan"), float("inf"), -1e300])
def test_a_time_that_is_none_is_refused_where_a_clock_field_needs_it(ts):
    with pytest.raises(EncodingError, match="field hour, row 0: expected a time in Unix seconds"):
        ENCODER.encode(request(ts=ts))


def test_the_clock_is_right_before_1970_and_far_from_now():
    assert ENCODER.encode(request(ts=-1.0))["ctx.hour"].tolist() == [23 + 2]
    assert ENCODER.encode(request(ts=-1.0))["ctx.weekday"].tolist() == [2 + 2]
    assert ENCODER.encode(request(ts=9e11))["ctx.hour"].tolist() == [int(9e11 // 3600 % 24) + 2]


def test_concat_points_every_candidate_at_its_own_user():
    one = ENCODER.encode(request())
    two = ENCODER.encode(request(user={"user": "u2"}, num_items=1, items={"ad": [3]}))

    joined = concat([one, two, one])

    assert joined["user_index"].tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert joined["user.user"].tolist() == [2, 3, 2]
    assert joined["item.ad"].tolist() == [2, OOV, PAD, 4, 2, OOV, PAD]


@pytest.mark.parametrize(
    ("items", "field", "row", "expected"),
    [
        ({"ad": [1, [2], 3]}, "ad", 1, "a string or a number"),
        ({"ad": [1, 2, {"x": 1}]}, "ad", 2, "a string or a number"),
        ({"ad": [1, (2,), 3]}, "ad", 1, "a string or a number"),
        ({"tags": [["a"], "a", ["b"]]}, "tags", 1, "a list of strings or numbers"),
        ({"tags": [["a"], ["b"], ["a", ["b"]]]}, "tags", 2, "a list of strings or numbers"),
        ({"price": [1.0, "9.5", 2.0]}, "price", 1, "a number"),
        ({"price": [True, 1, 2]}, "price", 0, "a number"),
        ({"price": [1.0, 1.0, float("inf")]}, "price", 2, "a finite number"),
        ({"ad": [1, b"2", 3]}, "ad", 1, "a string or a number"),
        ({"price": [10**301, 10**400, 1.0]}, "price", 1, "a number that fits a double"),
    ],
)
def test_a_value_of_the_wrong_type_names_its_field_and_row(items, field, row, expected):
    with pytest.raises(EncodingError) as caught:
        ENCODER.encode(request(items=items))

    assert (caught.value.field.name, caught.value.row, caught.value.expected) == (field, row, expected)


def test_an_absurd_number_stays_within_float32():
    field = FieldSpec(name="x", kind="numeric", group="item", clip=False)
    schema = SchemaSpec(fields=(field,)).fit({"x": [0.0, 2.0]})

    assert Encoder(schema).encode_items({"x": [1.7e308, -1.7e308, 2.0]}, 3)["item.x"].tolist() == [100.0, -100.0, 1.0]


def test_a_number_far_beyond_a_tiny_scale_stays_within_float32_too():
    field = FieldSpec(name="x", kind="numeric", group="item", clip=False)
    schema = SchemaSpec(fields=(field,)).fit({"x": [0.0, 1e-9]})

    assert Encoder(schema).encode_items({"x": [1e308]}, 1)["item.x"].tolist() == [100.0]
