"""What the event loop keeps waiting is known to have waited."""

import asyncio

from service.server import _Away


async def test_what_is_read_in_one_go_waited_while_the_loop_was_busy_and_not_while_it_was_idle() -> None:
    busy = clock = 100.0
    away = _Away(busy=lambda: busy, clock=lambda: clock)

    async def read(*, busy_s: float, idle_s: float) -> tuple[float, float]:
        nonlocal busy, clock
        busy, clock = busy + busy_s, clock + busy_s + idle_s
        first = away.seconds()
        busy, clock = busy + 1, clock + 1  # reading takes time too, and what it reads came before that
        both = first, away.seconds()
        await asyncio.sleep(0)
        return both

    assert await read(busy_s=5, idle_s=0) == (0, 0)  # before the first, whatever that was
    assert await read(busy_s=5, idle_s=1) == (5, 5)
    assert await read(busy_s=3, idle_s=6) == (3, 3)
    assert await read(busy_s=3, idle_s=60) == (0, 0)
    assert await read(busy_s=0, idle_s=0) == (0, 0)
