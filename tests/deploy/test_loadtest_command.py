"""The command `deploy/bench/load.py` from end to end, against a real service."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
import uvloop
from load import main
from loadtest.connection import Address
from loadtest.errors import BenchError
from loadtest.generator_pool import GeneratorPool, Interrupted
from loadtest.request_bodies import RequestMix
from loadtest.results import NO_ANSWER, OK
from loadtest.target import stall, target

from service.app import create_app
from service.settings import Settings
from tests.service import tiny
from tests.service.conftest import TWO_ARMS


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

    code = main(["--url", url, *load, "--json", str(file)])

    row = json.loads(file.read_text())["runs"][0]
    assert code == 0
    assert row["errors"] == row["degraded"] == 0
    assert row["goodput_per_s"] == row["offered_per_s"] == row["requests"] / 0.5
    assert row["candidates_per_s"] == 3 * row["goodput_per_s"]
    assert row["cpu_s_per_1000_candidates"] > 0 and 0 < row["p50_ms"] <= row["p99_ms"] <= row["p999_ms"]
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].split("|")]
    assert cells[1:4] == ["100/s", f"{row['offered_per_s']:.1f}", f"{row['goodput_per_s']:.1f}"]


def test_what_was_due_during_a_stall_stands_apart(url, tmp_path):
    file = tmp_path / "bench.json"
    load = ["--rate", "200", "--seconds", "2", "--candidates", "2", "--timeout-ms", "5000", "--items", "10"]

    assert main(["--url", url, *load, "--stall-store", "sleep 0.1", "--json", str(file)]) == 0

    steady, during = json.loads(file.read_text())["runs"]
    assert (steady["label"], during["label"][:24]) == ("store stalled: steady", "store stalled: during (0")
    # It begins in the middle, lasts 0.1 s and counts for a quarter of a second more.
    assert 0.05 < during["requests"] / (steady["requests"] + during["requests"]) < 0.5
    assert steady["errors"] == during["errors"] == 0


def test_a_frozen_store_wakes_up_again():
    with subprocess.Popen(["sleep", "60"]) as process:
        state = Path(f"/proc/{process.pid}/stat")
        freezing = threading.Thread(target=stall, args=(process.pid, 0.2))
        freezing.start()
        states = set()
        while freezing.is_alive():
            states.add(state.read_text().split()[2])
        states_after = state.read_text().split()[2]
        process.kill()

    assert "T" in states
    assert states_after != "T"
    with pytest.raises(BenchError, match="--store-pid"):
        stall(process.pid, 0.1)


def test_a_process_and_its_children_are_one_service():
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    with subprocess.Popen([sys.executable, "-c", script], start_new_session=True) as process:
        service = target("http://127.0.0.1:1", pid=process.pid)
        process_s = float(Path(f"/proc/{process.pid}/schedstat").read_text().split()[0]) / 1e9
        until = time.monotonic() + 30
        while (service.cpu_s() or 0) < process_s + 0.3 and time.monotonic() < until:  # its own start takes far less
            pass
        spent = service.cpu_s()
        os.killpg(process.pid, signal.SIGKILL)

    assert spent is not None and spent >= process_s + 0.3


def test_an_interrupted_run_keeps_what_it_measured(url):
    host, port = url.removeprefix("http://").split(":")

    def meanwhile(start: float) -> None:
        time.sleep(max(start + 0.3 - time.monotonic(), 0))  # someone watches for a while, then has seen enough
        raise KeyboardInterrupt

    address, mix = Address(host=host, port=int(port)), RequestMix(candidates=2, users=10, items=10)
    with GeneratorPool(address, mix, processes=1, connections=8, seed=1) as pool, pytest.raises(Interrupted) as cut:
        pool.run(100, 30, meanwhile=meanwhile)

    found = cut.value.outcome
    assert 0 < len(found.status) < 100 and (found.status == OK).all()
    assert 0.25 < found.seconds < 5


def test_a_run_whose_action_fails_leaves_nothing_to_the_next(url):
    host, port = url.removeprefix("http://").split(":")

    def meanwhile(start: float) -> None:
        raise BenchError("the swap was refused")

    address, mix = Address(host=host, port=int(port)), RequestMix(candidates=2, users=10, items=10)
    with GeneratorPool(address, mix, processes=1, connections=8, seed=1) as pool:
        with pytest.raises(BenchError, match="the swap was refused"):
            pool.run(100, 30, meanwhile=meanwhile)
        found = pool.run(100, 0.3)

    assert found.seconds == 0.3
    assert len(found.status) > 10 and (found.status == OK).all()


def test_an_outcome_larger_than_the_pipe_comes_whole():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = Address(host="127.0.0.1", port=silent.getsockname()[1])
        with GeneratorPool(address, RequestMix(candidates=1), processes=1, connections=2, seed=1) as pool:
            found = pool.run(100_000, 0.2)

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
def test_input_that_cannot_be_used_is_refused_in_one_sentence(options, sentence, capsys):
    assert main([*options]) == 2

    error = capsys.readouterr().err
    assert error.startswith(f"error: {sentence}") and error.count("\n") == 1


def test_a_load_that_the_service_refuses_is_reported_before_it_runs(url, tmp_path, capsys):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"candidates": [{"id": "a1", "color": 1}]}\n')

    assert main(["--url", url, "--requests", str(file)]) == 2

    assert "the service gave 422" in capsys.readouterr().err
