"""Cancellation of tasks that may overhear it."""

import asyncio

AGAIN_S = 0.1


async def cancel(*tasks: "asyncio.Task[None]") -> None:
    """Cancels the tasks and returns when all have ended, in whatever way.

    One cancellation may be lost: Python 3.11's asyncio.wait_for, in which redis-py sends its commands, returns its
    result instead when that came in the same turn of the loop. A task that works for ever would then never end.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        ended, pending = await asyncio.wait(pending, timeout=AGAIN_S)
        for task in ended:
            if not task.cancelled():
                task.exception()  # which asyncio would otherwise report as never retrieved
