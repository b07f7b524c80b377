"""Two workers behind one port, as real processes: what they count, how one is replaced, how all stop."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from service.store.local_server import RedisServer
from tests.service import tiny
from tests.service.conftest import TWO_ARMS
from tests.service.running_process import REQUEST, Service, is_gone, started, until


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, artifacts: Path, session_redis: RedisServer) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("workers")
    experiment = folder / "experiment.yaml"
    experiment.write_text(yaml.safe_dump(TWO_ARMS))
    settings = {"max_connection_s": 0.2, "experiment": str(experiment), "redis_url": session_redis.url}
    with started(folder, artifacts, **settings) as running:
        running.opened()
        experiment.unlink()  # it was read once: who replaces a worker serves what the others serve
        yield running


def test_both_workers_answer_and_either_tells_the_totals_of_both(service: Service) -> None:
    before = service.answered()
    slots = range(2)

    statuses = {service.predict().status_code for _ in range(40)}
    until(lambda: service.answered() == before + 40)  # the other worker's numbers are up to a second old
    shown = {service.answered() for _ in range(40)}

    assert statuses == {200}
    assert shown == {before + 40}
    assert all(service.answered_by(slot, "/predict") > 0 for slot in slots)
    assert all(service.answered_by(slot, "/metrics") > 0 for slot in slots)


def test_a_killed_worker_is_replaced_and_no_counter_goes_back(service: Service) -> None:
    service.predict_until(1)
    its_own, killed = service.answered_by(1, "/predict"), service.pid(1)
    before = service.answered()

    os.kill(killed, signal.SIGKILL)
    died = service.wait_for("worker died")
    until(lambda: service.pid(1) == 0)  # it counts as gone before another takes its slot
    until(lambda: service.pid(1) not in (0, killed))
    service.wait_for("worker serving", times=3)
    after = service.answered()
    service.predict_until(1, more_than=its_own)

    assert (died["worker"], died["reason"]) == (1, "worker 1 ended with signal SIGKILL")
    assert after >= before
    assert is_gone(killed)


def test_an_old_connection_is_told_to_close_with_an_answer(service: Service) -> None:
    with httpx.Client(base_url=service.url) as client:
        young = client.get("/healthz")
        until(lambda: client.get("/healthz").headers.get("connection") == "close")
        anew = client.get("/healthz")

    assert (young.status_code, "connection" in young.headers) == (200, False)
    assert (anew.status_code, "connection" in anew.headers) == (200, False)


def test_a_second_service_on_the_port_is_refused_in_one_sentence(
    service: Service, tmp_path: Path, artifacts: Path, redis_url: str
) -> None:
    with started(tmp_path, artifacts, "--port", str(service.port), redis_url=redis_url) as second:
        second.process.wait(30)

    told = [line for line in (tmp_path / "service.log").read_text().splitlines() if not line.startswith("{")]
    assert second.process.returncode == 2
    assert told == [f"error: settings host and port: cannot listen on 127.0.0.1:{service.port}: Address already in use"]


def test_an_artifact_that_is_bad_ends_all_with_one_sentence(tmp_path: Path, redis_url: str) -> None:
    tiny.write(tmp_path / "bad", "tiny", offset=1.0)

    with started(tmp_path, tmp_path / "bad", redis_url=redis_url) as running:
        running.process.wait(30)

    told = [line for line in (tmp_path / "service.log").read_text().splitlines() if not line.startswith("{")]
    assert running.process.returncode == 2
    assert len(told) == 1
    assert told[0].startswith(f"error: {tmp_path}/bad/tiny/")


def test_a_stop_finishes_what_is_under_way_in_every_worker(tmp_path: Path, artifacts: Path, redis_url: str) -> None:
    body = json.dumps(REQUEST).encode()
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    with started(tmp_path, artifacts, drain_s=0.3, timeout_ms=30_000, redis_url=redis_url) as running:
        running.opened()
        pids = [running.pid(slot) for slot in range(2)]
        half_sent = [socket.create_connection(("127.0.0.1", running.port), timeout=10) for _ in range(16)]
        for connection in half_sent:
            connection.sendall(head + body[:10])
        for slot in range(2):  # connections are accepted in their order, so these come after the half sent ones
            running.predict_until(slot)

        running.process.terminate()
        for slot in range(2):
            running.wait_for("Shutting down", times=slot + 1)
        answers = []
        for connection in half_sent:
            connection.sendall(body[10:])
            answers.append(connection.recv(65536))
            connection.close()
        running.process.wait(30)

    assert {answer.split(b"\r\n")[0] for answer in answers} == {b"HTTP/1.1 200 OK"}
    assert running.process.returncode == 0
    assert all(is_gone(pid) for pid in pids)
    assert not running.folder.exists()


def test_workers_whose_supervisor_is_killed_end_by_themselves(tmp_path: Path, artifacts: Path, redis_url: str) -> None:
    with started(tmp_path, artifacts, redis_url=redis_url) as running:
        running.opened()
        pids = [running.pid(slot) for slot in range(2)]

        running.process.kill()

        until(lambda: all(is_gone(pid) for pid in pids))
        until(lambda: not running.folder.exists())


def test_a_reload_goes_on_answering_and_a_worker_that_hangs_is_replaced(
    tmp_path: Path, artifacts: Path, redis_url: str
) -> None:
    """A stopped process is one whose loop never returns: it does not even run its own watchdog."""
    with started(tmp_path, artifacts, redis_url=redis_url, watchdog_s=1, drain_s=0.5) as running:
        running.opened()
        before = [running.pid(slot) for slot in range(2)]

        running.process.send_signal(signal.SIGHUP)
        statuses, resets = set(), 0

        def reloaded() -> bool:
            nonlocal resets
            try:
                statuses.add(running.predict().status_code)
            except httpx.TransportError:  # the kernel resets what a closing socket had not accepted yet
                resets += 1
            return bool(running.logged("reloaded"))

        until(reloaded)
        after = [running.pid(slot) for slot in range(2)]
        os.kill(after[0], signal.SIGSTOP)
        died = running.wait_for("worker died")
        running.wait_for("worker serving", times=5)

    assert statuses == {200}
    assert resets <= 2  # one a worker
    assert not set(before) & set(after)
    assert all(is_gone(pid) for pid in before)
    assert (died["worker"], died["reason"]) == (0, "worker 0 ended with signal SIGKILL")


def test_several_workers_without_a_store_are_refused_in_one_sentence(tmp_path: Path, artifacts: Path) -> None:
    with started(tmp_path, artifacts) as running:
        running.process.wait(30)

    assert running.process.returncode == 2
    assert "error: setting workers: 2 processes need a store" in (tmp_path / "service.log").read_text()


def test_one_process_alone_takes_a_hang_up_for_a_stop(tmp_path: Path, artifacts: Path) -> None:
    with started(tmp_path, artifacts, workers=1) as running:
        running.wait_for("serving")

        running.process.send_signal(signal.SIGHUP)
        running.process.wait(30)

    assert running.process.returncode == 0
    assert running.logged("stopping")
