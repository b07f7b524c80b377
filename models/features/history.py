"""A past click, what is known of it, and the one law of history: which clicks a request may see, in which order."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from models.features.values import Row, Value


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One past click: which item, when (Unix seconds), and raw features of three sources.

    `features` and `context` are what the event itself brought, `item_features` what was known of its item.
    """

    item: str
    ts: float
    features: Row
    context: Row = field(default_factory=dict)
    item_features: Row = field(default_factory=dict)

    def item_value(self, name: str) -> Value:
        """The value of an item field: the event's own, else the item's."""
        value = self.features.get(name)
        return self.item_features.get(name) if value is None else value

    def event_value(self, name: str) -> Value:
        """The value of a user or context field at the time of the event, or of a field that only events have.

        An item's features never stand in for it: what they call by that name is something else.
        """
        value = self.features.get(name)
        return self.context.get(name) if value is None else value


def history(behaviours: Sequence[Event], *, before: float, limit: int) -> list[Event]:
    """A request's history: the events strictly earlier than it, by time and then item id, the last `limit` of them.

    The one law of history, offline and online: two clicks of the same second stand in the order of their item ids
    (by code point), so that every store and every file gives the same sequence.
    """
    past = sorted((e for e in behaviours if e.ts < before), key=lambda e: (e.ts, e.item))
    return past[max(len(past) - limit, 0) :]
