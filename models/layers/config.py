"""A model's options as a value: named, typed, checked when made."""

import math
from dataclasses import dataclass, fields
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True, kw_only=True)
class Within:
    """low <= number, number < below, and number <= most, where these are given."""

    low: float
    below: float = math.inf
    most: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.low <= number <= self.most and number < self.below

    def __str__(self) -> str:
        ends = {"below": self.below, "at most": self.most}
        return " and ".join([f"at least {self.low:g}", *(f"{w} {end:g}" for w, end in ends.items() if end < math.inf)])


Count = Annotated[int, Within(low=1, below=1e9)]
Share = Annotated[float, Within(low=0, below=1)]
Mix = Annotated[float, Within(low=0, most=1)]
Weight = Annotated[float, Within(low=0)]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every model's options: a value of another type, or out of range, raises ValueError when it is made."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for option in fields(self):
            value = getattr(self, option.name)
            expected = _mismatch(value, hints[option.name])
            if expected is not None:
                raise ValueError(f"option {option.name}: expected {expected}, got {value!r}")


def _mismatch(value: object, hint: Any) -> str | None:
    """What the type hint asks for, in words, where the value does not fit it; else None."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        base, limit = args
        wrong = _mismatch(value, base)
        if wrong is not None:
            return f"{wrong}, {limit}"
        return None if value in limit else f"{_WORDS[base]}, {limit}"
    if origin is Literal:
        return None if isinstance(value, str) and value in args else f"one of {', '.join(args)}"
    if origin is tuple:
        inner = _WORDS[get_args(args[0])[0]]
        fits = isinstance(value, tuple) and all(_mismatch(v, args[0]) is None for v in value)
        return None if fits else f"a list, each {inner}, {get_args(args[0])[1]}"
    if NoneType in args:
        wrong = _mismatch(value, args[0])
        return None if value is None or wrong is None else f"{wrong}, or nothing"
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number and math.isfinite(value) else _WORDS[float]  # type: ignore[arg-type]  # a number by now
    fits = type(value) is hint
    return None if fits else _WORDS[hint]


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
