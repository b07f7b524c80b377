"""From a request's bytes to a typed value: one fast pass, and for a refused body a slow one that finds every error."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import inspect

from service.errors import MAX_ERRORS, FieldError, InvalidValue, Refusal, pointer, shown
from service.http.problems import NotJSON

T = TypeVar("T")
_Path = tuple[str | int, ...]
MAX_LOOKS = 50_000  # values that a refusal looks at, beside plain ones: the process has others to answer
_READ_LATER = inspect.type_info(dict[str, Any] | None)


class Decoder(Generic[T]):
    """Decodes JSON as one type, strictly: no conversion, no unknown field, no NaN.

    Raises Refusal (400 or 422), and RecursionError for lists and objects nested too deep.
    """

    def __init__(self, wanted: type[T]) -> None:
        self._decoder = msgspec.json.Decoder(wanted)
        self._wanted = inspect.type_info(wanted)

    def decode(self, body: bytes) -> T:
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as err:
            raise self.refusal(body, str(err)) from None

    def refusal(self, body: bytes, reason: str) -> Refusal:
        """What is wrong with a body that could not be decoded, or not what it left to be read later (`msgspec.Raw`)."""
        errors = Misfits().of(_parse(body), self._wanted)
        # The last resort keeps the promise that whatever the decoder refuses is a client's error.
        return InvalidValue(errors or [FieldError(pointer="", expected="a valid body", got=reason)])


class Misfits:
    """Finds every place where a decoded value is not what is wanted, as far as MAX_ERRORS and MAX_LOOKS.

    Names of fields come before values, so that one unknown name is found beside any number of those.
    """

    def __init__(self) -> None:
        self._looks = MAX_LOOKS

    def of(self, value: object, wanted: inspect.Type) -> list[FieldError]:
        errors: list[FieldError] = []
        self._check(value, wanted, (), errors)
        return errors

    def _check(self, value: object, wanted: inspect.Type, at: _Path, errors: list[FieldError]) -> None:
        self._looks -= 1
        if isinstance(wanted, inspect.Metadata):
            wanted = wanted.type
        if isinstance(wanted, inspect.RawType):
            wanted = _READ_LATER
        if not _fits(value, wanted):
            errors.append(FieldError(pointer=pointer(*at), expected=expected(wanted), got=_got(value)))
            return
        if isinstance(wanted, inspect.UnionType):
            wanted = next(member for member in wanted.types if _fits(value, member))
        match wanted, value:
            case inspect.StructType(), dict():
                self._check_fields(value, wanted, at, errors)
            case inspect.DictType(value_type=inner), dict():
                odd = ((name, name) for name in value if not _is_text(name))
                self._check_members(odd, inspect.StrType(), at, errors)
                self._check_members(value.items(), inner, at, errors)
            case inspect.ListType(item_type=inner), list():
                self._check_members(enumerate(value), inner, at, errors)
            case inspect.AnyType(), dict():
                self._check(value, inspect.DictType(inspect.StrType(), inspect.AnyType()), at, errors)
            case inspect.AnyType(), list():
                self._check(value, inspect.ListType(inspect.AnyType()), at, errors)

    def _check_fields(
        self, value: dict[str, object], wanted: inspect.StructType, at: _Path, errors: list[FieldError]
    ) -> None:
        fields = {field.encode_name: field for field in wanted.fields}
        unknown = [name for name in value if name not in fields] if wanted.forbid_unknown_fields else []
        for name in unknown[:MAX_ERRORS]:
            known = f"one of {', '.join(fields)}"
            errors.append(FieldError(pointer=pointer(*at, name), expected=known, got=f"an unknown field {shown(name)}"))
        for name, field in fields.items():
            if field.required and name not in value:
                errors.append(FieldError(pointer=pointer(*at, name), expected=expected(field.type), got="nothing"))
        for name, item in value.items():
            if name in fields:
                self._check_members([(name, item)], fields[name].type, at, errors)

    def _check_members(
        self, members: Iterable[tuple[str | int, object]], wanted: inspect.Type, at: _Path, errors: list[FieldError]
    ) -> None:
        plain = _plain(wanted)
        for place, item in members:
            if type(item) in plain:
                continue
            if self._looks <= 0 or len(errors) >= MAX_ERRORS:
                return
            self._check(item, wanted, (*at, place), errors)


@dataclass(frozen=True, slots=True)
class _NotANumber:
    """A literal that Python reads as a number and JSON, or a double, cannot hold: NaN, Infinity, 1e999."""

    text: str


def _parse(body: bytes) -> object:
    try:
        return json.loads(body.decode(), parse_constant=_NotANumber, parse_float=_finite, parse_int=_whole)
    except UnicodeDecodeError as err:
        raise NotJSON(f"the body is not UTF-8: byte {err.start} is {body[err.start]:#04x}") from None
    except json.JSONDecodeError as err:
        detail = "it is empty" if not body.strip() else f"{err.msg} at line {err.lineno}, column {err.colno}"
        raise NotJSON(f"the body is not JSON: {detail}") from None


def _finite(text: str) -> float | _NotANumber:
    number = float(text)
    return number if math.isfinite(number) else _NotANumber(text)


def _whole(text: str) -> int | _NotANumber:
    try:
        return int(text)
    except ValueError:  # thousands of digits: more than Python converts, and than the fast pass takes
        return _NotANumber(text)


def _plain(wanted: inspect.Type) -> set[type]:
    """Types of which every decoded value is what is wanted."""
    match wanted:
        case inspect.UnionType(types=members):
            return set().union(*map(_plain, members))
        case inspect.AnyType():
            return {int, float, bool, type(None)}
        case inspect.NoneType():
            return {type(None)}
        case inspect.BoolType():
            return {bool}
        case inspect.IntType(gt=None, ge=None, lt=None, le=None, multiple_of=None):
            return {int}
        case inspect.FloatType(gt=None, ge=None, lt=None, le=None, multiple_of=None):
            return {int, float}
        case _:
            return set()


def _fits(value: object, wanted: inspect.Type) -> bool:
    """Whether a value is of the right kind, its members not looked at."""
    match wanted:
        case inspect.AnyType():
            return not isinstance(value, _NotANumber) and (not isinstance(value, str) or _is_text(value))
        case inspect.UnionType(types=members):
            return any(_fits(value, member) for member in members)
        case inspect.StructType() | inspect.DictType():
            return isinstance(value, dict)
        case inspect.ListType():
            return isinstance(value, list)
        case inspect.NoneType():
            return value is None
        case inspect.LiteralType(values=allowed):
            return value in allowed
        case inspect.BoolType():
            return isinstance(value, bool)
        case inspect.StrType(min_length=least, max_length=most):
            return isinstance(value, str) and _is_text(value) and (least or 0) <= len(value) <= (most or math.inf)
        case inspect.IntType():
            return isinstance(value, int) and not isinstance(value, bool)
        case inspect.FloatType():
            return isinstance(value, int | float) and not isinstance(value, bool) and _within(value, wanted)
        case _:
            return True


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _within(value: float, wanted: inspect.FloatType) -> bool:
    return (
        (wanted.ge is None or value >= wanted.ge)
        and (wanted.gt is None or value > wanted.gt)
        and (wanted.le is None or value <= wanted.le)
        and (wanted.lt is None or value < wanted.lt)
    )


def expected(wanted: inspect.Type) -> str:
    """A type in a client's words."""
    match wanted:
        case inspect.UnionType(types=members):
            return " or ".join(expected(member) for member in _present(members))
        case inspect.StructType() | inspect.DictType():
            return "an object"
        case inspect.ListType():
            return "a list"
        case inspect.LiteralType(values=allowed):
            return " or ".join(map(shown, allowed))
        case inspect.BoolType():
            return "true or false"
        case inspect.StrType(max_length=None):
            return "a string of valid Unicode"
        case inspect.StrType(min_length=least, max_length=most):
            return f"a string of {least or 0} to {most} characters"
        case inspect.IntType():
            return "an integer"
        case inspect.FloatType():
            signs = ((wanted.ge, ">="), (wanted.gt, ">"), (wanted.le, "<="), (wanted.lt, "<"))
            bounds = [f"{sign} {bound:.0f}" for bound, sign in signs if bound is not None]
            return " ".join(["a number", " and ".join(bounds)]).strip()
        case _:
            return "a JSON value of valid Unicode and finite numbers"


def _present(members: Sequence[inspect.Type]) -> list[inspect.Type]:
    return [member for member in members if not isinstance(member, inspect.NoneType)]


def _got(value: object) -> str:
    return value.text[:40] if isinstance(value, _NotANumber) else shown(value)
