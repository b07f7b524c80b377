"""The processes that engine.py sets against each other: the store, services bound to cores, the bare graph."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import yaml
from loadtest.connection import Address
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
START_S = 120.0
STOP_S = 60.0
ADMIN_TOKEN = "bench"  # noqa: S105 - of services that only this machine reaches, for a few minutes


@dataclass(frozen=True, kw_only=True)
class Service:
    url: str
    port: int
    pid: int

    @property
    def address(self) -> Address:
        return Address(host="127.0.0.1", port=self.port)

    def samples(self) -> dict[str, float]:
        """/metrics by name and labels: `clickserve_stage_seconds_sum stage=parse`; those of several workers added."""
        with urlopen(f"{self.url}/metrics", timeout=30) as answer:  # noqa: S310 - a URL of ours
            text = answer.read().decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = " ".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "worker")
                key = f"{sample.name} {labels}".strip()
                found[key] = found.get(key, 0.0) + sample.value
        return found

    def rss_mb(self) -> float:
        """Resident memory of all its processes."""
        return sum(_rss_mb(pid) for pid in _tree(self.pid))


@contextmanager
def service(
    model: str,
    artifacts: Path,
    folder: Path,
    redis_url: str,
    *,
    cores: Sequence[int],
    workers: int = 1,
    **settings: str,
) -> Iterator[Service]:
    """One that answers everybody with that model, on these cores, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / f"{model}-{port}.yaml"
    arms = [{"name": "one", "model": model, "share": 100}]
    config.write_text(yaml.safe_dump({"experiment": {"experiment": "bench", "salt": "bench", "arms": arms}}))
    environment = {
        "CLICKSERVE_REDIS_URL": redis_url,
        "CLICKSERVE_ARTIFACTS_DIR": str(artifacts),
        "CLICKSERVE_ADMIN_TOKEN": ADMIN_TOKEN,
        "CLICKSERVE_DRAIN_S": "0",
        **settings,
    }
    options = ["--config", str(config), "--port", str(port), "--workers", str(workers)]
    with _process(["-m", "service", "serve", *options], cores, folder / f"{model}-{port}.log", environment) as process:
        started = Service(url=f"http://127.0.0.1:{port}", port=port, pid=process.pid)
        _wait_until_ready(started.url, process, folder / f"{model}-{port}.log")
        yield started


class Bare:
    """The graph alone."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    def per_s(self, seconds: float) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{seconds}\n".encode())
        self._process.stdin.flush()
        runs, took = self._process.stdout.readline().split()
        return int(runs) / float(took)


@contextmanager
def bare(graph: Path, inputs: Path, *, cores: Sequence[int]) -> Iterator[Bare]:
    process = subprocess.Popen(
        [sys.executable, str(HERE / "bare.py"), str(graph), str(inputs)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=partial(os.sched_setaffinity, 0, cores),  # noqa: PLW1509 - one system call
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            sys.exit("the graph does not run by itself; what it said stands above")
        yield Bare(process)
    finally:
        process.terminate()
        process.wait(STOP_S)


@contextmanager
def _process(
    command: Sequence[str], cores: Sequence[int], log: Path, environment: Mapping[str, str]
) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=out,
            stderr=out,
            preexec_fn=partial(os.sched_setaffinity, 0, cores),  # noqa: PLW1509 - one system call
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_S)


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until:
        try:
            with urlopen(f"{url}/readyz", timeout=5):  # noqa: S310 - as above
                return
        except (URLError, OSError):
            time.sleep(0.1)
    said = log.read_text(errors="replace").strip().splitlines()
    sys.exit(f"the service did not become ready within {START_S:g} s: {said[-1] if said else 'it said nothing'}")


def _tree(pid: int) -> Iterator[int]:
    yield pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    for child in children.read_text().split() if children.exists() else ():
        yield from _tree(int(child))


def _rss_mb(pid: int) -> float:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
