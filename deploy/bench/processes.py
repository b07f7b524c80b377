"""Child processes of a benchmark, each bound to cores: services of any checkout, their peers, the graph in a loop."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.error import URLError
from urllib.request import urlopen

import yaml
from checkouts import ROOT
from loadtest.connection import Address
from peers import LISTENING
from prometheus_client.parser import text_string_to_metric_families

PEERS = Path(__file__).with_name("peers.py")
START_S = 120.0
STOP_S = 60.0
ADMIN_TOKEN = "bench"  # noqa: S105 - of services that only this machine reaches, for a few minutes


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running HTTP server of one or several processes."""

    port: int
    pids: tuple[int, ...]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def address(self) -> Address:
        return Address(host="127.0.0.1", port=self.port)

    def samples(self) -> dict[str, float]:
        """A service's /metrics by name and labels: `clickserve_stage_seconds_sum stage=parse`; workers added up."""
        with urlopen(f"{self.url}/metrics", timeout=30) as answer:  # noqa: S310 - a URL of ours
            text = answer.read().decode()
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = " ".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "worker")
                key = f"{sample.name} {labels}".strip()
                values[key] = values.get(key, 0.0) + sample.value
        return values

    def num_degraded(self) -> float:
        """Degraded answers of a service so far."""
        return sum(v for key, v in self.samples().items() if key.startswith("clickserve_degraded_total"))

    def rss_mb(self) -> float:
        """Resident memory of all its processes."""
        return sum(_rss_mb(pid) for parent in self.pids for pid in _tree(parent))


@contextmanager
def service(
    model: str,
    artifacts: Path,
    folder: Path,
    redis_url: str,
    *,
    cores: Sequence[int],
    workers: int = 1,
    checkout: Path = ROOT,
    **settings: str,
) -> Iterator[Server]:
    """One that answers everybody with that model, on these cores, until the block ends."""
    port = _free_port()
    config = folder / f"{model}-{port}.yaml"
    arms = [{"name": "one", "model": model, "share": 100}]
    config.write_text(yaml.safe_dump({"experiment": {"experiment": "bench", "salt": "bench", "arms": arms}}))
    environment = {
        "PYTHONPATH": str(checkout),
        "CLICKSERVE_REDIS_URL": redis_url,
        "CLICKSERVE_ARTIFACTS_DIR": str(artifacts),
        "CLICKSERVE_ADMIN_TOKEN": ADMIN_TOKEN,
        "CLICKSERVE_DRAIN_S": "0",
        **settings,
    }
    command = ["-m", "service", "serve", "--config", str(config), "--port", str(port), "--workers", str(workers)]
    log = folder / f"{model}-{port}.log"
    with _process(command, cores, log, environment=environment, checkout=checkout) as process:
        server = Server(port=port, pids=(process.pid,))
        _wait_until(lambda: _is_ready(server.url), [process], log)
        yield server


@contextmanager
def peer(
    kind: Literal["fastapi", "asgi"], graph: Path, folder: Path, *, cores: Sequence[int], workers: int = 1
) -> Iterator[Server]:
    """A server of peers.py: as many processes as workers, on one port."""
    port = _free_port()
    log = folder / f"{kind}-{port}.log"
    command = [str(PEERS), kind, str(graph), "--port", str(port)]
    with ExitStack() as stack:
        processes = [stack.enter_context(_process(command, cores, log)) for _ in range(workers)]
        server = Server(port=port, pids=tuple(process.pid for process in processes))
        _wait_until(lambda: log.read_text().count(LISTENING) == workers, processes, log)
        yield server


class Loop:
    """The graph in a loop, without HTTP."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    def runs_per_s(self, seconds: float) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{seconds}\n".encode())
        self._process.stdin.flush()
        runs, took = self._process.stdout.readline().split()
        return int(runs) / float(took)


@contextmanager
def loop(graph: Path, inputs: Path, *, cores: Sequence[int]) -> Iterator[Loop]:
    with subprocess.Popen(
        [sys.executable, str(PEERS), "loop", str(graph), str(inputs)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=partial(os.sched_setaffinity, 0, cores),  # noqa: PLW1509 - one system call
    ) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                sys.exit(f"{graph}: does not run in a loop; the reason stands above")
            yield Loop(process)
        finally:
            process.terminate()


@contextmanager
def _process(
    command: Sequence[str],
    cores: Sequence[int],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    checkout: Path = ROOT,
) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=checkout,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=out,
            stderr=out,
            preexec_fn=partial(os.sched_setaffinity, 0, cores),  # noqa: PLW1509 - one system call
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_S)


def _wait_until(is_ready: Callable[[], bool], processes: Sequence["subprocess.Popen[bytes]"], log: Path) -> None:
    until = time.monotonic() + START_S
    while all(process.poll() is None for process in processes) and time.monotonic() < until:
        if is_ready():
            return
        time.sleep(0.1)
    lines = log.read_text(errors="replace").strip().splitlines()
    sys.exit(f"{log.stem}: not ready within {START_S:g} s: {lines[-1] if lines else 'its log is empty'}")


def _is_ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/readyz", timeout=5):  # noqa: S310 - a URL of ours
            return True
    except (URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


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
