"""Several real servers on this machine that act as one store, a Cluster or a primary with Sentinels: for tests.

They listen on loopback ports without a password, so whoever has an account here reaches them.
"""

import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import redis

from service.store.local_server import START_S, NoRedisServer, answers, running

HOST = "127.0.0.1"
NUM_PRIMARIES = 3
SERVICE = "clickserve"  # by which the Sentinels know their primary
_SLOTS = [(0, 5460), (5461, 10922), (10923, 16383)]
_NUM_SENTINELS = 3
# A failover in a second. They wait four publish periods before they make a replica that was promoted one again.
_PERIODS_MS = {"ping-period": 100, "ask-period": 100, "info-period": 200, "publish-period": 1000}
_TCP = {"bind": HOST, "appendonly": "no", "repl-diskless-sync-delay": "0"}


class LocalServer:
    """One of them: it can be killed and started again at its port, with what its folder keeps."""

    def __init__(self, stack: ExitStack, folder: Path, port: int, options: Mapping[str, str]) -> None:
        folder.mkdir()
        self.port = port
        self.pid = 0
        self._stack = stack
        self._folder = folder
        self._options = {"port": str(port), **_TCP, **options}

    def start(self, *arguments: str) -> None:
        server = running(self._folder, self._options, lambda: answers(self.port), *arguments)
        self.pid = self._stack.enter_context(server).pid

    @property
    def is_up(self) -> bool:
        return answers(self.port)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def ask(self, *command: str | int) -> Any:
        with redis.Redis(port=self.port, socket_timeout=5.0) as client:
            return client.execute_command(*command)


@dataclass(frozen=True, kw_only=True)
class LocalCluster:
    """Three primaries, then replicas of the first of them. A killed primary with a replica comes back as a replica."""

    url: str
    servers: Sequence[LocalServer]

    @property
    def primaries(self) -> list[LocalServer]:
        return [server for server in self.servers if server.ask("ROLE")[0] == b"master"]

    def mend(self) -> None:
        """Start what was killed, and return when all servers know each other and serve."""
        for server in self.servers:
            if not server.is_up:
                server.start()
        for server in self.servers:
            wait_until(partial(self._is_settled, server))

    def _is_settled(self, server: LocalServer) -> bool:
        info, role = server.ask("CLUSTER", "INFO"), server.ask("ROLE")
        return (
            b"cluster_state:ok" in info
            and b"cluster_slots_ok:16384" in info
            and b"cluster_known_nodes:%d\r" % len(self.servers) in info
            and (role[0] == b"master" or role[3] == b"connected")
        )


@contextmanager
def start_cluster(*, num_replicas: int = 1, node_timeout_ms: int = 500) -> Iterator[LocalCluster]:
    """It is up in two seconds: so long a server waits before it takes part.

    Slots whose primary is down do not keep the others from being served.
    """
    ports = _free_ports(2 * (NUM_PRIMARIES + num_replicas))
    options = {
        "cluster-enabled": "yes",
        "cluster-node-timeout": str(node_timeout_ms),
        "cluster-require-full-coverage": "no",
    }
    with TemporaryDirectory(prefix="clickserve-cluster-") as folder, ExitStack() as stack:
        servers = [
            LocalServer(stack, Path(folder) / str(port), port, {**options, "cluster-port": str(bus)})
            for port, bus in zip(ports[::2], ports[1::2], strict=True)
        ]
        for server in servers:
            server.start()
        for epoch, (server, (first, last)) in enumerate(zip(servers, _SLOTS, strict=False), 1):
            server.ask("CLUSTER", "SET-CONFIG-EPOCH", epoch)
            server.ask("CLUSTER", "ADDSLOTSRANGE", first, last)
        for port, bus in zip(ports[2::2], ports[3::2], strict=True):
            servers[0].ask("CLUSTER", "MEET", HOST, port, bus)
        primary = servers[0].ask("CLUSTER", "MYID").decode()
        for replica in servers[NUM_PRIMARIES:]:
            wait_until(partial(_knows, replica, primary))
            replica.ask("CLUSTER", "REPLICATE", primary)
        cluster = LocalCluster(
            url=f"redis+cluster://{','.join(f'{HOST}:{server.port}' for server in servers[:2])}", servers=servers
        )
        cluster.mend()
        yield cluster


@dataclass(frozen=True, kw_only=True)
class WatchedServers:
    """A primary with a replica, and the Sentinels that watch them."""

    url: str
    primary: LocalServer
    replica: LocalServer
    sentinels: Sequence[LocalServer]


@contextmanager
def start_watched() -> Iterator[WatchedServers]:
    primary_port, replica_port, *sentinel_ports = _free_ports(2 + _NUM_SENTINELS)
    with TemporaryDirectory(prefix="clickserve-watched-") as folder, ExitStack() as stack:
        primary = LocalServer(stack, Path(folder) / "primary", primary_port, {})
        replica = LocalServer(stack, Path(folder) / "replica", replica_port, {"replicaof": f"{HOST} {primary_port}"})
        sentinels = [LocalServer(stack, Path(folder) / str(port), port, {}) for port in sentinel_ports]
        for server in (primary, replica):
            server.start()
        wait_until(lambda: replica.ask("ROLE")[3] == b"connected")
        ids = [secrets.token_hex(20) for _ in sentinels]
        for place, sentinel in enumerate(sentinels):
            # What they would tell one another in some seconds they know from the start.
            lines = [
                f"sentinel myid {ids[place]}",
                f"sentinel monitor {SERVICE} {HOST} {primary_port} 2",
                f"sentinel down-after-milliseconds {SERVICE} 400",
                f"sentinel failover-timeout {SERVICE} 2000",
                f"sentinel known-replica {SERVICE} {HOST} {replica_port}",
                *(
                    f"sentinel known-sentinel {SERVICE} {HOST} {port} {ids[other]}"
                    for other, port in enumerate(sentinel_ports)
                    if other != place
                ),
            ]
            configuration = Path(folder) / f"{sentinel.port}.conf"
            configuration.write_text("\n".join(lines) + "\n")
            sentinel.start(str(configuration), "--sentinel")
            for name, period_ms in _PERIODS_MS.items():
                sentinel.ask("SENTINEL", "DEBUG", name, period_ms)
        for sentinel in sentinels:
            wait_until(partial(_has_quorum, sentinel))
        hosts = ",".join(f"{HOST}:{port}" for port in sentinel_ports)
        yield WatchedServers(
            url=f"redis+sentinel://{hosts}/{SERVICE}", primary=primary, replica=replica, sentinels=sentinels
        )


def _knows(server: LocalServer, node: str) -> bool:
    return node in str(server.ask("CLUSTER", "NODES"))


def _has_quorum(sentinel: LocalServer) -> bool:
    return "OK" in str(sentinel.ask("SENTINEL", "CKQUORUM", SERVICE))


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            if condition():
                return
        except redis.RedisError:
            pass
        if time.monotonic() > deadline:
            raise NoRedisServer("the servers came up, but did not come together")
        time.sleep(0.01)
