"""Circuit breaker: stop asking a store that does not answer, probe it, and begin again when it does."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from service.cancellation import cancel
from service.store.faults import UNAVAILABLE, Failure, Fault, failure_of, is_answer

log = logging.getLogger(__name__)


class CircuitBreaker:
    """Opens after `threshold` failures in a row; then a probe every `every_s` seconds, until one is answered.

    Without it every request to a frozen store would wait for its whole timeout. The probe is a read such as predictions
    make: a server that refuses writes (full, read-only, unable to save) still answers it.
    """

    def __init__(self, probe: Callable[[], Awaitable[object]], *, threshold: int = 5, every_s: float = 0.25) -> None:
        self._probe = probe
        self._threshold = threshold
        self._every_s = every_s
        self._failures = 0
        self._probing: asyncio.Task[None] | None = None
        self.last_failure: Failure | None = None
        """The latest refusal or silence, whether or not it counts here."""

    @property
    def is_open(self) -> bool:
        return self._probing is not None

    def record(self, error: Exception | None) -> None:
        """What came of a command: None if it was answered. A refusal is an answer, unless all reads are refused."""
        if error is None:
            self._failures = 0
            return
        failure = failure_of(error)
        if failure.fault in UNAVAILABLE:
            self.failed(error)
            return
        self._failures = 0
        if failure.fault is not Fault.OTHER:  # a fault of the command, not of the server
            self.last_failure = failure

    def succeeded(self) -> None:
        self._failures = 0

    def failed(self, error: Exception | None = None) -> None:
        if error is not None:
            self.last_failure = failure_of(error)
        self._failures += 1
        if self._failures >= self._threshold and self._probing is None:
            cause = self.last_failure.fault if self.last_failure is not None else Fault.OTHER
            log.warning("store breaker opened", extra={"failures": self._failures, "cause": cause.value})
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
                if not is_answer(err):
                    self.last_failure = failure_of(err)
                    log.debug("store probe failed", extra={"error": repr(err)})
                    continue
            log.warning("store breaker closed")
            self._failures, self._probing = 0, None
            return
