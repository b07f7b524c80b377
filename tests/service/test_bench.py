"""The load generator: its plan, its clock, its arithmetic, and a run against a real service."""

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import uvicorn
import uvloop
from scipy import stats

from models.schema import Group
from service import shapes
from service.__main__ import main
from service.app import create_app
from service.bench.arrivals import Zipf, lognormal, poisson
from service.bench.bodies import Mix, read_requests
from service.bench.connection import Address
from service.bench.errors import BenchError
from service.bench.fleet import Fleet, Interrupted
from service.bench.generator import Generator, Plan
from service.bench.knee import TOLERANCE, find_knee
from service.bench.outcome import NO_ANSWER, OK, PRIOR, Outcome, figures, percentile_ms, share_within, together
from service.bench.target import stall, target
from service.settings import Settings
from tests.service import tiny
from tests.service.conftest import TWO_ARMS


def outcome(latency_s=(), status=None, *, lag_s=None, due_s=None, busy=0.1, candidates=10) -> Outcome:
    num = len(latency_s)
    return Outcome(
        due_s=np.array(np.arange(num) if due_s is None else due_s, dtype=np.float64),
        lag_s=np.array([0.0] * num if lag_s is None else lag_s),
        latency_s=np.array(latency_s, dtype=np.float64),
        status=np.array([OK] * num if status is None else status, dtype=np.int16),
        candidates=np.full(num, candidates, dtype=np.int32),
        degraded=np.zeros(num, dtype=np.bool_),
        seconds=2.0,
        busy=busy,
    )


# --- the plan ---


def test_requests_are_due_as_a_poisson_process_has_them():
    due_s = poisson(1000, 20, np.random.default_rng(1))

    gaps = np.diff(due_s, prepend=0.0)

    assert due_s[-1] < 20 and abs(len(due_s) - 20_000) < 5 * math.sqrt(20_000)
    assert stats.kstest(gaps, "expon", args=(0, 1 / 1000)).pvalue > 0.01
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.03


def test_the_same_seed_draws_the_same_plan():
    one, same, other = (poisson(100, 5, np.random.default_rng(seed)) for seed in (1, 1, 2))

    np.testing.assert_array_equal(one, same)
    assert len(one) != len(other) or (one != other).any()


def test_candidates_have_their_median_and_their_cap():
    sizes = lognormal(50_000, np.random.default_rng(1), median=100, cap=1000)

    assert sizes.min() >= 1 and sizes.max() == 1000
    assert np.median(sizes) == pytest.approx(100, rel=0.03)
    assert (sizes > 1000 / 2).mean() == pytest.approx(stats.norm.sf(math.log(500.5 / 100) / 0.7), rel=0.1)


def test_popular_ones_come_as_often_as_zipf_says():
    drawn = Counter(Zipf(50, 1.0).draw(100_000, np.random.default_rng(1)).tolist())

    harmonic = sum(1 / k for k in range(1, 51))
    for rank in (0, 1, 9, 49):
        assert drawn[rank] / 100_000 == pytest.approx(1 / (rank + 1) / harmonic, rel=0.1)


def test_a_request_names_an_item_once_if_there_are_enough():
    few, draw = Zipf(20, 1.0), np.random.default_rng(1)

    assert sorted(few.distinct(20, draw).tolist()) == list(range(20))
    assert len(set(few.distinct(7, draw).tolist())) == 7
    assert set(few.distinct(30, draw).tolist()) == set(range(20))


@pytest.mark.parametrize("form", ["list", "columnar"])
def test_bodies_fit_the_schema_they_are_drawn_from(form):
    groups: frozenset[Group] = frozenset({"context", "user", "item"})
    mix = Mix(form=form, candidates=4, timeout_ms=20.0, schema=tiny.SCHEMA, sent=groups)

    body = mix.draw(1, np.random.default_rng(3))[0]

    asked = msgspec.json.decode(body.content, type=shapes.PredictRequest)
    given = msgspec.json.decode(body.content)
    rows = given["candidates"]
    if form == "columnar":
        rows = [{"id": i, "features": {n: rows[n][k] for n in rows if n != "id"}} for k, i in enumerate(rows["id"])]
    assert body.candidates == 4 and asked.timeout_ms == 20
    assert sorted(row["id"] for row in rows) == ["a1", "a2", "a3", "a4"]
    assert given["user"]["features"]["gender"] in ("F", "M") and set(given["context"]) == {"device"}
    assert all(set(row["features"]["genres"]) <= {"x", "y", "z"} for row in rows)
    assert all(isinstance(row["features"]["price"], float) for row in rows)


def test_both_forms_ask_for_the_same():
    one, other = (Mix(form=f, candidates=5).draw(3, np.random.default_rng(7)) for f in ("list", "columnar"))

    for a, b in zip(one, other, strict=True):
        rows, columns = (json.loads(body.content)["candidates"] for body in (a, b))
        assert [row["id"] for row in rows] == columns["id"]


