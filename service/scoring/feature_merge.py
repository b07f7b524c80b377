"""One raw request out of two sources: what the client sent, and what the store has. The client's values win."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from models.features.column_encoding import EncodingError
from models.features.encoder import Encoder
from models.features.field import Field
from models.features.history import Event
from models.features.schema import Schema
from models.features.values import Row, Value
from service.errors import MAX_ERRORS, FieldError, pointer, shown


class Unreadable(ValueError):  # noqa: N818 - a state of a request, not of the program
    """A candidate's features that are no JSON object: what is wrong, and where, the body has to tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """The ads to score, in the client's order: their features as JSON, or as columns. The other one is None."""

    ids: Sequence[str]
    features: Sequence[msgspec.Raw | msgspec.UnsetType] | None
    columns: Mapping[str, Sequence[Value]] | None

    def keys(self) -> Sequence[str | tuple[str, bytes]]:
        """What tells two candidates apart: the item, and the features that came with it, unread."""
        if self.features is None:
            return self.ids
        return [
            item if sent is msgspec.UNSET else (item, bytes(sent))
            for item, sent in zip(self.ids, self.features, strict=True)
        ]

    def row(self, position: int) -> Row:
        """The features that came with one candidate as a list of rows; none in columns. Raises Unreadable."""
        sent = msgspec.UNSET if self.features is None else self.features[position]
        if isinstance(sent, msgspec.UnsetType):
            return {}
        try:
            return _FEATURES.decode(sent) or {}
        except (msgspec.MsgspecError, UnicodeDecodeError) as err:
            raise Unreadable(str(err)) from None

    def column(self, name: str) -> Sequence[Value]:
        """One feature of every candidate, None where it was not given. Slow for a list of rows."""
        if self.columns is None:
            return [self.row(position).get(name) for position in range(len(self.ids))]
        return self.columns.get(name) or [None] * len(self.ids)

    def gives(self, name: str, position: int) -> bool:
        """Whether a column brings this candidate's feature."""
        return self.columns is not None and name in self.columns and self.columns[name][position] is not None

    def pointer(self, row: int, name: str) -> str:
        parts = ("candidates", name, row) if self.features is None else ("candidates", row, "features", name)
        return pointer(*parts)


_FEATURES: msgspec.json.Decoder[dict[str, Any] | None] = msgspec.json.Decoder(dict[str, Any] | None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What the client sent of features. `behaviours` is None where the store's count."""

    user: str | None
    user_features: Row
    context: Row
    ts: float
    behaviours: Sequence[Event] | None
    candidates: Candidates


def profile(schema: Schema, given: Given, stored: Row | None) -> Row:
    """The user's features: an absent or null one of the client leaves the store's in place."""
    user = {**(stored or {}), **_present(given.user_features)}
    if schema.user_key is not None:
        user[schema.user_key] = given.user
    return user


def completed(event: Event, item: Row | None) -> Event:
    """A client's behaviour with its item's stored features, where the client gave none."""
    return Event(item=event.item, ts=event.ts, features={**(item or {}), **_present(event.features)})


def missing(schema: Schema, given: Given, *, items: bool) -> list[str]:
    """The `degraded` reasons of a request that the store could not serve: what its model would have read from there.

    `items` tells whether features of its candidates, or of the items of its own behaviours, are among that.
    """
    reasons = []
    if schema.history_length and given.user is not None and given.behaviours is None:
        reasons.append("behaviours_unavailable")
    if items:
        reasons.append("item_features_unavailable")
    own = _present(given.user_features)
    if given.user is not None and any(f.name not in own for f in schema.group("user") if f.name != schema.user_key):
        reasons.append("user_features_unavailable")
    return reasons


def lack_features(schema: Schema, own: Sequence[Event]) -> bool:
    """Whether a client's behaviours lack a value that the store may have for their items."""
    fields = repeated(schema)
    return any(event.features.get(f.name) is None for event in own for f in fields)


def bad_values(encoder: Encoder, given: Given) -> list[FieldError]:
    """The client's values that cannot be encoded, every one by its pointer. Slow: for requests already known as bad."""
    schema = encoder.schema
    errors: list[FieldError] = []

    def check(field: Field, value: Value, at: str) -> None:
        err = _refusal(encoder, field, value)
        if err is not None and len(errors) < MAX_ERRORS:
            errors.append(FieldError(pointer=at, expected=err.expected, got=shown(value)))

    for field in schema.group("user"):
        if field.name != schema.user_key:
            check(field, given.user_features.get(field.name), pointer("user", "features", field.name))
    for field in schema.group("context"):
        check(field, given.context.get(field.name), pointer("context", field.name))
    for field in schema.group("item"):
        if field.name != schema.item_key:
            for row, value in enumerate(given.candidates.column(field.name)):
                check(field, value, given.candidates.pointer(row, field.name))
    for position, event in enumerate(given.behaviours or ()):
        for field in repeated(schema):
            check(field, event.features.get(field.name), pointer("behaviours", position, "features", field.name))
    return errors


def cleaned(encoder: Encoder, row: Row | None, fields: Sequence[Field]) -> tuple[Row, set[str]]:
    """A stored row without the values that cannot be encoded, and whose those were. Slow: for rows known as bad."""
    bad = {f.name for f in fields if row and _refusal(encoder, f, row.get(f.name)) is not None}
    return {name: value for name, value in (row or {}).items() if name not in bad}, bad


def repeated(schema: Schema) -> list[Field]:
    """The item fields whose values a history repeats, but for the id."""
    sources = {sequence.of for sequence in schema.group("behaviour")}
    return [field for field in schema.group("item") if field.name in sources and field.name != schema.item_key]


def _refusal(encoder: Encoder, field: Field, value: Value) -> EncodingError | None:
    if value is None:
        return None
    try:
        encoder.encode_column(field, [value])
    except EncodingError as err:
        return err
    return None


def _present(row: Row) -> dict[str, Value]:
    return {name: value for name, value in row.items() if value is not None}
