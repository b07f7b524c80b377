"""Whoever is late, leaves or has to go is told at once and never run; a model and a service that go finish first."""

import asyncio
import threading
from collections.abc import AsyncIterator

import numpy as np
import pytest
from service.runtime.batcher import Batcher, Runner
from tests.service.engine import Fake, apart, held_up, in_time, joining, request, waiting, with_runner

from service.errors import Refusal
from service.observability.metrics import Metrics


@pytest.fixture
async def runner() -> AsyncIterator[Runner]:
    runner = Runner(Metrics(), max_queued_candidates=100)
    yield runner
    await runner.aclose()


async def test_a_late_request_is_answered_at_its_deadline_and_never_run(runner: Runner) -> None:
    backend = Fake()
    batcher = Batcher(backend, apart(), runner)
    first = await held_up(backend, batcher)

    with pytest.raises(Refusal) as late:
        await batcher.submit(request(1), in_time(0.03))
    backend.go_on.release()
    await first
    await batcher.submit(request(2), in_time())

    assert (late.value.status, late.value.reason) == (504, "deadline")
    assert backend.runs == [[0], [2]]


async def test_a_request_under_way_is_answered_at_its_deadline_even_if_the_model_hangs(runner: Runner) -> None:
    backend = Fake()
    backend.hold = True
    batcher = Batcher(backend, apart(), runner)

    with pytest.raises(Refusal) as late:
        await batcher.submit(request(1), in_time(0.03))
    backend.go_on.release()

    assert late.value.reason == "deadline"


async def test_behind_a_model_that_hangs_requests_are_refused_at_once(runner: Runner) -> None:
    backend = Fake()
    batcher = Batcher(backend, apart(), runner)
    first = await held_up(backend, batcher)
    with pytest.raises(Refusal):
        await batcher.submit(request(1), in_time(0.05))  # it has been hanging for this long now

    with pytest.raises(Refusal) as refused:
        await batcher.submit(request(1), in_time(0.02))
    backend.go_on.release()
    await first

    assert refused.value.reason == "predicted_late"


async def test_a_request_whose_client_has_left_is_not_run(runner: Runner) -> None:
    backend = Fake()
    batcher = Batcher(backend, apart(), runner)
    first = await held_up(backend, batcher)
    left, stays = (asyncio.create_task(batcher.submit(request(n), in_time())) for n in (1, 2))
    await waiting(runner, 2)

    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    assert runner.waiting == 1
    backend.go_on.release()
    await first

    assert (await stays).tolist() == [2]
    assert backend.runs == [[0], [2]]


async def test_a_client_who_leaves_during_his_run_takes_nobody_with_him(runner: Runner) -> None:
    backend = Fake()
    batcher = Batcher(backend, apart(), runner)
    first = await held_up(backend, batcher)

    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    backend.go_on.release()

    assert (await batcher.submit(request(2), in_time())).tolist() == [2]


async def test_shadow_work_runs_last_and_is_told_when_it_has_to_go(runner: Runner) -> None:
    backend = Fake()
    batcher = Batcher(backend, apart(piece=200), runner)
    first = await held_up(backend, batcher)
    shadows = [asyncio.create_task(batcher.submit(request(*[n] * 12), in_time(), shadow=True)) for n in (1, 2)]
    await waiting(runner, 24)
    live = asyncio.create_task(batcher.submit(request(*[3] * 80), in_time()))
    await waiting(runner, 92)

    with pytest.raises(Refusal) as dropped:
        await shadows[0]
    backend.go_on.release()
    await asyncio.gather(first, live)
    assert (await shadows[1]).tolist() == [2] * 12

    assert dropped.value.reason == "shadow_dropped"
    assert [run[0] for run in backend.runs] == [0, 3, 2]


