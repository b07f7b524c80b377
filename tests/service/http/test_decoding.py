"""A refused body names its first bad value: exactly where it is, what was expected there, and what came."""

import copy
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from service.errors import FieldError, InvalidValue, Refusal, pointer
from service.http.decoding import Decoder
from service.http.problems import NotJSON
from service.http.schemas import PredictRequest, scoring_request
from service.ids import Id
from service.scoring.request import MalformedFeatures

DECODER = Decoder(PredictRequest)
Path = tuple[str | int, ...]

VALID: dict[str, Any] = {
    "request_id": "r1",
    "ts": 9.5,
    "user": {"id": "u1", "features": {"gender": "F", "a/b~c": [1, "x"]}},
    "context": {"hour": 21, "device": {"os": ["x"]}, "é": None},
    "candidates": [{"id": "a1", "features": {"price": 9.5, "tags": ["x", 2]}}, {"id": 2}, {"id": 3, "features": None}],
    "behaviours": [{"item": "a1", "ts": 1}, {"item": 7, "ts": 2.5, "features": {"price": 1}}],
    "timeout_ms": 20,
    "explain": False,
}
COLUMNS: dict[str, Any] = {"candidates": {"id": ["a1", 2], "price": [1, None], "tags": [["x"], []]}, "ts": 5}


def read(body: bytes) -> PredictRequest:
    """Decodes a request and all of its candidates' features, as scoring does."""
    sent = DECODER.decode(body)
    if isinstance(sent.candidates, list) and sent.candidates:
        request = scoring_request(sent, now=0.0, max_candidates=1000)
        try:
            for position in range(len(sent.candidates)):
                request.candidates.row(position)
        except MalformedFeatures as err:
            raise DECODER.refusal(body, str(err)) from None
    return sent


def refusal(body: bytes | dict[str, Any]) -> Refusal:
    with pytest.raises(Refusal) as refused:
        read(body if isinstance(body, bytes) else json.dumps(body).encode())
    return refused.value


def only_error(body: bytes | dict[str, Any]) -> FieldError:
    refused = refusal(body)
    assert isinstance(refused, InvalidValue), refused
    (error,) = refused.errors
    return error


