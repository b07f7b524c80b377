"""Impressions and clicks in: each taken once, clicks into their user's history, counted for the arm that served."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from models.features.values import Row
from service.observability.metrics import Metrics
from service.store.codec import Click, Mark
from service.store.feature_store import FeatureStore, Outcome

ArmOf = Callable[[float, str], str]
"""The arm of a unit under the shares that held at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """An impression or a click. `unit` is what the arm was drawn for: the user, or the request without one."""

    type: Literal["impression", "click"]
    event_id: str
    ts: float
    user: str | None
    unit: str
    item: str
    features: Row
    context: Row


class EventRecorder:
    """Takes events into the store.

    Assignment is sticky, so the arm that served an event's request is drawn again instead of being looked up: by the
    user, or for an anonymous request by its `request_id`, which its events must therefore carry, under the shares that
    held at the event's own time. Two limits follow: of the users whom a change of shares moves, events that come after
    it of requests before it count for their new arm; and a user who is known to /predict must be named in the events.
    """

    def __init__(self, *, store: FeatureStore, arm_of: ArmOf, metrics: Metrics) -> None:
        self._store = store
        self._arm_of = arm_of
        self._metrics = metrics

    async def record(self, events: Sequence[Event]) -> list[Outcome]:
        """What became of each: those that are new are counted.

        Clicks of users enter their histories, and the very next fetch sees them; everything else is only remembered as
        known and counted. Raises StoreUnavailable with a part of the events possibly taken: make the same call again,
        what was taken is then a duplicate. The counters may miss what was taken by a call that failed; they and the
        result, what the server took just before a connection was lost: that call is made once more by itself.
        """
        if not events:
            return []
        with self._metrics.store_call("append"):
            outcomes = await self._store.append([_stored(event) for event in events])
        counters = {"impression": self._metrics.impressions, "click": self._metrics.clicks}
        for event, outcome in zip(events, outcomes, strict=True):
            if outcome is Outcome.NEW:
                counters[event.type](self._arm_of(event.ts, event.unit)).inc()
        return outcomes


def _stored(event: Event) -> Click | Mark:
    if event.type == "impression" or event.user is None:
        return Mark(type=event.type, event_id=event.event_id, owner=event.unit, ts=event.ts)
    return Click(
        event_id=event.event_id,
        user=event.unit,
        item=event.item,
        ts=event.ts,
        features=event.features,
        context=event.context,
    )
