"""Item changes: the features of an ad that were put into the store are served within a second, by every worker."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from weakref import WeakSet

from service.cancellation import cancel
from service.scoring.loaded_model import LoadedModel
from service.store.feature_store import FeatureStore, StoreUnavailable

log = logging.getLogger(__name__)

POLL_S = 0.3


class ItemChangeFollower:
    """Expires what the models keep of items that have changed; of all, where it cannot be known which have."""

    def __init__(
        self, *, store: FeatureStore, models: Callable[[], Iterable[LoadedModel]], poll_s: float = POLL_S
    ) -> None:
        self._store = store
        self._models = models
        self._poll_s = poll_s
        self._jitter = random.Random()
        self._position: str | None = None
        self._has_missed = False  # the store was not there to be asked
        self._followed: WeakSet[LoadedModel] = WeakSet()

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Polls while it is open, and once before: what is scored from now on is cached."""
        await self.poll()
        polling = asyncio.create_task(self._poll_for_ever())
        try:
            yield
        finally:
            await cancel(polling)

    async def _poll_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s * self._jitter.uniform(0.8, 1.2))
            try:
                await self.poll()
            except Exception:  # or this worker would serve old features for as long as they are kept
                log.exception("poll of item changes failed")

    async def poll(self) -> None:
        """Looks once what has changed."""
        try:
            changes = await self._store.changed_items(self._position)
        except StoreUnavailable:
            self._has_missed = True
            return
        items = None if self._has_missed else changes.items
        self._position, self._has_missed = changes.position, False
        for model in self._models():
            if model not in self._followed:  # of what changed while it was warmed nobody told it
                self._followed.add(model)
                model.inputs.expire_items(None)
            elif items is None or items:
                model.inputs.expire_items(items)