def test_replayed_requests_keep_all_but_their_deadline(tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"candidates": [{"id": 1}], "ts": 5}\n\n{"candidates": {"id": [1, 2]}, "timeout_ms": 1}\n')

    first, second = read_requests(file, 30.0)

    assert json.loads(first.content) == {"candidates": [{"id": 1}], "ts": 5, "timeout_ms": 30.0}
    assert (first.candidates, second.candidates) == (1, 2)
    file.write_text('{"candidates": [{"id": 1}]}\n{"user": {}}\n')
    with pytest.raises(BenchError, match=r"line 2: expected a body of /predict with candidates"):
        read_requests(file, 30.0)


# --- the arithmetic ---


@pytest.mark.parametrize("num", [1, 2, 99, 100, 101, 1000])
@pytest.mark.parametrize("share", [0.5, 0.99, 0.999])
def test_a_percentile_is_the_smallest_value_that_this_share_does_not_exceed(num, share):
    values = np.random.default_rng(num).exponential(size=num)

    found = percentile_ms(values, share)

    assert found == pytest.approx(1000 * next(v for v in sorted(values) if (values <= v).mean() >= share - 1e-12))
    assert percentile_ms(values[:0], share) is None


def test_figures_of_a_run_are_those_counted_by_hand():
    latency_s = [0.001, 0.002, 0.030, 0.004, 0.005, 0.001, math.nan, 0.006]
    run = outcome(latency_s, [OK, OK, OK, 503, 504, PRIOR, NO_ANSWER, 422])

    found = figures(run, deadline_s=0.020)

    assert (found.requests, found.offered_per_s, found.errors) == (8, 4.0, 2)
    assert (found.goodput_per_s, found.late_per_s, found.refused_per_s) == (1.0, 0.5, 1.5)
    assert (found.p50_ms, found.p99_ms, found.refused_p99_ms) == (2.0, 30.0, 5.0)
    assert found.candidates_per_s == 15
    assert share_within(run, 0.020) == 2 / 8


def test_several_generators_are_one_run():
    parts = [outcome([0.001] * 3, busy=0.2), outcome([0.002] * 2, busy=0.5)]

    both = together(parts)

    assert len(both.status) == 5 and both.busy == 0.5 and both.seconds == 2.0
    assert figures(both, 1.0).offered_per_s == 2.5


def test_a_part_of_a_run_holds_the_requests_due_in_its_spans():
    run = outcome([0.001] * 5, due_s=[0.0, 0.5, 1.0, 1.5, 2.0])

    inside = run.during([(0.4, 1.1), (1.9, 3.0)])

    assert inside.tolist() == [False, True, True, False, True]
    assert run.part(inside, 1.8).due_s.tolist() == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("run", "excuse"),
    [
        (outcome([0.1] * 100), None),
        (outcome([0.1] * 100, busy=0.95), "took 95% of its core"),
        (outcome([0.1] * 100, lag_s=[0.0] * 98 + [0.002] * 2), "more than 2.00 ms late"),
        (outcome([0.004] * 100, lag_s=[0.0] * 98 + [0.0005] * 2), "sent 0.50 ms late, of a p99 of 4.00 ms"),
        (outcome([0.004] * 100, lag_s=[0.0] * 99 + [0.0005]), None),
    ],
)
def test_the_generator_says_when_the_numbers_are_its_own(run, excuse):
    told = figures(run, 1.0).excuse

    assert told is None if excuse is None else excuse in (told or "")


# --- the search ---


@pytest.mark.parametrize("start", [1.0, 300.0, 950.0, 20_000.0])
def test_the_search_finds_the_knee_of_a_queue(start):
    # M/M/1: the time in the system is exponential with rate mu - lambda, so its p99 is ln 100 / (mu - lambda).
    mu, bound_s = 1000.0, 0.010
    knee = mu - math.log(100) / bound_s

    found = find_knee(lambda rate: rate < mu and math.log(100) / (mu - rate) <= bound_s, start=start)

    assert knee / (1 + TOLERANCE) <= found <= knee


def test_one_spoilt_window_does_not_move_the_knee():
    calls: Counter[float] = Counter()

    def holds(rate: float) -> bool:
        calls[rate] += 1
        return rate <= 500 and calls[rate] > 1

    assert find_knee(holds, start=400) == pytest.approx(500, rel=TOLERANCE)


def test_a_service_that_keeps_no_promise_has_no_knee():
    with pytest.raises(BenchError, match="there is no knee"):
        find_knee(lambda _: False, start=100)


# --- the clock: against a server that does what the test says ---

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
    assert (found.status == OK).all() and found.starved == 4


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


async def test_a_generator_that_is_held_up_says_so():
    async def answer() -> bytes:
        return YES

    async with generator(answer) as made:
        asyncio.get_running_loop().call_later(0.05, time.sleep, 0.1)  # as another program on its core would
        found = await run(made, np.linspace(0, 0.2, 100).tolist(), seconds=0.2)

    assert "late" in str(figures(found, 1.0).excuse)


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
    assert 30 < len(found.status) <= 3 * 0.2 / 0.005 + 3


