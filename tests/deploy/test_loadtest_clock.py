"""The load generator's clock, against a server that does what the test says."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
from loadtest.connection import Address
from loadtest.generator import Generator, Plan
from loadtest.results import NO_ANSWER, OK, PRIOR, Outcome, figures

Answer = Callable[[], Awaitable[bytes]]
YES = b'HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n{"degraded":[]}'


@asynccontextmanager
async def generator(answer: Answer, connections: int = 4) -> AsyncIterator[Generator]:
    ended: list[asyncio.Future[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        end = asyncio.get_running_loop().create_future()
        ended.append(end)
        try:
            while await reader.readuntil(b"\r\n\r\n{}"):
                writer.write(await answer())
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
        finally:
            end.set_result(None)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    made = Generator(Address(host="127.0.0.1", port=server.sockets[0].getsockname()[1]), [b"{}"], [10])
    try:
        await made.open(connections)
        yield made
    finally:
        made.close()
        await asyncio.gather(*ended)
        server.close()
        await server.wait_closed()


async def run(made: Generator, due_s: list[float] | None, *, seconds: float, connections: int = 4) -> Outcome:
    return await made.run(
        Plan(due_s=due_s, bodies=[0], seconds=seconds, connections=connections), start=time.monotonic()
    )


async def test_latency_counts_from_when_a_request_was_due_though_every_connection_waits():
    thaw = asyncio.Event()

    async def answer() -> bytes:
        await thaw.wait()
        return YES

    async with generator(answer, connections=1) as made:
        asyncio.get_running_loop().call_later(0.30, thaw.set)
        found = await run(made, [0.0, 0.05, 0.10, 0.15, 0.20, 0.25], seconds=0.26, connections=2)

    # A closed loop over these two connections would have sent two requests and seen one latency of 0.3 s.
    np.testing.assert_allclose(found.latency_s, [0.30, 0.25, 0.20, 0.15, 0.10, 0.05], atol=0.045)
    assert (found.status == OK).all() and found.num_connection_waits == 4


async def test_a_broken_connection_costs_its_request_and_no_other():
    answers = iter([YES, b"nonsense\r\n\r\n", YES, YES])

    async def answer() -> bytes:
        return next(answers)

    async with generator(answer, connections=1) as made:
        found = await run(made, [0.0, 0.02, 0.04, 0.06], seconds=0.1, connections=1)

    assert found.status.tolist() == [OK, NO_ANSWER, OK, OK]
    assert np.isnan(found.latency_s[1])


async def test_answers_tell_what_they_went_without():
    bodies = [b'{"degraded":[]}', b'{"degraded":["behaviours_unavailable"]}', b'{"degraded":["deadline"]}']
    answers = iter([b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(b), b) for b in bodies])

    async def answer() -> bytes:
        return next(answers)

    async with generator(answer) as made:
        found = await run(made, [0.0, 0.03, 0.06], seconds=0.1)

    assert found.status.tolist() == [OK, OK, PRIOR]
    assert found.degraded.tolist() == [False, True, True]


async def test_results_of_a_generator_that_was_stopped_for_a_while_are_invalid():
    async def answer() -> bytes:
        return YES

    async with generator(answer) as made:
        asyncio.get_running_loop().call_later(0.05, time.sleep, 0.1)  # as another program on its core would
        found = await run(made, np.linspace(0, 0.2, 100).tolist(), seconds=0.2)

    assert "late" in str(figures(found, 1.0).invalid_reason)


async def test_a_closed_loop_keeps_every_connection_busy_and_no_more():
    under_way, most = 0, 0

    async def answer() -> bytes:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.005)
        under_way -= 1
        return YES

    async with generator(answer, connections=1) as made:
        found = await run(made, None, seconds=0.2, connections=3)

    assert most == 3
    assert 3 < len(found.status) <= 3 * 0.2 / 0.005 + 3  # how many more is the machine's affair