def places(value: Any, at: Path = ()) -> list[Path]:
    """The paths of a value and of all inside it, in the order in which they are written."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for step, item in inside for path in places(item, (*at, step)))]


def at(document: Any, path: Path) -> Any:
    for step in path:
        document = document[step]
    return document


def with_value(document: dict[str, Any], path: Path, value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(document)
    at(changed, path[:-1])[path[-1]] = value
    return changed


documents = st.sampled_from([VALID, COLUMNS])
STRUCTS: dict[Path, set[str]] = {
    (): {"candidates"},
    ("user",): set(),
    **{("candidates", position): {"id"} for position in range(3)},
    **{("behaviours", position): {"item", "ts"} for position in range(2)},
}
"""The objects of VALID whose fields are fixed, and the required ones."""


@pytest.mark.parametrize("document", [VALID, COLUMNS])
def test_the_requests_that_the_laws_below_change_are_valid(document: dict[str, Any]) -> None:
    assert read(json.dumps(document).encode()).candidates


@given(document=documents, data=st.data(), value=st.sampled_from([None, True, -7, 2.5, "x", [], {}]))
def test_a_value_of_another_type_is_named_by_its_place(document: dict[str, Any], data: st.DataObject, value: Any):
    path = data.draw(st.sampled_from(places(document)))
    assume(type(value) is not type(at(document, path)))
    body = json.dumps(with_value(document, path, value)).encode()

    try:
        read(body)
    except InvalidValue as refused:
        (error,) = refused.errors
        assert error.pointer == pointer(*path)
        assert error.got in ("null", "true", "-7", "2.5", '"x"', "a list of 0", "an object")
    else:
        assume(False)  # a place that takes values of this type too


@pytest.mark.parametrize(
    ("path", "types"),
    [
        (("request_id",), "nis"),
        (("ts",), "nif"),
        (("user",), "no"),
        (("user", "id"), "nis"),
        (("user", "features"), "no"),
        (("context",), "no"),
        (("candidates",), "lo"),
        (("candidates", 0), "o"),
        (("candidates", 0, "id"), "is"),
        (("candidates", 0, "features"), "no"),
        (("behaviours",), "nl"),
        (("behaviours", 1, "ts"), "if"),
        (("explain",), "nb"),
    ],
)
def test_a_place_refuses_every_type_but_its_own(path: Path, types: str) -> None:
    values: dict[str, Any] = {"n": None, "b": True, "i": 7, "f": 2.5, "s": "x", "l": [], "o": {}}
    for name, value in values.items():
        if name not in types:
            assert only_error(with_value(VALID, path, value)).pointer == pointer(*path)


@given(path=st.sampled_from([(*path, name) for path, required in STRUCTS.items() for name in required]))
def test_a_required_field_that_is_missing_is_named(path: Path) -> None:
    body = copy.deepcopy(VALID)
    del at(body, path[:-1])[path[-1]]

    error = only_error(body)

    assert (error.pointer, error.got) == (pointer(*path), "nothing")


@given(
    path=st.sampled_from(list(STRUCTS)),
    name=st.text(max_size=30) | st.just("x` - at `$.ts") | st.just("\ud800") | st.just("user_id"),
    value=st.sampled_from([1, None, {"id": "x"}]),
)
def test_an_unknown_field_is_named(path: Path, name: str, value: Any) -> None:
    assume(name not in (*VALID, "id", "features", "item", "` - at `$.ts"))

    error = only_error(with_value(VALID, (*path, name), value))

    assert error.pointer == pointer(*path, name)
    assert error.expected.startswith("one of ")
    assert error.got.startswith(f"an unknown field {json.dumps(name)}")


BAD_LITERALS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, r'"\ud800"', r'"a\\\udfff\ud83d\ude00"']


@given(document=documents, data=st.data(), literal=st.sampled_from(BAD_LITERALS), indent=st.sampled_from([None, 1]))
def test_what_json_or_a_double_cannot_hold_is_named_by_its_place(
    document: dict[str, Any], data: st.DataObject, literal: str, indent: int | None
) -> None:
    path = data.draw(st.sampled_from(places(document)))
    text = json.dumps(with_value(document, path, "BAD NUMBER: NaN"), indent=indent)
    body = text.replace('"BAD NUMBER: NaN"', literal).encode()

    assert only_error(body).pointer == pointer(*path)


@given(document=documents, data=st.data())
def test_a_name_that_is_no_unicode_is_named_by_its_place(document: dict[str, Any], data: st.DataObject) -> None:
    objects = [path for path in places(document) if isinstance(at(document, path), dict) and "candidates" not in path]
    path = data.draw(st.sampled_from(objects))

    error = only_error(with_value(document, (*path, "x\udfff"), data.draw(st.sampled_from([1, {"a": [1]}, "y"]))))

    assert error.pointer == pointer(*path, "x\udfff")


@given(data=st.data())
def test_of_two_bad_values_the_first_is_named(data: st.DataObject) -> None:
    bad = [("user", "id"), ("context",), ("candidates", 0, "features"), ("candidates", 1, "id"), ("behaviours", 0)]
    first, second = sorted(data.draw(st.permutations(bad))[:2], key=bad.index)

    body = with_value(with_value(VALID, first, True), second, False)

    assert only_error(body).pointer == pointer(*first)


EXPECTED: dict[str, tuple[str, FieldError]] = {
    "an id": (
        '{"candidates": [{"id": 1.5}]}',
        FieldError(pointer="/candidates/0/id", expected="a string of 1 to 256 characters or an integer", got="1.5"),
    ),
    "a time": (
        '{"candidates": [{"id": 1}], "ts": "now"}',
        FieldError(pointer="/ts", expected="a number >= 0 and < 253402300800", got='"now"'),
    ),
    "a missing time": (
        '{"candidates": [{"id": 1}], "behaviours": [{"item": 1}]}',
        FieldError(pointer="/behaviours/0/ts", expected="a number >= 0 and < 253402300800", got="nothing"),
    ),
    "candidates": (
        '{"candidates": "a1"}',
        FieldError(pointer="/candidates", expected="a list or an object", got='"a1"'),
    ),
    "features": (
        '{"candidates": [{"id": 1, "features": [1]}]}',
        FieldError(pointer="/candidates/0/features", expected="an object", got="a list of 1"),
    ),
    "a truth value": (
        '{"candidates": [{"id": 1}], "explain": 1}',
        FieldError(pointer="/explain", expected="true or false", got="1"),
    ),
    "an unknown field": (
        '{"candidates": [{"id": 1, "feature": {}}]}',
        FieldError(
            pointer="/candidates/0/feature",
            expected="one of id, features",
            got='an unknown field "feature" (did you mean features?)',
        ),
    ),
    "NaN": (
        '{"candidates": {"id": [1], "price": [NaN]}}',
        FieldError(
            pointer="/candidates/price/0", expected="a JSON value of valid Unicode and finite numbers", got="NaN"
        ),
    ),
    "a repeated name": (
        '{"ts": "now", "ts": 1, "candidates": [{"id": 1}]}',
        FieldError(pointer="/ts", expected="a valid body", got="Expected `float | null`, got `str` - at `$.ts`"),
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_error_says_what_was_expected_and_what_came(name: str) -> None:
    body, error = EXPECTED[name]

    assert only_error(body.encode()) == error


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"hello", "not JSON: Expecting value at byte 0 (line 1, column 1)"),
        ('{\n"é": é}'.encode(), "at byte 8 (line 2, column 6)"),
        (b'{"candidates": [{"id": 1}', "at byte 25 (line 1, column 26)"),
        (b'{"candidates": [{"id": 1.5}, }', "at byte 29 (line 1, column 30)"),
        (b'{"ts": NaN, "candidates": [{"id": 1}', "at byte 36 (line 1, column 37)"),
        ('{"é":\n"x'.encode() + b'\xff"}', "not UTF-8: 0xff at byte 9 (line 2, column 3)"),
        (b'{"candidates": [{"id": 1, "features": {"x": "\xff"}}]}', "not UTF-8: 0xff at byte 45"),
    ],
)
def test_what_is_no_json_is_refused_with_the_place_of_the_fault(body: bytes, says: str) -> None:
    refused = refusal(body)

    assert isinstance(refused, NotJSON)
    assert says in refused.detail


def test_endless_nesting_is_pythons_own_error() -> None:
    body = b'{"candidates": 0, "context": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}"

    with pytest.raises(RecursionError):
        DECODER.decode(body)


def test_any_type_can_be_decoded_and_refused() -> None:
    with pytest.raises(InvalidValue) as refused:
        Decoder(dict[str, list[Id]]).decode(b'{"a": [1], "b/": [1, "x", ""]}')

    assert [error.pointer for error in refused.value.errors] == ["/b~1/2"]


WIDE: dict[str, Callable[[], bytes]] = {
    "candidates": lambda: b'{"candidates": [' + b'{"id": 1},' * 100_000 + b'{"id": 1.5}]}',
    "names": lambda: b'{"candidates": {' + b",".join(b'"%x": []' % i for i in range(100_000)) + b', "z": 1}}',
    "strings": lambda: b'{"context": {' + b",".join(b'"%x": "y"' % i for i in range(80_000)) + b', "z": NaN}}',
    "escapes": lambda: b'{"context": {"x": "' + rb"\ud83d\ude00" * 80_000 + rb'", "y": "\ud83d"}}',
    "depth": lambda: b'{"context": ' + b'{"a": [{}, ' * 150 + b"[" + b"1," * 400_000 + b"NaN]" + b"]}" * 150 + b"}",
}


@pytest.mark.parametrize("name", WIDE)
def test_a_large_body_is_refused_in_a_small_multiple_of_the_time_it_takes_to_parse(name: str) -> None:
    body, ratios = WIDE[name](), []

    for _ in range(3):
        started = time.process_time()
        json.loads(body)
        parsed = time.process_time()
        refusal(body)
        ratios.append((time.process_time() - parsed) / (parsed - started))

    assert min(ratios) < 15  # a step of a walker for each value, or a second pass for each level, takes more


def test_a_column_of_features_is_refused_with_the_right_form() -> None:
    sent = DECODER.decode(b'{"candidates": {"id": ["a1"], "features": [{"price": 1}]}}')

    with pytest.raises(InvalidValue) as refused:
        scoring_request(sent, now=0.0, max_candidates=10)

    (error,) = refused.value.errors
    assert error.pointer == "/candidates/features"
    assert '{"id": [...], "price": [...]}' in error.expected


@pytest.mark.parametrize(
    ("columns", "wrong"),
    [
        ({"id": ["a", "", 1.5], "price": [1, 2, 3]}, "/candidates/id/1"),
        ({"id": ["a"], "price": [], "tags": []}, "/candidates/price"),
        ({"id": []}, "/candidates"),
        ({"price": [1]}, "/candidates/id"),
        ({"id": ["a"] * 11}, "/candidates"),
    ],
)
def test_columns_that_do_not_fit_are_refused_with_the_first_error(columns: dict[str, Any], wrong: str) -> None:
    sent = DECODER.decode(json.dumps({"candidates": columns}).encode())

    with pytest.raises(InvalidValue) as refused:
        scoring_request(sent, now=0.0, max_candidates=10)

    assert [error.pointer for error in refused.value.errors] == [wrong]
