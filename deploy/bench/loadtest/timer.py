"""Timer with microsecond resolution; an event loop's own is up to a millisecond late."""

import signal
import time
from asyncio import AbstractEventLoop
from collections.abc import Callable

_NOW_S = 1e-6  # the shortest interval: an interval of 0 would switch the timer off


class Timer:
    """The process's interval timer: calls back once at the time it was last set to, in seconds of time.monotonic().

    There is one of it a process, and it works in the main thread alone.
    """

    def __init__(self, loop: AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        loop.add_signal_handler(signal.SIGALRM, callback)

    def set(self, at: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, max(at - time.monotonic(), _NOW_S))

    def close(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._loop.remove_signal_handler(signal.SIGALRM)
