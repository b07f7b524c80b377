"""Types of JSON values in a client's words, and whether a value is of one."""

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import inspect

from service.errors import shown

_KINDS: dict[type[inspect.Type], tuple[str, set[type]]] = {
    inspect.AnyType: (
        "a JSON value of valid Unicode and finite numbers",
        {dict, list, str, int, float, bool, type(None)},
    ),
    inspect.StructType: ("an object", {dict}),
    inspect.DictType: ("an object", {dict}),
    inspect.ListType: ("a list", {list}),
    inspect.StrType: ("a string of valid Unicode", {str}),
    inspect.LiteralType: ("a string", {str}),
    inspect.FloatType: ("a number", {int, float}),
    inspect.IntType: ("an integer", {int}),
    inspect.BoolType: ("true or false", {bool}),
    inspect.NoneType: ("null", {type(None)}),
}
"""What a type is called, and the Python types of its values."""

_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
_SURROGATE = re.compile("[\ud800-\udfff]")


def members(type_: inspect.Type) -> Sequence[inspect.Type]:
    """The types of a union; of any other type, itself."""
    if isinstance(type_, inspect.Metadata):
        type_ = type_.type
    return type_.types if isinstance(type_, inspect.UnionType) else (type_,)


def predicate(type_: inspect.Type) -> Callable[[object], bool]:
    """Whether a value, without those inside it, has the right kind, is in its bounds, and is one that JSON has."""
    checks: dict[type, Callable[[Any], bool]] = {}
    for member in members(type_):
        for kind in _KINDS[type(member)][1]:
            checks[kind] = _check(kind, member)
    return lambda value: checks.get(type(value), _never)(value)


def is_text(value: str) -> bool:
    """Whether a string is Unicode, without half of a surrogate pair."""
    return value.isascii() or not _SURROGATE.search(value)


def words(type_: inspect.Type) -> str:
    """A type as a sentence names it, such as "a string or an integer"; that it may be null goes without saying."""
    names = [_name(member) for member in members(type_) if not isinstance(member, inspect.NoneType)]
    return " or ".join(dict.fromkeys(names)) or "null"


def _name(type_: inspect.Type) -> str:
    match type_:
        case inspect.LiteralType(values=values):
            return " or ".join(map(shown, values))
        case inspect.StrType(min_length=least, max_length=int(most)):
            return f"a string of {least or 0} to {most} characters"
    bounds = " and ".join(f"{sign} {bound:.0f}" for sign, bound in _bounds(type_))
    return f"{_KINDS[type(type_)][0]} {bounds}".strip()


def _bounds(type_: inspect.Type) -> list[tuple[str, float]]:
    """Of a number, or of the length of a string."""
    bounds: tuple[float | None, ...] = (None, None, None, None)
    if isinstance(type_, inspect.FloatType | inspect.IntType):
        bounds = (type_.ge, type_.gt, type_.le, type_.lt)
    elif isinstance(type_, inspect.StrType):
        bounds = (type_.min_length, None, type_.max_length, None)
    return [(sign, bound) for sign, bound in zip(_COMPARE, bounds, strict=True) if bound is not None]


def _check(kind: type, type_: inspect.Type) -> Callable[[Any], bool]:
    """The check of a value that has the right kind."""
    bounds = _bounds(type_)
    if isinstance(type_, inspect.LiteralType):
        return lambda value: value in type_.values
    if kind is str:
        return lambda value: is_text(value) and _within(len(value), bounds)
    if kind is float:
        return lambda value: math.isfinite(value) and _within(value, bounds)
    return lambda value: _within(value, bounds)


def _within(value: float, bounds: Sequence[tuple[str, float]]) -> bool:
    return not bounds or all(_COMPARE[sign](value, bound) for sign, bound in bounds)


def _never(_: object) -> bool:
    return False
