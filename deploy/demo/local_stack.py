"""Runs exported and put online on this machine: artifacts, a store filled with the data set's past, the service."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from service.store import local_server

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "deploy" / "service.yaml"
START_S = 60


@contextmanager
def online(data: Path, runs: Mapping[str, Path], folder: Path, *, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """The service with one run an arm, on `port`, knowing the users, the items and the clicks before the test part.

    Leaves the artifacts, each arm's offline scores (`ARM.parquet`) and the service's log in `folder`. The store is
    CLICKSERVE_REDIS_URL's where that is set, else a server of its own. Exits with the failing command's own message.
    """
    for arm, run in runs.items():
        command("training", "export", run, "--out", folder / "artifacts")
        command("training", "evaluate", run, "--data", data, "--predictions", scores(folder, arm))
    url = os.environ.get("CLICKSERVE_REDIS_URL")
    with _reachable(url) if url else local_server.start() as server:
        environment = {
            "CLICKSERVE_REDIS_URL": server if isinstance(server, str) else server.url,
            "CLICKSERVE_ARTIFACTS_DIR": str(folder / "artifacts"),
            "CLICKSERVE_PORT": str(port),
            # The machine was training a moment ago and replays at full speed, and no ad waits.
            "CLICKSERVE_STORE_TIMEOUT_MS": "2000",
            "CLICKSERVE_KEEP_BEHAVIOURS_DAYS": "36500",  # a replay's clicks may be of any year
            "CLICKSERVE_TIMEOUT_MS": "10000",
        }
        for kind in ("users", "items"):
            command("service", "load-features", kind, data / "raw" / f"{kind}.parquet", **environment)
        command("service", "load-behaviours", data / "raw" / "behaviours.parquet", **environment)
        with _service(port, environment, folder / "service.log") as process:
            yield process


def command(module: str, *arguments: str | Path, **environment: str) -> None:
    """One of the project's commands, its output shown; ends this program when it fails, as it said why itself."""
    line = [sys.executable, "-m", module, *map(str, arguments)]
    if subprocess.run(line, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode != 0:
        sys.exit(f"stopped at: {' '.join(line[1:])}")


def scores(folder: Path, arm: str) -> Path:
    return folder / f"{arm}.parquet"


def check_port_is_free(port: int) -> None:
    """Before minutes of training, not after."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as err:
            sys.exit(f"port {port} is taken ({err.strerror}); stop what listens there, or choose another with --port")


@contextmanager
def _reachable(url: str) -> Iterator[str]:
    yield url


@contextmanager
def _service(port: int, environment: Mapping[str, str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    line = [sys.executable, "-m", "service", "serve", "--config", str(CONFIG)]
    with log.open("wb") as out:
        process = subprocess.Popen(line, cwd=ROOT, env={**os.environ, **environment}, stdout=out, stderr=out)
    try:
        _wait_until_ready(process, port, log)
        yield process
    finally:
        process.send_signal(signal.SIGINT)  # and not SIGTERM: no load balancer has to be told first
        process.wait(timeout=30)


def _wait_until_ready(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=1).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    said = log.read_text(errors="replace").strip().splitlines()
    sys.exit(f"the service did not become ready within {START_S} s: {said[-1] if said else 'it said nothing'}")
