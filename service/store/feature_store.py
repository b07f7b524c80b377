"""The feature store protocol: what is remembered of users and items, whatever keeps it."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from models.features.values import Row
from service.store.click_table import ClickTable
from service.store.codec import Click, ClickHistory, Mark
from service.store.faults import Failure

# How long a repeated event is recognised; a click still in the past is recognised as long as it is there.
EVENT_TAGS_TTL_S = 2 * 86_400


class Outcome(IntEnum):
    """What became of an event."""

    KNOWN = 0
    NEW = 1
    UNREADABLE = 2
    """What is stored of its user is of a newer layout, or of somebody else: it was left as it is, and so the event."""


class StoreUnavailable(Exception):  # noqa: N818 - a state of the store, not of the program
    """The store gave no answer: down, frozen, loading, read-only or full. Nothing can be said about what it holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """What is known for one request. None where nothing is stored; `items` stand in the order they were asked for.

    They are as they were packed, for `unpack_row`: most of those that are asked for again have not changed.
    """

    user: Row | None
    behaviours: ClickHistory
    items: Sequence[bytes | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemChanges:
    items: Sequence[str] | None
    """None where it is not known any more which ones: any may have changed."""
    position: str
    """From where to ask on."""


OnFetched = Callable[[Fetched | StoreUnavailable], None]


class FeatureStore(Protocol):
    """Raw values only: ids exist after `encode`. Every coroutine may raise StoreUnavailable."""

    max_clicks: int
    """Of a user: more are not kept."""

    def fetch_soon(
        self,
        user: str | None,
        items: Sequence[str],
        on_fetched: OnFetched,
        *,
        before: float,
        limit: int,
        timeout_s: float | None = None,
    ) -> None:
        """One round trip: the user's features, their last `limit` clicks strictly before `before`, the items' features.

        An anonymous request (no user) has neither features nor clicks. `on_fetched` is called once from the event
        loop, perhaps before this returns, and within `timeout_s` (default: the store's own timeout). No task and no
        timer is made for a request: this is what a prediction waits for.
        """

    async def fetch(self, user: str | None, items: Sequence[str], *, before: float, limit: int) -> Fetched:
        """The same for who can wait for it."""
        outcome: asyncio.Future[Fetched | StoreUnavailable] = asyncio.get_running_loop().create_future()

        def on_fetched(value: Fetched | StoreUnavailable) -> None:
            if not outcome.done():  # else the caller has gone
                outcome.set_result(value)

        self.fetch_soon(user, items, on_fetched, before=before, limit=limit)
        fetched = await outcome
        if isinstance(fetched, StoreUnavailable):
            raise fetched
        return fetched

    async def append(self, events: Sequence[Click | Mark]) -> list[Outcome]:
        """Take events, each once by its owner, type and id; clicks into their users' pasts.

        The past of a user is the same for any order, repetition and grouping of appends: the newest clicks by
        (ts, item), as many as fit its bounds, in number and in bytes. So after an error, which may have stored a part,
        the whole call is simply made again. What is wrong with one user's keys fails that user's events alone.
        """

    async def merge(self, clicks: ClickTable, *, max_per_s: float | None = None) -> list[int | None]:
        """Put many users' clicks into their pasts, as `append` would, but with nothing kept to know them by.

        A click is known by its time, item and tag, as long as it is in the past. Returns for each user how many of the
        clicks are new and among those kept; None for one whose past cannot be read, which is left as it is. At most
        `max_per_s` clicks a second are sent.
        """

    async def delete_user(self, user: str, *, at: float) -> None:
        """Remove everything about a user. Clicks of before `at`, in Unix seconds, stay out when they come later."""

    async def put_users(self, rows: Mapping[str, Row]) -> None: ...

    async def put_items(self, rows: Mapping[str, Row]) -> None: ...

    async def changed_items(self, since: str | None) -> "ItemChanges":
        """The items whose features were put after the position `since`; None begins at the present one."""

    async def check(self) -> None:
        """Is it what the settings say? Raises SettingsError if not, StoreUnavailable if nothing answers."""

    def failures(self) -> Sequence[Failure]:
        """Of each fault that stands, the latest failure."""
        return ()

    async def ping(self) -> None: ...

    async def aclose(self) -> None: ...
