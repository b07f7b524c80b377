"""What the event loop keeps waiting is known to have waited."""

import asyncio
import time

from service.server import _Away


async def test_what_is_read_in_one_go_waited_while_the_loop_was_busy_and_not_while_it_was_idle() -> None:
    away = _Away()
    spent: list[float] = []

    def read() -> None:
        spent.append(away.seconds())

    async def turn(*, busy_s: float) -> None:
        until = time.thread_time() + busy_s
        while time.thread_time() < until:
            pass
        read()
        read()
        await asyncio.sleep(0)

    await turn(busy_s=0.0)
    await turn(busy_s=0.05)
    await asyncio.sleep(0.2)
    await turn(busy_s=0.0)

    await asyncio.sleep(0)
    for _ in range(50):  # a little work now and then, and nothing to read
        until = time.thread_time() + 0.002
        while time.thread_time() < until:
            pass
        await asyncio.sleep(0.008)
    read()

    assert spent[6] == 0.0
    assert spent[::2][:3] == spent[1::2][:3]
    assert 0.05 <= spent[2] < 0.15
    assert spent[4] < 0.04