# --- the whole command, against a real service ---


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("artifacts")
    tiny.write(root, "tiny", seed=1)
    tiny.write(root, "other", seed=2)
    app = create_app(Settings(artifacts_dir=root, experiment=TWO_ARMS))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, http="httptools"))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            thread = threading.Thread(target=lambda: runner.run(server.serve(sockets=[listener])))
            thread.start()
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            server.should_exit = True
            thread.join()


def test_one_run_prints_its_table_and_its_json(url, tmp_path, capsys):
    schema, file = tmp_path / "schema.json", tmp_path / "bench.json"
    schema.write_text(tiny.SCHEMA.to_json())
    load = ["--rate", "100", "--seconds", "0.5", "--candidates", "3", "--timeout-ms", "5000", "--schema", str(schema)]

    code = main(["bench", "--url", url, *load, "--json", str(file)])

    told = json.loads(file.read_text())["runs"][0]
    assert code == 0
    assert told["errors"] == told["degraded"] == 0
    assert told["goodput_per_s"] == told["offered_per_s"] == told["requests"] / 0.5
    assert told["candidates_per_s"] == 3 * told["goodput_per_s"]
    assert told["cpu_s_per_1000_candidates"] > 0 and 0 < told["p50_ms"] <= told["p99_ms"] <= told["p999_ms"]
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")]
    assert cells[1:4] == ["100/s", f"{told['offered_per_s']:.1f}", f"{told['goodput_per_s']:.1f}"]


def test_what_was_due_during_a_stall_stands_apart(url, tmp_path):
    file = tmp_path / "bench.json"
    load = ["--rate", "200", "--seconds", "1", "--candidates", "2", "--timeout-ms", "5000", "--items", "10"]

    assert main(["bench", "--url", url, *load, "--stall-store", "sleep 0.1", "--json", str(file)]) == 0

    steady, during = json.loads(file.read_text())["runs"]
    assert (steady["label"], during["label"][:24]) == ("store stalled: steady", "store stalled: during (0")
    # It begins in the middle, lasts 0.1 s and counts for a quarter of a second more.
    assert 0.25 < during["requests"] / (steady["requests"] + during["requests"]) < 0.5
    assert steady["errors"] == during["errors"] == 0


def test_a_frozen_store_wakes_up_again():
    with subprocess.Popen(["sleep", "60"]) as process:
        state = Path(f"/proc/{process.pid}/stat")
        freezing = threading.Thread(target=stall, args=(process.pid, 0.2))
        freezing.start()
        time.sleep(0.1)
        frozen = state.read_text().split()[2]
        freezing.join()
        process.kill()

    assert frozen == "T"
    with pytest.raises(BenchError, match="--store-pid"):
        stall(process.pid, 0.1)


def test_a_process_and_its_children_are_one_service():
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    with subprocess.Popen([sys.executable, "-c", script], start_new_session=True) as process:
        aim = target("http://127.0.0.1:1", pid=process.pid)
        before = aim.cpu_s()
        time.sleep(0.6)
        after = aim.cpu_s()
        os.killpg(process.pid, signal.SIGKILL)

    assert before is not None and after is not None and after - before > 0.05


def test_an_interrupted_run_keeps_what_it_measured(url):
    host, port = url.removeprefix("http://").split(":")

    def meanwhile(start: float) -> None:
        time.sleep(max(start + 0.3 - time.monotonic(), 0))
        raise KeyboardInterrupt

    address, mix = Address(host=host, port=int(port)), Mix(candidates=2, users=10, items=10)
    with Fleet(address, mix, processes=1, connections=8, seed=1) as fleet, pytest.raises(Interrupted) as cut:
        fleet.run(100, 30, meanwhile=meanwhile)

    found = cut.value.outcome
    assert 0 < len(found.status) < 100 and (found.status == OK).all()
    assert 0.25 < found.seconds < 5


def test_an_outcome_larger_than_the_pipe_comes_whole():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = Address(host="127.0.0.1", port=silent.getsockname()[1])
        with Fleet(address, Mix(candidates=1), processes=1, connections=2, seed=1) as fleet:
            found = fleet.run(100_000, 0.2)

    assert len(found.status) > 15_000
    assert set(found.status.tolist()) == {NO_ANSWER}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--url", "ftp://x"], "--url: expected http://HOST:PORT, got 'ftp://x'"),
        (["--url", "http://127.0.0.1:1"], "--url: no answer from 127.0.0.1:1: [Errno 111] Connection refused"),
        (["--url", "http://127.0.0.1:1", "--requests", "/no/file"], "--requests /no/file: No such file or directory"),
        (["--url", "http://127.0.0.1:1", "--swap", "one"], "--swap needs --admin-token"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_sentence(options, sentence, capsys):
    assert main(["bench", *options]) == 2

    told = capsys.readouterr().err
    assert told.startswith(f"error: {sentence}") and told.count("\n") == 1


def test_a_load_that_the_service_refuses_is_told_before_it_runs(url, tmp_path, capsys):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"candidates": [{"id": "a1", "color": 1}]}\n')

    assert main(["bench", "--url", url, "--requests", str(file)]) == 2

    assert "the service gave 422" in capsys.readouterr().err
