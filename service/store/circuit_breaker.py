"""Circuit breaker: stop asking a store that does not answer, probe it, and begin again when it does."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from service.cancellation import cancel

log = logging.getLogger(__name__)


class CircuitBreaker:
    """Opens after `threshold` failures in a row; then a probe every `every_s` seconds, until one succeeds.

    Without it every request to a frozen store would wait for its whole timeout.
    """

    def __init__(self, probe: Callable[[], Awaitable[None]], *, threshold: int = 5, every_s: float = 0.25) -> None:
        self._probe = probe
        self._threshold = threshold
        self._every_s = every_s
        self._failures = 0
        self._probing: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        return self._probing is not None

    def record(self, answered: bool) -> None:
        if answered:
            self.succeeded()
        else:
            self.failed()

    def succeeded(self) -> None:
        self._failures = 0

    def failed(self) -> None:
        self._failures += 1
        if self._failures >= self._threshold and self._probing is None:
            log.warning("store breaker opened", extra={"failures": self._failures})
            self._probing = asyncio.create_task(self._close_when_it_answers())

    async def aclose(self) -> None:
        if self._probing is not None:
            await cancel(self._probing)

    async def _close_when_it_answers(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self._probe()
            except Exception as err:  # noqa: BLE001 - whatever went wrong, the store is not back
                log.debug("store probe failed", extra={"error": repr(err)})
                continue
            log.warning("store breaker closed")
            self._failures, self._probing = 0, None
            return
