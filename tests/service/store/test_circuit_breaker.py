"""When a store that fails is asked again."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from service.store.circuit_breaker import CircuitBreaker
from service.store.faults import Fault
from service.store.feature_store import StoreUnavailable
from service.store.redis_connection import ReplyError

Eventually = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


async def test_a_breaker_opens_on_failures_in_a_row_only(eventually: Eventually):
    healthy = asyncio.Event()
    probes = 0

    async def probe() -> None:
        nonlocal probes
        probes += 1
        if not healthy.is_set():
            raise StoreUnavailable("still down")

    breaker = CircuitBreaker(probe, threshold=3, every_s=0)

    for tell in (breaker.failed, breaker.failed, breaker.succeeded, breaker.failed, breaker.failed):
        tell()
    assert not breaker.is_open
    breaker.failed()
    assert breaker.is_open
    await eventually(lambda: _is(lambda: probes > 3))
    assert breaker.is_open
    healthy.set()
    await eventually(lambda: _is(lambda: not breaker.is_open))
    breaker.failed()
    assert not breaker.is_open


async def test_a_refusal_is_an_answer_to_the_breaker_and_a_fault_to_whoever_asks_for_the_last_one():
    async def probe() -> None:
        raise StoreUnavailable("down")

    breaker = CircuitBreaker(probe, threshold=2)
    silence, refusal = TimeoutError("late"), ReplyError("OOM command not allowed")
    for error in (silence, refusal, silence, None, silence):
        breaker.record(error)
    assert not breaker.is_open
    breaker.record(refusal)
    breaker.record(ReplyError("NOSCRIPT No matching script"))

    assert breaker.last_failure is not None
    assert breaker.last_failure.fault is Fault.OOM
    for error in (silence, ReplyError("LOADING Valkey is loading the dataset in memory")):
        breaker.record(error)
    assert breaker.is_open
    assert breaker.last_failure.fault is Fault.LOADING
    await breaker.aclose()


async def test_a_breaker_closed_for_good_probes_no_more():
    async def probe() -> None:
        raise StoreUnavailable("down")

    breaker = CircuitBreaker(probe, threshold=1, every_s=0)
    breaker.failed()

    await breaker.aclose()

    assert len(asyncio.all_tasks()) == 1


async def test_a_probe_that_overhears_its_cancellation_keeps_no_breaker_from_closing():
    probing = asyncio.Event()

    async def probe() -> None:
        if probing.is_set():
            await asyncio.sleep(3600)
        probing.set()
        with contextlib.suppress(asyncio.CancelledError):  # as asyncio.wait_for does where the answer has just come
            await asyncio.sleep(3600)
        raise StoreUnavailable("down")

    breaker = CircuitBreaker(probe, threshold=1, every_s=0)
    breaker.failed()
    await probing.wait()

    await breaker.aclose()

    assert len(asyncio.all_tasks()) == 1


async def _is(condition: Callable[[], bool]) -> bool:
    return condition()