@pytest.mark.parametrize("threads", [1, 2])
def test_in_a_storm_nobody_is_left_without_an_answer(threads: int) -> None:
    draw = np.random.default_rng(7)
    told: dict[str, int] = {}

    async def client(batcher: Batcher, turns_later: int) -> None:
        items = draw.choice([0, 1, 2, -1, -2], size=draw.integers(1, 30), p=[0.5, 0.29, 0.19, 0.01, 0.01])
        arrays, seconds = request(*items), float(draw.choice([1e-9, 0.002, 0.02, 30]))
        shadow, leaves = draw.random() < 0.2, draw.random() < 0.05
        for _ in range(turns_later):
            await asyncio.sleep(0)
        task = asyncio.create_task(batcher.submit(arrays, in_time(seconds), shadow=bool(shadow)))
        await asyncio.sleep(0)
        if leaves:
            task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(outcome, np.ndarray):
            np.testing.assert_array_equal(outcome, items)
        name = outcome.reason if isinstance(outcome, Refusal) else type(outcome).__name__
        told[name] = told.get(name, 0) + 1

    async def scenario(runner: Runner) -> None:
        batchers = [Batcher(Fake(), cost, runner) for cost in (joining(8), apart(20))]
        async with asyncio.timeout(30):
            await asyncio.gather(*(client(batchers[n % 2], n % 100) for n in range(1000)))
            for batcher in batchers:
                await batcher.drain()
        assert runner.waiting == 0

    with_runner(scenario, threads=threads)

    assert sum(told.values()) == 1000
    assert {"ndarray", "predicted_late", "model_failed", "CancelledError"} <= told.keys()
    assert told.keys() <= {"ndarray", "predicted_late", "deadline", "model_failed", "CancelledError", "shadow_dropped"}


async def test_draining_waits_for_who_holds_it_and_for_the_run_that_nobody_waits_for(runner: Runner) -> None:
    backend = Fake()
    batcher = Batcher(backend, apart(), runner)
    with batcher.held():
        drained = asyncio.create_task(batcher.drain())
        first = await held_up(backend, batcher)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert not drained.done()
        queued = asyncio.create_task(batcher.submit(request(3), in_time()))
        await waiting(runner, 1)
    await asyncio.sleep(0)
    assert not drained.done()

    backend.go_on.release()
    async with asyncio.timeout(10):
        await drained

    assert (await queued).tolist() == [3]


async def test_closing_finishes_what_waits_and_takes_nothing_new() -> None:
    runner = Runner(Metrics(), max_queued_candidates=100)
    backend = Fake()
    batcher = Batcher(backend, apart(), runner)
    first = await held_up(backend, batcher)
    queued = asyncio.create_task(batcher.submit(request(1), in_time()))
    await waiting(runner, 1)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("model-")]

    closing = asyncio.create_task(runner.aclose())
    await asyncio.sleep(0)
    with pytest.raises(Refusal) as refused:
        await batcher.submit(request(2), in_time())
    backend.go_on.release()
    await closing

    assert (await first).tolist() == [0]
    assert (await queued).tolist() == [1]
    assert refused.value.reason == "not_open"
    assert not any(thread.is_alive() for thread in threads)
    await runner.aclose()


async def test_a_runner_does_not_wait_for_ever_for_a_model_that_hangs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("service.runtime.batcher.STOP_S", 0.01)
    runner = Runner(Metrics(), max_queued_candidates=100)
    backend = Fake()
    first = await held_up(backend, Batcher(backend, apart(), runner))

    await runner.aclose()

    assert "a model still runs" in caplog.text
    backend.go_on.release()
    await first


async def test_a_runner_that_has_ended_is_not_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.runtime.batcher.STOP_S", 0.2)
    runner = Runner(Metrics(), max_queued_candidates=100)
    backend = Fake()
    first = await held_up(backend, Batcher(backend, apart(), runner))

    await runner.aclose()
    async with asyncio.timeout(0.1):
        await runner.aclose()

    backend.go_on.release()
    await first
