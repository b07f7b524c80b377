"""One raw request out of two sources: what the client sent, and what the store has. The client's values win."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from models.encoding import Arrays, Encoder, EncodingError, Event, Request
from models.schema import Field, Group, Schema
from models.values import Column, Row, Value
from service.errors import MAX_ERRORS, FieldError, pointer, shown
from service.features import Fetched


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """The ads to score, in the client's order, as a list of rows or as columns: one of the two is None."""

    ids: Sequence[str]
    rows: Sequence[Row] | None
    columns: Mapping[str, Sequence[Value]] | None

    def column(self, name: str) -> Sequence[Value] | None:
        """One feature of every candidate; None where no candidate brings it."""
        if self.columns is not None:
            return self.columns.get(name)
        assert self.rows is not None
        values = [row.get(name) for row in self.rows]
        return values if any(value is not None for value in values) else None

    def names(self) -> set[str]:
        return set(self.columns) if self.columns is not None else set().union(*(self.rows or ()))

    def pointer(self, row: int, name: str) -> str:
        parts = ("candidates", name, row) if self.rows is None else ("candidates", row, "features", name)
        return pointer(*parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What the client sent of features. `behaviours` is None where the store's count."""

    user: str | None
    user_features: Row
    context: Row
    ts: float
    behaviours: Sequence[Event] | None
    candidates: Candidates


def assemble(schema: Schema, given: Given, stored: Fetched, past: Sequence[Event]) -> Request:
    """The request as the encoder takes it. `stored.items` stand in the candidates' order; `past` is the history.

    An absent or null feature of the client leaves the store's in place.
    """
    user = {**(stored.user or {}), **_present(given.user_features)}
    if schema.user_key is not None:
        user[schema.user_key] = given.user
    items: dict[str, Column] = {}
    for field in schema.group("item"):
        column = _merged(given.candidates.column(field.name), stored.items, field.name)
        if column is not None:
            items[field.name] = column
    if schema.item_key is not None:
        items[schema.item_key] = given.candidates.ids
    return Request(
        user=_of_fields(schema.group("user"), user),
        context=_of_fields(schema.group("context"), given.context),
        ts=given.ts,
        behaviours=past,
        items=items,
        num_items=len(given.candidates.ids),
    )


def completed(event: Event, item: Row | None) -> Event:
    """A client's behaviour with its item's stored features, where the client gave none."""
    return Event(item=event.item, ts=event.ts, features={**(item or {}), **_present(event.features)})


def missing(schema: Schema, given: Given) -> list[str]:
    """The `degraded` reasons of a request that the store could not serve: what its model would have read from there."""
    reasons = []
    if schema.history_length and given.user is not None and given.behaviours is None:
        reasons.append("behaviours_unavailable")
    if any(_has_gaps(given.candidates.column(f.name)) for f in schema.group("item") if f.name != schema.item_key):
        reasons.append("item_features_unavailable")
    own = _present(given.user_features)
    if given.user is not None and any(f.name not in own for f in schema.group("user") if f.name != schema.user_key):
        reasons.append("user_features_unavailable")
    return reasons


def unknown_names(schema: Schema, given: Given) -> int:
    """How many features the client named that the model does not have."""
    groups: Iterable[tuple[Iterable[str], Group]] = (
        (given.user_features, "user"),
        (given.context, "context"),
        (given.candidates.names(), "item"),
    )
    return sum(len(set(names) - {field.name for field in schema.group(group)}) for names, group in groups)


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
            for row, value in enumerate(given.candidates.column(field.name) or ()):
                check(field, value, given.candidates.pointer(row, field.name))
    for position, event in enumerate(given.behaviours or ()):
        for field in _repeated(schema):
            check(field, event.features.get(field.name), pointer("behaviours", position, "features", field.name))
    return errors


def cleaned(encoder: Encoder, stored: Fetched, past: Sequence[Event]) -> tuple[Fetched, list[Event]]:
    """What the store gave without the values that cannot be encoded. Slow: for rows already known as bad."""

    def clean(row: Row, fields: Sequence[Field]) -> Row:
        bad = {f.name for f in fields if _refusal(encoder, f, row.get(f.name)) is not None}
        return {name: value for name, value in row.items() if name not in bad}

    user, item, repeated = encoder.schema.group("user"), encoder.schema.group("item"), _repeated(encoder.schema)
    rows = [clean(row, item) if row else row for row in stored.items]
    profile = clean(stored.user, user) if stored.user else stored.user
    events = [replace(event, features=clean(event.features, repeated)) for event in past]
    return Fetched(user=profile, behaviours=stored.behaviours, items=rows), events


def _refusal(encoder: Encoder, field: Field, value: Value) -> EncodingError | None:
    encode: Callable[[], Arrays]
    if value is None:
        return None
    if field.group == "item":
        encode = lambda: encoder.encode_items({field.name: [value]}, 1)  # noqa: E731
    else:
        encode = lambda: encoder.encode_requests({field.name: [value]}, np.zeros(1))  # noqa: E731
    try:
        encode()
    except EncodingError as err:
        return err
    return None


def _repeated(schema: Schema) -> list[Field]:
    """The item fields whose values a history repeats, but for the id."""
    sources = {sequence.of for sequence in schema.group("behaviour")}
    return [field for field in schema.group("item") if field.name in sources and field.name != schema.item_key]


def _merged(given: Sequence[Value] | None, stored: Sequence[Row | None], name: str) -> Column | None:
    if not any(stored):
        return given
    column: list[Any] = [row.get(name) if row else None for row in stored]
    if given is None:
        return column
    return [own if own is not None else other for own, other in zip(given, column, strict=True)]


def _present(row: Row) -> dict[str, Value]:
    return {name: value for name, value in row.items() if value is not None}


def _of_fields(fields: Sequence[Field], row: Mapping[str, Any]) -> Row:
    """Only what the schema knows: a client's context may hold a name that a user field has."""
    return {field.name: row[field.name] for field in fields if field.name in row}


def _has_gaps(column: Sequence[Value] | None) -> bool:
    return column is None or any(value is None for value in column)
