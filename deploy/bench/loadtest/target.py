"""The service under test, seen from outside: a probe request, its CPU time, swaps and stalls on command."""

import http.client
import json
import os
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from loadtest.connection import Address
from loadtest.errors import BenchError
from loadtest.results import OK, REFUSED
from prometheus_client.parser import text_string_to_metric_families

PATIENCE_S = 120.0  # for one answer; a swap verifies and warms a model
_TICK_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass(frozen=True, kw_only=True)
class Target:
    address: Address
    prefix: str  # of the paths, where the service stands behind one
    pid: int | None = None  # CPU time is read from /proc, with its children's; None: from /metrics

    def check(self, body: bytes) -> None:
        """Send one request of the load. Raises BenchError for an answer that is neither a score nor a refusal."""
        status, answer = self._call("POST", "/predict", body)
        if status not in (OK, *REFUSED):
            said = answer.decode(errors="replace")[:300]
            raise BenchError(f"expected answers to requests of this load, the service gave {status}: {said}")

    def cpu_s(self) -> float | None:
        """CPU seconds of all its processes so far; None where they cannot be read."""
        if self.pid is not None:
            return _cpu_of_tree(self.pid)
        status, text = self._call("GET", "/metrics")
        if status != http.HTTPStatus.OK:
            return None
        found = [
            sample.value
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
            if sample.name == "process_cpu_seconds_total"
        ]
        return sum(found) if found else None

    def swap(self, arm: str, version: str, token: str) -> None:
        """Load that version into the arm and wait until it serves. Raises BenchError with the service's reason."""
        body = json.dumps({"version": version}).encode()
        status, answer = self._call("POST", f"/models/{arm}/load", body, authorization=f"Bearer {token}")
        if status >= http.HTTPStatus.MULTIPLE_CHOICES:
            said = answer.decode(errors="replace")[:300]
            raise BenchError(f"--swap {arm}: the service gave {status}: {said}")

    def _call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.address.host, self.address.port, timeout=PATIENCE_S)
        try:
            connection.request(method, self.prefix + path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        except ValueError as err:  # a path or a token that no header can hold
            raise BenchError(f"{method} {path!r:.100} cannot be sent: {err}") from None
        except (OSError, http.client.HTTPException) as err:
            raise BenchError(f"--url: no answer from {self.address.host}:{self.address.port}: {err}") from None
        finally:
            connection.close()


def target(url: str, *, pid: int | None) -> Target:
    """Raises BenchError for what is no URL of a service."""
    try:
        parts = urlsplit(url)
        port = parts.port or 80
    except ValueError:
        parts, port = None, 0
    if parts is None or parts.scheme != "http" or not parts.hostname:
        raise BenchError(f"--url: expected http://HOST:PORT, got {url!r:.100}")
    if pid is not None and _cpu_of_tree(pid) is None:
        raise BenchError(f"--pid: no process {pid} that can be read")
    prefix = parts.path.rstrip("/")
    address = Address(host=parts.hostname, port=port, path=f"{prefix}/predict")
    return Target(address=address, prefix=prefix, pid=pid)


def stall(pid: int, seconds: float) -> None:
    """Stop a process for that long; it is continued whatever happens."""
    try:
        os.kill(pid, signal.SIGSTOP)
    except OSError as err:
        raise BenchError(f"--store-pid {pid}: {err.strerror}") from None
    try:
        time.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)


def run_command(command: str) -> None:
    """Run it to its end. Raises BenchError where it fails."""
    try:
        subprocess.run(shlex.split(command), check=True, stdout=subprocess.DEVNULL)
    except (OSError, ValueError, subprocess.CalledProcessError) as err:
        raise BenchError(f"--stall-store: {err}") from None


def _cpu_of_tree(pid: int) -> float | None:
    try:
        # The name may hold anything, even brackets; what follows its last one is numbers.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, ValueError):
        return None
    process_s = (int(fields[11]) + int(fields[12])) / _TICK_S
    return process_s + sum(_cpu_of_tree(int(child)) or 0 for child in children)
