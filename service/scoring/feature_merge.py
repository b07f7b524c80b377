"""Feature merge: what the client sent over what the store has, field by field, and what neither could bring."""

from collections.abc import Sequence
from dataclasses import replace

from models.features.column_encoding import EncodingError
from models.features.encoder import Encoder
from models.features.field import Field, event_fields
from models.features.history import Event
from models.features.schema import Schema
from models.features.values import Row, Value
from service.errors import MAX_ERRORS, Degraded, FieldError, pointer, shown
from service.scoring.request import ScoringRequest


def merge_user_features(schema: Schema, request: ScoringRequest, stored: Row | None) -> Row:
    """The user's features: an absent or null one of the client leaves the store's in place."""
    user = {**(stored or {}), **_present(request.user_features)}
    if schema.user_key is not None:
        user[schema.user_key] = request.user
    return user


def with_item_features(event: Event, item: Row | None) -> Event:
    """A client's behaviour with its item's stored features, which count where the client sent none."""
    return replace(event, item_features=item or {})


def degraded_reasons(
    schema: Schema, request: ScoringRequest, *, reads_history: bool, lacks_items: bool
) -> list[Degraded]:
    """What a request did without because the store could not be read.

    `lacks_items` tells whether features of its candidates, or of the items of its own behaviours, are among that.
    """
    reasons = []
    if reads_history and request.user is not None and request.behaviours is None:
        reasons.append(Degraded.BEHAVIOURS_UNAVAILABLE)
    if lacks_items:
        reasons.append(Degraded.ITEM_FEATURES_UNAVAILABLE)
    sent = _present(request.user_features)
    if request.user is not None and any(f.name not in sent for f in schema.group("user") if f.name != schema.user_key):
        reasons.append(Degraded.USER_FEATURES_UNAVAILABLE)
    return reasons


def lacks_item_features(schema: Schema, behaviours: Sequence[Event]) -> bool:
    """Whether a client's behaviours lack a value that the store may have for their items."""
    fields = history_item_fields(schema)
    return any(event.item_value(f.name) is None for event in behaviours for f in fields)


def history_item_fields(schema: Schema) -> list[Field]:
    """The item fields whose values a history repeats, but for the id."""
    sources = {field.name for field in schema.history_sources}
    return [field for field in schema.group("item") if field.name in sources and field.name != schema.item_key]


def value_of(event: Event, field: Field) -> Value:
    """A past click's value of a field that is neither an id nor a clock."""
    return event.item_value(field.name) if field.group == "item" else event.event_value(field.name)


def invalid_values(encoder: Encoder, request: ScoringRequest) -> list[FieldError]:
    """The client's values that cannot be encoded, each by its pointer. Slow: for requests already known as bad."""
    schema = encoder.schema
    errors: list[FieldError] = []

    def check(field: Field, value: Value, at: str) -> None:
        err = _encoding_error(encoder, field, value)
        if err is not None and len(errors) < MAX_ERRORS:
            errors.append(FieldError(pointer=at, expected=err.expected, got=shown(value)))

    for field in schema.group("user"):
        if field.name != schema.user_key:
            check(field, request.user_features.get(field.name), pointer("user", "features", field.name))
    for field in schema.group("context"):
        check(field, request.context.get(field.name), pointer("context", field.name))
    for field in schema.group("item"):
        if field.name != schema.item_key:
            for row, value in enumerate(request.candidates.column(field.name)):
                check(field, value, request.candidates.pointer(row, field.name))
    for position, event in enumerate(request.behaviours or ()):
        for field in (*history_item_fields(schema), *event_fields(schema.fields)):
            where = "features" if field.group == "item" or event.features.get(field.name) is not None else "context"
            check(field, value_of(event, field), pointer("behaviours", position, where, field.name))
    return errors


def drop_invalid(encoder: Encoder, row: Row | None, fields: Sequence[Field]) -> tuple[Row, frozenset[str]]:
    """A stored row without the values that cannot be encoded, and their fields. Slow: for rows known as bad."""
    bad = frozenset(f.name for f in fields if row and _encoding_error(encoder, f, row.get(f.name)) is not None)
    return {name: value for name, value in (row or {}).items() if name not in bad}, bad


def _encoding_error(encoder: Encoder, field: Field, value: Value) -> EncodingError | None:
    if value is None:
        return None
    try:
        encoder.encode_column(field, [value])
    except EncodingError as err:
        return err
    return None


def _present(row: Row) -> dict[str, Value]:
    return {name: value for name, value in row.items() if value is not None}
