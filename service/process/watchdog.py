"""Watchdog: ends a process whose event loop hangs, with the stacks of all its threads on stderr."""

import asyncio
import faulthandler
from types import TracebackType
from typing import Self

STDERR = 2
REARM_S = 1.0


class Watchdog:
    """While it is open, a loop that runs nothing for `limit_s` seconds ends the process with code 1; 0: never.

    A thread of faulthandler's counts, which needs neither the event loop nor the interpreter's lock: code that holds
    both for ever is ended too. One at a time in a process.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        if self._limit_s:
            self._arm(asyncio.get_running_loop())
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            faulthandler.cancel_dump_traceback_later()

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        faulthandler.dump_traceback_later(self._limit_s, exit=True, file=STDERR)
        self._timer = loop.call_later(min(REARM_S, self._limit_s / 4), self._arm, loop)
