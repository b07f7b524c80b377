"""A past click, and the one law of history: which clicks a request may see, in which order."""

from collections.abc import Sequence
from dataclasses import dataclass

from models.features.values import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One past click: which item, when (Unix seconds), and the item's raw features."""

    item: str
    ts: float
    features: Row


def history(behaviours: Sequence[Event], *, before: float, limit: int) -> list[Event]:
    """A request's history: the events strictly earlier than it, by time and then item id, the last `limit` of them.

    The one law of history, offline and online: two clicks of the same second stand in the order of their item ids
    (by code point), so that every store and every file gives the same sequence.
    """
    past = sorted((e for e in behaviours if e.ts < before), key=lambda e: (e.ts, e.item))
    return past[max(len(past) - limit, 0) :]
