"""A task ends when it is cancelled, however often it does not hear of it."""

import asyncio

import pytest

from service.cancellation import cancel


@pytest.mark.parametrize("overheard", [0, 1, 2])
async def test_a_task_that_overhears_a_cancellation_is_cancelled_again(overheard: int, monkeypatch) -> None:
    monkeypatch.setattr("service.cancellation.AGAIN_S", 0.001)
    heard = 0

    async def works_for_ever() -> None:
        nonlocal heard
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                heard += 1
                if heard > overheard:
                    raise

    task = asyncio.create_task(works_for_ever())
    await asyncio.sleep(0)

    await cancel(task)

    assert task.cancelled()
    assert heard == overheard + 1


async def test_tasks_that_ended_or_fail_are_no_error_and_none_is_nothing_to_do() -> None:
    async def ends() -> None: ...

    async def fails() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            raise ValueError

    ended, failing = asyncio.create_task(ends()), asyncio.create_task(fails())
    await asyncio.sleep(0)

    await cancel(ended, failing)
    await cancel()

    assert ended.done()
    assert isinstance(failing.exception(), ValueError)
