"""Impressions and clicks in: checked one by one, remembered once, counted for the arm that served them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from models.features.values import Row
from service.errors import sentence
from service.experiments.assignment import Running
from service.http.decoding import Misfits
from service.ids import Id, Time, is_id, spelled
from service.observability.metrics import Metrics
from service.store.codec import Click, pack_row
from service.store.feature_store import FeatureStore

MAX_EVENTS = 1000  # of one call
MAX_AHEAD_S = 300.0  # how far a client's clock may run before ours

Value = str | int | float | bool | list[str | int | float | bool | None] | None


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """An event that was not taken, by its place in the call; sending it again will not help."""

    index: int
    event_id: str | None
    reason: str


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    accepted: int
    duplicates: int
    rejected: list[Rejection]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Checked:
    """An event in the store's own words. `unit` is what the arm was drawn for: the user, or the request without one."""

    type: Literal["impression", "click"]
    event_id: str
    ts: float
    user: str | None
    unit: str
    item: str
    features: Row


class Events:
    """Takes events into the store.

    Assignment is sticky, so the arm that served an event's request is drawn again instead of being looked up: by the
    user, or for an anonymous request by its `request_id`, which its events must therefore carry, under the shares that
    held at the event's own time. Two limits follow: of the users whom a change of shares moves, events that come after
    it of requests before it count for their new arm; and a user who is known to /predict must be named in the events.
    """

    def __init__(
        self,
        *,
        store: FeatureStore,
        running: Running,
        metrics: Metrics,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._running = running
        self._metrics = metrics
        self._now = now

    async def record(self, events: Sequence[Any]) -> Receipt:
        """Take decoded JSON values, each an event as `SentEvent` describes it or else rejected with its reason.

        Clicks of users enter their pasts, and the very next fetch sees them; everything else is only remembered as
        known and counted. Raises StoreUnavailable with a part of the events possibly taken: make the same call again,
        what was taken is then a duplicate. The counters may miss what was taken by a call that failed; they and the
        receipt, what the server took just before a connection was lost: that call is made once more by itself.
        """
        latest = self._now() + MAX_AHEAD_S
        checked: list[_Checked] = []
        rejected: list[Rejection] = []
        misfits = Misfits()
        for index, event in enumerate(events):
            try:
                checked.append(_check(event, latest, misfits))
            except ValueError as err:
                rejected.append(Rejection(index=index, event_id=_event_id(event), reason=str(err)))
        clicks = [e for e in checked if e.type == "click" and e.user is not None]
        others = [e for e in checked if e.type != "click" or e.user is None]
        accepted = await self._mark(others) + await self._append(clicks)
        return Receipt(accepted=accepted, duplicates=len(checked) - accepted, rejected=rejected)

    async def _mark(self, events: Sequence[_Checked]) -> int:
        if not events:
            return 0
        with self._metrics.store_call("mark"):
            new = await self._store.mark([(e.unit, e.event_id) for e in events])
        return self._count(events, new)

    async def _append(self, events: Sequence[_Checked]) -> int:
        if not events:
            return 0
        clicks = [Click(event_id=e.event_id, user=e.unit, item=e.item, ts=e.ts, features=e.features) for e in events]
        with self._metrics.store_call("append"):
            new = await self._store.append(clicks)
        return self._count(events, new)

    def _count(self, events: Sequence[_Checked], new: Sequence[bool]) -> int:
        counters = {"impression": self._metrics.impressions, "click": self._metrics.clicks}
        for event, is_new in zip(events, new, strict=True):
            if is_new:
                counters[event.type](self._running.at(event.ts).assign(event.unit).name).inc()
        return sum(new)


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


_SENT = msgspec.inspect.type_info(SentEvent)


def _check(event: Any, latest: float, misfits: Misfits) -> _Checked:
    try:
        sent = msgspec.convert(event, SentEvent)
    except (msgspec.ValidationError, OverflowError) as err:
        errors = misfits.of(event, _SENT)
        raise ValueError(sentence(errors, whole="the event") if errors else str(err)) from None
    if sent.ts > latest:
        raise ValueError(f"/ts: expected at most {MAX_AHEAD_S:g} s from now, got {sent.ts}")
    unit = sent.user if sent.user is not None else sent.request_id
    if unit is None:
        raise ValueError("/user: expected one, or the request_id of an anonymous request, got neither")
    features = sent.features or {}
    pack_row(features)
    return _Checked(
        type=sent.type,
        event_id=spelled(sent.event_id),
        ts=sent.ts,
        user=None if sent.user is None else spelled(sent.user),
        unit=spelled(unit),
        item=spelled(sent.item),
        features=features,
    )


def _event_id(event: Any) -> str | None:
    """As far as it can be told of an event that is none."""
    event_id = event.get("event_id") if isinstance(event, dict) else None
    return spelled(event_id) if is_id(event_id) else None
