"""Low-priority thread for long work beside requests."""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# While it works the event loop waits so long, at most, for Python code to give up the GIL (default: 5 ms) ...
SWITCH_S = 0.0005
# ... and on a busy core it gets what others leave. For good: a process that is not root may not take it back.
LOWEST = 19


class BackgroundThread:
    """Open it with `with`, one at a time in a process. The thread ends with the work under way."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background", initializer=_give_way)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args, **kwargs))

    def __enter__(self) -> Self:
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown(wait=False)
        sys.setswitchinterval(self._switch_s)


def _give_way() -> None:
    if sys.platform == "linux":  # where a priority can be one thread's own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)
