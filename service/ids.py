"""What a client may send as an id and as a time: one rule for every route."""

from typing import Annotated, TypeGuard

from msgspec import Meta

MAX_ID_LENGTH = 256
MAX_AHEAD_S = 300.0  # how far the clock of whoever reports a click may run before ours
YEAR_10000 = 253_402_300_800  # beyond it there are no dates; a time in milliseconds lands there too

# No floats: 42.0 may be an id that some library turned into a double, and above 2**53 that is no longer the same id.
Id = Annotated[str, Meta(min_length=1, max_length=MAX_ID_LENGTH)] | int
Time = Annotated[float, Meta(ge=0, lt=YEAR_10000)]


def canonical_id(value: str | int) -> str:
    """An id as everything behind the routes knows it: 42 and "42" are one, as in `models.features.values.canonical`."""
    return value if type(value) is str else str(value)


def is_id(value: object) -> TypeGuard[str | int]:
    return type(value) is int or (type(value) is str and 0 < len(value) <= MAX_ID_LENGTH)
