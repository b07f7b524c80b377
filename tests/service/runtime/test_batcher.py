"""Whatever is cut and joined, every caller gets his own scores; whatever fails, only he who failed pays."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.features.arrays import Arrays
from models.features.encoder import Encoder
from service.errors import Refusal
from service.observability.metrics import Metrics
from service.runtime.batcher import Batcher, Runner
from service.runtime.onnx_cpu import OnnxBackend
from tests.service import tiny
from tests.service.engine import Fake, apart, entered, held_up, in_time, joining, request, several, waiting, with_runner


@pytest.fixture
async def runner() -> AsyncIterator[Runner]:
    runner = Runner(Metrics(), max_queued_candidates=100)
    yield runner
    await runner.aclose()


numbers = st.lists(st.integers(0, 1000), min_size=1, max_size=12)


one_user = st.builds(lambda items, user: request(*items, user=user), numbers, st.integers(0, 10**6))


requests = one_user | st.lists(one_user, min_size=2, max_size=3).map(lambda parts: several(*parts))


@settings(max_examples=40)
@given(sent=st.lists(requests, min_size=1, max_size=12), piece=st.integers(1, 30), threads=st.integers(1, 2))
def test_cut_and_joined_each_request_gets_what_the_model_gives_it_alone(
    sent: list[Arrays], piece: int, threads: int
) -> None:
    expected = [Fake().run(arrays) for arrays in sent]

    async def scenario(runner: Runner) -> None:
        backend = Fake()
        batcher = Batcher(backend, joining(piece), runner)
        first = await held_up(backend, batcher)
        answers = [asyncio.create_task(batcher.submit(arrays, in_time())) for arrays in sent]
        await asyncio.sleep(0)
        backend.go_on.release()
        await first
        for answer, wanted in zip(answers, expected, strict=True):
            logits = await answer
            assert logits.dtype == np.float32
            np.testing.assert_array_equal(logits, wanted)
        assert all(len(run) <= piece for run in backend.runs)

    with_runner(scenario, threads=threads)


@settings(max_examples=40)
@given(
    sent=st.lists(st.lists(st.sampled_from([-2, -1, 0, 1, 2]), min_size=1, max_size=5), min_size=1, max_size=12),
    piece=st.integers(1, 8),
)
def test_of_a_run_that_fails_only_those_fail_who_fail_alone(sent: list[list[int]], piece: int) -> None:
    async def scenario(runner: Runner) -> None:
        backend = Fake()
        batcher = Batcher(backend, joining(piece), runner)
        first = await held_up(backend, batcher)
        answers = [asyncio.create_task(batcher.submit(request(*items), in_time())) for items in sent]
        await asyncio.sleep(0)
        backend.go_on.release()
        await first
        for items, outcome in zip(sent, await asyncio.gather(*answers, return_exceptions=True), strict=True):
            if isinstance(outcome, np.ndarray):
                assert outcome.tolist() == items
                assert min(items) >= 0
            else:
                assert isinstance(outcome, Refusal)
                assert (outcome.status, outcome.reason) == (503, "model_failed")
                assert min(items) < 0
        assert (await batcher.submit(request(5), in_time())).tolist() == [5]

    with_runner(scenario)


async def test_whatever_a_model_raises_the_thread_goes_on(runner: Runner) -> None:
    class Odd(Fake):
        def run(self, arrays: Arrays) -> np.ndarray:
            if arrays["item.number"][0] == 3:
                raise MemoryError
            return super().run(arrays)[: -1 if arrays["item.number"][0] == 4 else None]

    batcher = Batcher(Odd(), apart(), runner)

    for bad, cause in ((request(3), MemoryError), (request(4, 4), Exception)):
        with pytest.raises(Refusal) as failed:
            await batcher.submit(bad, in_time())
        assert failed.value.reason == "model_failed"
        assert isinstance(failed.value.__cause__, cause)
    assert (await batcher.submit(request(1), in_time())).tolist() == [1]


async def test_a_graph_that_cannot_be_run_is_a_503(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(tiny.to_onnx(1))
    backend = OnnxBackend(tmp_path / "model.onnx", fed=[i.name for i in tiny.SCHEMA.inputs])
    ragged = {**Encoder(tiny.SCHEMA).encode(tiny.GOLDEN[0]), "item.price": np.zeros(7, dtype=np.float32)}

    with pytest.raises(Refusal) as failed:
        await Batcher(backend, apart(), runner).submit(ragged, in_time())

    assert (failed.value.status, failed.value.reason) == (503, "model_failed")


async def test_the_rest_of_a_request_that_failed_is_not_run(runner: Runner) -> None:
    backend = Fake()
    batcher = Batcher(backend, apart(piece=2), runner)

    with pytest.raises(Refusal):
        await batcher.submit(request(1, -2, 1, 1, 1, 1), in_time())
    await batcher.submit(request(7), in_time())

    assert backend.runs == [[1, -2], [7]]


async def test_without_a_busy_thread_a_request_is_run_at_once_and_alone(runner: Runner) -> None:
    backend = Fake()
    batcher = Batcher(backend, joining(), runner)

    for number in range(3):
        await batcher.submit(request(number), in_time())

    assert backend.runs == [[0], [1], [2]]


async def test_what_came_while_the_thread_was_busy_is_run_together(runner: Runner) -> None:
    backend = Fake()
    batcher = Batcher(backend, joining(), runner)
    first = await held_up(backend, batcher)
    answers = [asyncio.create_task(batcher.submit(request(n, user=10 * n), in_time())) for n in (1, 2, 3)]
    await waiting(runner, 3)

    backend.go_on.release()
    await first

    assert [(await answer).tolist() for answer in answers] == [[11], [22], [33]]
    assert backend.runs == [[0], [1, 2, 3]]


async def test_two_models_share_the_thread(runner: Runner) -> None:
    one, two = Fake(), Fake()
    batchers = [Batcher(backend, joining(), runner) for backend in (one, two)]
    first = await held_up(one, batchers[0])
    second = asyncio.create_task(batchers[1].submit(request(2), in_time()))
    await waiting(runner, 1)

    assert two.runs == []
    one.go_on.release()
    await first

    assert (await second).tolist() == [2]


async def test_the_pieces_of_a_request_go_to_all_threads_that_are_free() -> None:
    runner = Runner(Metrics(), max_queued_candidates=100, threads=2)
    backend = Fake()
    backend.lanes, backend.hold = 2, True
    answer = asyncio.create_task(Batcher(backend, apart(piece=2), runner).submit(request(1, 2, 3, 4), in_time()))
    await entered(backend)
    await entered(backend)

    for _ in backend.runs:
        backend.go_on.release()

    assert (await answer).tolist() == [1, 2, 3, 4]
    await runner.aclose()


async def test_runs_and_waits_are_in_the_metrics() -> None:
    metrics = Metrics()
    runner = Runner(metrics, max_queued_candidates=100)
    backend = Fake()
    batcher = Batcher(backend, joining(), runner)
    first = await held_up(backend, batcher)
    waits = [asyncio.create_task(batcher.submit(request(n, n), in_time())) for n in (1, 2)]
    await waiting(runner, 4)
    during = metrics.exposition("")[0].decode()
    backend.go_on.release()
    await asyncio.gather(first, *waits)
    await runner.aclose()
    after = metrics.exposition("")[0].decode()

    assert "clickserve_queue_candidates 4.0" in during
    assert "clickserve_queue_candidates 0.0" in after
    assert "clickserve_batch_candidates_count 2.0" in after
    assert "clickserve_batch_candidates_sum 5.0" in after
    assert 'clickserve_stage_seconds_count{stage="queue"} 3.0' in after
    assert 'clickserve_stage_seconds_count{stage="infer"} 2.0' in after


async def test_the_model_of_its_cost_learns_from_what_runs(runner: Runner) -> None:
    class Slow(Fake):
        def run(self, arrays: Arrays) -> np.ndarray:
            until = time.monotonic() + 2e-3
            while time.monotonic() < until:
                pass
            return super().run(arrays)

    cost = apart()  # which says 1 ms
    batcher = Batcher(Slow(), cost, runner)

    for _ in range(64):
        await batcher.submit(request(1), in_time())

    assert cost.run_s(1, 1) >= 1.8e-3
