"""The service as real processes, as an operator starts it, with what it logs and how it is asked."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from service.observability import multiprocess
from service.settings import PREFIX
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
        self._serving = self.wait_for("serving")
        self.port: int = self._serving["port"]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    @property
    def folder(self) -> Path:
        """What several workers share; one alone has none."""
        return Path(self._serving["folder"])

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
