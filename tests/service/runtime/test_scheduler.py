"""Whoever is late, leaves or has to go is answered at once and never run; each gets exactly its own scores."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import DeadlinePassed, ModelFailed, NotOpen, Overloaded, Refusal, ShadowDropped, WouldBeLate
from service.runtime.scheduler import RunOutcome, Scheduler
from tests.service.fake_backend import FakeBackend, blocked, entered, packed, served, submitted


@pytest.fixture
async def scheduler() -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(max_queued_candidates=100, max_candidates=50)
    yield scheduler
    await scheduler.aclose()


async def test_a_late_request_is_refused_at_its_deadline_and_never_run(scheduler: Scheduler) -> None:
    backend = FakeBackend()
    model = served(backend)
    first = await blocked(scheduler, model)

    _, late = submitted(scheduler, model, packed(1), within_s=0.03)
    outcome = await late
    backend.proceed.release()
    await first
    await submitted(scheduler, model, packed(2))[1]

    assert isinstance(outcome, DeadlinePassed)
    assert backend.runs == [[0], [2]]


async def test_a_request_under_way_is_refused_at_its_deadline_even_if_the_model_hangs(scheduler: Scheduler) -> None:
    backend = FakeBackend()
    backend.blocks = True

    _, outcome = submitted(scheduler, served(backend), packed(1), within_s=0.03)

    assert isinstance(await outcome, DeadlinePassed)
    backend.proceed.release()


async def test_behind_a_model_that_hangs_requests_are_refused_at_once(scheduler: Scheduler) -> None:
    backend = FakeBackend()
    model = served(backend)
    first = await blocked(scheduler, model)
    await submitted(scheduler, model, packed(1), within_s=0.1)[1]  # it has been hanging for this long now

    assert scheduler.is_overdue
    with pytest.raises(WouldBeLate):
        submitted(scheduler, model, packed(1), within_s=0.05)
    backend.proceed.release()
    await first


async def test_a_request_that_is_cancelled_is_not_run(scheduler: Scheduler) -> None:
    backend = FakeBackend()
    model = served(backend)
    first = await blocked(scheduler, model)
    run, outcome = submitted(scheduler, model, packed(1))
    _, stays = submitted(scheduler, model, packed(2))

    scheduler.cancel(run)
    backend.proceed.release()
    await first

    assert np.array_equal(await stays, [2])  # type: ignore[arg-type]
    assert not outcome.done()
    assert backend.runs == [[0], [2]]


async def test_a_request_beyond_the_limit_is_refused_unless_nobody_waits(scheduler: Scheduler) -> None:
    backend = FakeBackend()
    model = served(backend)
    first = await blocked(scheduler, model)
    _, large = submitted(scheduler, model, packed(*range(150)))

    with pytest.raises(Overloaded):
        submitted(scheduler, model, packed(1))
    backend.proceed.release()
    await first

    assert len(await large) == 150  # type: ignore[arg-type]


async def test_a_large_request_is_run_in_chunks_and_answered_as_one(scheduler: Scheduler) -> None:
    backend = FakeBackend()

    logits = await submitted(scheduler, served(backend), packed(*range(120), user=7))[1]

    assert np.array_equal(logits, np.arange(120) + 7)  # type: ignore[arg-type]
    assert [len(run) for run in backend.runs] == [50, 50, 20]


async def test_shadow_runs_come_last_and_go_first(scheduler: Scheduler) -> None:
    backend = FakeBackend()
    model = served(backend)
    first = await blocked(scheduler, model)
    shadows = [submitted(scheduler, model, packed(*[n] * 12), is_shadow=True)[1] for n in (1, 2)]
    _, last = submitted(scheduler, model, packed(3, 3), is_shadow=True)
    with pytest.raises(ShadowDropped):  # a quarter of the queue may be waiting, and more is
        submitted(scheduler, model, packed(4, 4), is_shadow=True)
    _, live = submitted(scheduler, model, packed(*[5] * 80))
    backend.proceed.release()

    assert isinstance(await shadows[0], ShadowDropped)
    await asyncio.gather(first, live, shadows[1], last)
    assert [run[0] for run in backend.runs] == [0, 5, 5, 2, 3]  # the live one in two chunks


async def test_a_failed_run_is_a_model_that_failed_and_the_next_one_is_run(scheduler: Scheduler) -> None:
    model = served(FakeBackend())

    failed = await submitted(scheduler, model, packed(1, -2))[1]
    fine = await submitted(scheduler, model, packed(1))[1]

    assert isinstance(failed, ModelFailed)
    assert str(failed.__cause__) == "poison"
    assert np.array_equal(fine, [1])  # type: ignore[arg-type]


async def test_a_model_that_joins_runs_what_waits_together_and_a_bad_request_costs_only_itself(
    scheduler: Scheduler,
) -> None:
    backend = FakeBackend(joins=True)
    model = served(backend)
    first = await blocked(scheduler, model)
    outcomes = [submitted(scheduler, model, packed(n, user=10 * n))[1] for n in (1, 2, -2, 3)]
    backend.proceed.release()
    await first

    one, two, bad, three = await asyncio.gather(*outcomes)

    assert [float(o[0]) for o in (one, two, three)] == [11, 22, 33]  # type: ignore[index]
    assert isinstance(bad, ModelFailed)
    assert backend.runs[1] == [1, 2, -2, 3]


async def test_draining_waits_for_who_has_a_lease_and_for_a_run_that_nobody_waits_for(scheduler: Scheduler) -> None:
    backend = FakeBackend()
    model = served(backend)
    with model.lease():
        draining = asyncio.ensure_future(model.drain())
        backend.blocks = True
        run, _ = submitted(scheduler, model, packed(1))
        await entered(backend)
        scheduler.cancel(run)
        queued, _ = submitted(scheduler, model, packed(2))
        scheduler.cancel(queued)
    await asyncio.sleep(0)
    assert not draining.done()

    backend.proceed.release()

    await asyncio.wait_for(draining, 10)
    assert backend.runs == [[1]]


async def test_a_scheduler_does_not_wait_for_ever_for_a_model_that_hangs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("service.runtime.scheduler.STOP_S", 0.01)
    scheduler = Scheduler(max_queued_candidates=100, max_candidates=50)
    backend = FakeBackend()
    first = await blocked(scheduler, served(backend))

    await scheduler.aclose()

    assert "a model still runs" in caplog.text
    backend.proceed.release()
    await first


async def test_a_closed_scheduler_finishes_what_waits_and_takes_no_more() -> None:
    scheduler = Scheduler(max_queued_candidates=100, max_candidates=50)
    backend = FakeBackend()
    model = served(backend)
    first = await blocked(scheduler, model)
    _, waiting = submitted(scheduler, model, packed(1))

    closing = asyncio.ensure_future(scheduler.aclose())
    await asyncio.sleep(0)
    with pytest.raises(NotOpen):
        submitted(scheduler, model, packed(2))
    backend.proceed.release()
    await closing

    assert np.array_equal(await waiting, [1])  # type: ignore[arg-type]
    await first


@settings(max_examples=15, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.integers(0, 9),  # whose
            st.lists(st.sampled_from([0, 1, 2, 3, -2]), min_size=1, max_size=8),
            st.sampled_from([0.0, 0.002, 30.0]),  # how long it may take
            st.booleans(),  # shadow
        ),
        max_size=25,
    ),
    joins=st.booleans(),
    threads=st.integers(1, 2),
)
def test_in_a_storm_each_gets_its_own_scores_or_one_refusal(requests, joins, threads):
    async def storm() -> list[RunOutcome]:
        scheduler = Scheduler(max_queued_candidates=60, max_candidates=20, threads=threads)
        model = served(FakeBackend(joins=joins), base_s=1e-6)
        outcomes: list[asyncio.Future[RunOutcome]] = []
        for user, items, within_s, is_shadow in requests:
            try:
                _, outcome = submitted(
                    scheduler, model, packed(*items, user=user), within_s=within_s, is_shadow=is_shadow
                )
            except Refusal as refusal:
                outcome = asyncio.get_running_loop().create_future()
                outcome.set_result(refusal)
            outcomes.append(outcome)
        answers = await asyncio.wait_for(asyncio.gather(*outcomes), 20)
        await asyncio.wait_for(model.drain(), 10)
        await scheduler.aclose()
        assert scheduler.num_queued == 0
        return list(answers)

    answers = asyncio.run(storm())

    for (user, items, _, _), answer in zip(requests, answers, strict=True):
        if isinstance(answer, Refusal):
            expected_kinds = (ModelFailed, DeadlinePassed, WouldBeLate, Overloaded, ShadowDropped)
            assert isinstance(answer, expected_kinds)
            assert -2 in items or not isinstance(answer, ModelFailed)
        else:
            assert np.array_equal(answer, np.array(items) + user)


async def test_two_threads_run_two_models_side_by_side() -> None:
    scheduler = Scheduler(max_queued_candidates=100, max_candidates=50, threads=2)
    slow, fast = FakeBackend(), FakeBackend()
    slow.blocks = True
    _, waiting = submitted(scheduler, served(slow), packed(1))
    await entered(slow)

    assert np.array_equal(await submitted(scheduler, served(fast), packed(2))[1], [2])  # type: ignore[arg-type]
    slow.proceed.release()
    await waiting
    await scheduler.aclose()
