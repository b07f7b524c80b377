"""JSON decoder of request bodies: typed and strict, and precise about the first value that is wrong.

msgspec says where it stopped. What was expected there, the type at that place says; what came, the body does.
"""

import difflib
import itertools
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

import msgspec
from msgspec import inspect

from service.errors import FieldError, InvalidValue, Refusal, pointer, shown
from service.http.json_types import is_text, members, predicate, words
from service.http.problems import NotJSON

T = TypeVar("T")
_Step = str | int | None  # a field's name, a place in a list, or some key of a dict: msgspec does not say which
_Place = tuple[tuple[str | int, ...], Any]  # a path and the value there


class Decoder(Generic[T]):
    """Decodes JSON as one type: no conversion, no unknown field, no NaN.

    Raises NotJSON (400) or InvalidValue (422), and RecursionError for lists and objects nested too deep.
    """

    def __init__(self, type_: type[T]) -> None:
        eager = _eager(type_)
        self._decoder = msgspec.json.Decoder(type_)
        self._eager_decoder = msgspec.json.Decoder(eager)
        self._type = inspect.type_info(eager)

    def decode(self, body: bytes) -> T:
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as err:
            raise self.refusal(body, str(err)) from None

    def refusal(self, body: bytes, reason: str) -> Refusal:
        """What is wrong with a body that could not be decoded, or with what it left to be read later.

        NaN and halves of surrogate pairs are JSON to Python and none to msgspec, which then gives no path. It gives
        one for a number out of range, so that is put in the place of the first of them: a value, or a name.
        """
        sound = _SOUND.match(body)
        for fault in (b"1e999 ", b'"":1e999 '):
            try:
                self._eager_decoder.decode((sound.group() if sound else b"") + fault)
            except msgspec.ValidationError as err:
                return self._refusal(body, str(err))
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
        return self._refusal(body, reason)

    def _refusal(self, body: bytes, sentence: str) -> Refusal:
        try:
            return InvalidValue([first_error(_parse(body), self._type, sentence)])
        except NotJSON as err:
            return err


# What precedes the first NaN, Infinity, or string with half of a surrogate pair: no N or I, and good strings.
_SOUND = re.compile(
    rb"""(?: [^"NI]++
      | "(?: [^"\\]++ | \\[^u] | \\u(?![dD][89a-fA-F]) | \\u[dD][89abAB]..\\u[dD][c-fC-F].. )*+"
    )*+""",
    re.VERBOSE | re.DOTALL,
)


def first_error(document: object, type_: inspect.Type, sentence: str) -> FieldError:
    """The error of a decoded document at the place that msgspec's sentence names, in a client's words."""
    path = _PATH.search(sentence)
    steps = [int(index) if index else name or None for name, index in _STEP.findall(path[1])] if path else []
    # At the root too: an unknown field may have a name that ends as msgspec's sentences do.
    error = _error_at(steps, document, type_) or _error_at([], document, type_)
    if error is not None:
        return error
    # A name is there twice: msgspec saw its first value, and the document has the last.
    known = itertools.takewhile(lambda step: step is not None, steps)
    return FieldError(pointer=pointer(*map(str, known)), expected="a valid body", got=sentence)


def _error_at(steps: Sequence[_Step], document: object, type_: inspect.Type) -> FieldError | None:
    places: Iterator[_Place] = iter([((), document)])
    for step in steps:
        type_, places = _type_inside(type_, step), _values_inside(places, step)
    fits = predicate(type_)
    for path, value in places:
        if path and not is_text(str(path[-1])):
            return FieldError(pointer=pointer(*path), expected="a name of valid Unicode", got=shown(path[-1]))
        if not fits(value):
            return FieldError(pointer=pointer(*path), expected=words(type_), got=_shown(value))
        error = _field_error(path, value, type_) if isinstance(value, dict) else None
        if error is not None:
            return error
    return None


def _parse(body: bytes) -> object:
    """The body as Python reads JSON: with NaN and infinities. Raises NotJSON."""
    try:
        text = body.decode()
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of more digits than Python and msgspec read
            return json.loads(text, parse_int=_integer)
    except UnicodeDecodeError as err:
        problem, byte = f"not UTF-8: {body[err.start]:#04x}", err.start
    except json.JSONDecodeError as err:
        problem, byte = f"not JSON: {err.msg}", len(err.doc[: err.pos].encode())
    if not body.strip():
        raise NotJSON("the body is not JSON: it is empty")
    *lines, line = body[:byte].decode().split("\n")
    raise NotJSON(f"the body is {problem} at byte {byte} (line {len(lines) + 1}, column {len(line) + 1})")


def _integer(digits: str) -> float:
    return int(digits) if len(digits) <= _MAX_DIGITS else math.inf


_MAX_DIGITS = sys.int_info.default_max_str_digits


def _eager(type_: Any) -> Any:
    """The same type with nothing left to be read later: `msgspec.Raw` becomes an object or null."""
    origin, arguments = get_origin(type_), get_args(type_)
    if type_ is msgspec.Raw or (origin is Annotated and arguments[0] is msgspec.Raw):
        return dict[str, Any] | None
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        fields = msgspec.structs.fields(type_)
        return msgspec.defstruct(
            type_.__name__,
            [(f.name, _eager(f.type)) if f.required else (f.name, _eager(f.type), None) for f in fields],
            rename={f.name: f.encode_name for f in fields},
            forbid_unknown_fields=type_.__struct_config__.forbid_unknown_fields,
            kw_only=True,
        )
    if not arguments:
        return type_
    inner = tuple(map(_eager, arguments))
    return typing.Union[inner] if origin is types.UnionType else origin[inner]  # noqa: UP007 - a tuple of types


_PATH = re.compile(r" - at `\$([^`]*)`$")
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]|\[\.\.\.\]")


def _type_inside(type_: inspect.Type, step: _Step) -> inspect.Type:
    for member in members(type_):
        match member, step:
            case inspect.StructType(fields=fields), str():
                return next((f.type for f in fields if f.encode_name == step), inspect.AnyType())
            case (inspect.DictType(value_type=inner), None) | (inspect.ListType(item_type=inner), int()):
                return inner
    return inspect.AnyType()


def _values_inside(places: Iterator[_Place], step: _Step) -> Iterator[_Place]:
    for path, value in places:
        match step, value:
            case None, dict():
                for name, item in value.items():
                    yield (*path, name), item
            case (str(), dict()) if step in value:
                yield (*path, step), value[step]
            case (int(), list()) if step < len(value):
                yield (*path, step), value[step]


def _field_error(path: tuple[str | int, ...], value: dict[str, Any], type_: inspect.Type) -> FieldError | None:
    """An unknown field of an object, or a missing one."""
    struct = next((member for member in members(type_) if isinstance(member, inspect.StructType)), None)
    if struct is None:
        return None
    fields = {field.encode_name: field for field in struct.fields}
    unknown = next((name for name in value if name not in fields), None)
    if unknown is not None and struct.forbid_unknown_fields:
        close = difflib.get_close_matches(unknown[:40], fields, n=1)
        got = f"an unknown field {shown(unknown)}" + "".join(f" (did you mean {name}?)" for name in close)
        return FieldError(pointer=pointer(*path, unknown), expected=f"one of {', '.join(fields)}", got=got)
    missing = next((name for name, field in fields.items() if field.required and name not in value), None)
    if missing is not None:
        return FieldError(pointer=pointer(*path, missing), expected=words(fields[missing].type), got="nothing")
    return None


def _shown(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "a number that no double holds"
    return shown(value)
