"""A timer that is not a millisecond late: the event loop's own is, and a schedule in microseconds would show it."""

import ctypes
import os
import sys
from asyncio import AbstractEventLoop, TimerHandle
from collections.abc import Callable
from typing import Protocol

_ABSOLUTE = 1
_MONOTONIC = 1
_LAST_NS = 999_999_999


class Alarm(Protocol):
    """Calls back at the time it was set to last, in seconds of time.monotonic(); once."""

    def set(self, at: float) -> None: ...

    def close(self) -> None: ...


def alarm(loop: AbstractEventLoop, ring: Callable[[], None]) -> Alarm:
    """The kernel's timer as a file where there is one (Linux), else the loop's own."""
    return _KernelAlarm(loop, ring) if sys.platform == "linux" else _LoopAlarm(loop, ring)


class _Spec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class _KernelAlarm:
    def __init__(self, loop: AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.timerfd_create(_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._spec = _Spec()
        loop.add_reader(self._file, self._rang)

    def set(self, at: float) -> None:
        whole = int(at)
        self._spec.value_s = whole
        self._spec.value_ns = min(int((at - whole) * 1e9), _LAST_NS)
        self._libc.timerfd_settime(self._file, _ABSOLUTE, ctypes.byref(self._spec), None)

    def _rang(self) -> None:
        try:
            os.read(self._file, 8)
        except BlockingIOError:  # it was set anew since
            return
        self._ring()

    def close(self) -> None:
        self._loop.remove_reader(self._file)
        os.close(self._file)


class _LoopAlarm:
    def __init__(self, loop: AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._timer: TimerHandle | None = None

    def set(self, at: float) -> None:
        self.close()
        self._timer = self._loop.call_at(at, self._ring)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
