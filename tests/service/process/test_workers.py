"""Two workers behind one port, as real processes: what they count, how one is replaced, how all stop."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from service.observability import multiprocess
from service.settings import PREFIX
from service.store.local_server import RedisServer
from tests.service import tiny
from tests.service.conftest import TWO_ARMS

REQUEST = {"user": {"id": "u1"}, "candidates": [{"id": "a1"}, {"id": "a2"}]}
ANSWERED = "clickserve_requests_total"


class Service:
    """A `python -m service serve --workers 2` and what it logs."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path, client: httpx.Client) -> None:
        self.process = process
        self._log = log
        self._client = client

    def wait_for(self, event: str, *, times: int = 1) -> dict[str, Any]:
        """The last of so many log entries of that event."""
        until(lambda: len(self.logged(event)) >= times or self.process.poll() is not None)
        return self.logged(event)[times - 1]

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = self._log.read_text().splitlines()
        return [entry for line in lines if line.startswith("{") and (entry := json.loads(line))["event"] == event]

    def opened(self) -> Self:
        serving = self.wait_for("serving")
        self.port: int = serving["port"]
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = Path(serving["folder"])
        return self

    def pid(self, slot: int) -> int:
        try:
            return int((self.folder / "metrics" / f"{slot}.pid").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def answered_by(self, slot: int, route: str) -> float:
        """Requests to a route, in the newest snapshot of that worker's numbers."""
        snapshot = multiprocess.read(self.folder / "metrics", slot)
        assert snapshot is not None
        requests = snapshot.numbers["clickserve_requests"].items()  # by route, status and arm
        return sum(count for (of_route, *_), (count,) in requests if of_route == route)

    def predict_until(self, slot: int, *, more_than: float = 0) -> None:
        """Asks, each time over a new connection, until that worker has answered more predictions than that."""

        def answered() -> bool:
            assert self.predict().status_code == 200
            return self.answered_by(slot, "/predict") > more_than

        until(answered)

    def predict(self) -> httpx.Response:
        """Over a connection of its own."""
        return self._client.post(f"{self.url}/predict", json=REQUEST)

    def answered(self) -> float:
        """Predictions, by the metrics that some worker shows."""
        text = self._client.get(f"{self.url}/metrics").text
        samples = [s for f in text_string_to_metric_families(text) for s in f.samples if s.name == ANSWERED]
        return sum(sample.value for sample in samples if sample.labels["route"] == "/predict")


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "it did not come true within thirty seconds"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """Ended, and not a zombie that nobody asked after."""
    return not Path(f"/proc/{pid}").exists()


@contextmanager
def started(folder: Path, artifacts: Path, *arguments: str, **given: Any) -> Iterator[Service]:
    config, log = folder / "service.yaml", folder / "service.log"
    settings = {"artifacts_dir": str(artifacts), "experiment": TWO_ARMS, "port": 0, "drain_s": 0, "workers": 2, **given}
    config.write_text(yaml.safe_dump(settings))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    command = [sys.executable, "-m", "service", "serve", "--config", str(config), *arguments]
    apart = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=10)
    with log.open("wb") as out, apart, subprocess.Popen(command, stderr=out, env=environment) as process:
        try:
            yield Service(process, log, apart)
        finally:
            process.terminate()
            try:
                process.wait(30)
            finally:
                process.kill()


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
