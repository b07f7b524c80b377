"""The JSON shape of POST /events, and the check of each event: one that is wrong is rejected alone."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from service.errors import FieldError, InvalidValue, sentence
from service.http.decoding import Decoder, first_error
from service.ids import MAX_AHEAD_S, Id, Time, canonical_id, is_id
from service.ingest.events import Event
from service.store.codec import pack_row
from service.store.feature_store import Outcome

MAX_EVENTS = 1000  # of one call

Value = str | int | float | bool | list[str | int | float | bool | None] | None


class SentEvent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An event as a client sends it. Needs the user, or the request_id of an anonymous request."""

    event_id: Id
    type: Literal["impression", "click"]
    ts: Time
    item: Id
    user: Id | None = None
    request_id: Id | None = None
    position: int | None = None
    context: dict[str, Value] | None = None
    features: dict[str, Value] | None = None


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """An event that was not taken, by its place in the call; sending it again will not help."""

    index: int
    event_id: str | None
    reason: str


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    accepted: int
    duplicates: int
    rejected: list[Rejection]


class EventsDecoder:
    """A list of events, each judged by itself."""

    def __init__(self, *, max_age_s: float, now: Callable[[], float] = time.time) -> None:
        self._decoder: Decoder[list[Any]] = Decoder(list[Any])
        self._max_age_s = max_age_s
        self._now = now

    def decode(self, body: bytes) -> tuple[dict[int, Event], list[Rejection]]:
        """The events that can be taken, by place, and the others. Raises NotJSON and InvalidValue for no list."""
        values = self._decoder.decode(body)
        if len(values) > MAX_EVENTS:
            raise InvalidValue([FieldError(pointer="", expected=f"at most {MAX_EVENTS} events", got=str(len(values)))])
        return checked(values, now=self._now(), max_age_s=self._max_age_s)


def checked(values: Sequence[Any], *, now: float, max_age_s: float) -> tuple[dict[int, Event], list[Rejection]]:
    events: dict[int, Event] = {}
    rejected: list[Rejection] = []
    for index, value in enumerate(values):
        try:
            events[index] = _event(value, earliest=now - max_age_s, latest=now + MAX_AHEAD_S)
        except ValueError as err:
            rejected.append(Rejection(index=index, event_id=_event_id(value), reason=str(err)))
    return events, rejected


_SENT = msgspec.inspect.type_info(SentEvent)


def receipt_of(events: Mapping[int, Event], outcomes: Sequence[Outcome], rejected: Sequence[Rejection]) -> Receipt:
    """What is answered: `outcomes` are those of the events, in their order."""
    unreadable = [
        Rejection(index=index, event_id=event.event_id, reason=_UNREADABLE)
        for (index, event), outcome in zip(events.items(), outcomes, strict=True)
        if outcome is Outcome.UNREADABLE
    ]
    return Receipt(
        accepted=outcomes.count(Outcome.NEW),
        duplicates=outcomes.count(Outcome.KNOWN),
        rejected=sorted([*rejected, *unreadable], key=lambda rejection: rejection.index),
    )


_UNREADABLE = "the stored history of this user is of a newer version of the service, or none: it was left as it is"


def _event(value: Any, *, earliest: float, latest: float) -> Event:
    try:
        sent = msgspec.convert(value, SentEvent)
    except (msgspec.ValidationError, OverflowError) as err:
        raise ValueError(sentence([first_error(value, _SENT, str(err))], body="the event")) from None
    if sent.ts > latest:
        raise ValueError(f"/ts: expected at most {MAX_AHEAD_S:g} s from now, got {sent.ts}")
    if sent.ts < earliest:
        days = (latest - MAX_AHEAD_S - earliest) / 86_400
        raise ValueError(f"/ts: expected at most {days:g} days ago, as long as the store keeps clicks, got {sent.ts}")
    unit = sent.user if sent.user is not None else sent.request_id
    if unit is None:
        raise ValueError("/user: expected one, or the request_id of an anonymous request, got neither")
    features, context = sent.features or {}, sent.context or {}
    for name, row in (("features", features), ("context", context)):
        try:
            pack_row(row)
        except ValueError as err:
            raise ValueError(f"/{name}: {err}") from None
    return Event(
        type=sent.type,
        event_id=canonical_id(sent.event_id),
        ts=sent.ts,
        user=None if sent.user is None else canonical_id(sent.user),
        unit=canonical_id(unit),
        item=canonical_id(sent.item),
        features=features,
        context=context,
    )


def _event_id(value: Any) -> str | None:
    """As far as it can be found in an event that is none."""
    event_id = value.get("event_id") if isinstance(value, dict) else None
    return canonical_id(event_id) if is_id(event_id) else None
