"""The way to the store's one server: its kind, its faults by cause, and how one that moved or was demoted is left."""

import asyncio
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from service.settings import SettingsError
from service.store import local_cluster, redis_primary, redis_topology
from service.store.faults import Fault
from service.store.feature_store import StoreUnavailable
from service.store.local_cluster import LocalCluster, WatchedServers
from service.store.local_server import RedisServer
from service.store.redis_connection import ReplyError, packed
from service.store.redis_router import RedisRouter
from service.store.redis_topology import OneServer
from service.store.redis_url import Address, RedisUrl
from tests.service.store.fake_server import Connection, listening, pretending
from tests.service.store.router_client import Client, opened

Eventually = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


@pytest.fixture(scope="module")
def replaceable(session_redis: RedisServer) -> Iterator[WatchedServers]:
    """For two tests, in their order: a primary in its place, and then one that is replaced."""
    with local_cluster.start_watched() as servers:
        yield servers


# --- kinds of servers ---


async def test_a_url_of_another_kind_than_the_server_is_refused_with_one_sentence(
    session_redis: RedisServer, cluster: LocalCluster, replaceable: WatchedServers
):
    sentinel, primary = replaceable.sentinels[0].port, replaceable.primary.port
    refused = {
        f"redis://127.0.0.1:{cluster.servers[0].port}": "is part of a Cluster",
        f"redis://127.0.0.1:{replaceable.replica.port}": "is a replica",
        f"redis://127.0.0.1:{sentinel}": "is a Sentinel",
        f"redis+cluster://127.0.0.1:{primary}": "a URL of a Cluster, but .* is none",
        f"redis+cluster://127.0.0.1:{sentinel}": "a URL of a Cluster, but .* is none",
        f"redis+sentinel://127.0.0.1:{primary}/name": "a URL of Sentinels, but .* are none",
        f"redis+sentinel://127.0.0.1:{sentinel}/name": "watch no primary by the URL's name",
    }

    for url, sentence in refused.items():
        async with opened(url) as client:
            with pytest.raises(SettingsError, match=rf"^setting redis_url: [^\n]*{sentence}"):
                await client.router.check()

    for url in (session_redis.url, cluster.url, replaceable.url, f"redis://127.0.0.1:{primary}"):
        async with opened(url) as client:
            await client.router.check()
            assert await client.writes() and await client.reads()


@pytest.mark.parametrize("url", ["redis://h", "redis+cluster://h,h", "redis+sentinel://h,h/name"])
async def test_a_server_that_does_not_answer_is_of_no_wrong_kind(url: str):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and nobody listens
        async with opened(url.replace("h", f"127.0.0.1:{bound.getsockname()[1]}")) as client:
            with pytest.raises(StoreUnavailable, match="no answer from the store"):
                await client.router.check()
            assert await client.fault(client.get()) is Fault.CONNECTION


@pytest.mark.parametrize(("kind", "name"), [("cluster", ""), ("sentinel", "name")])
async def test_a_server_that_replies_what_cannot_be_read_is_as_good_as_none(kind: str, name: str):
    async with listening() as server, opened(f"redis+{kind}://127.0.0.1:{server.port}/{name}") as client:
        with pytest.raises(StoreUnavailable, match="a reply that cannot be read"):
            await client.router.check()
        assert not await client.reads()


async def test_a_router_shares_what_it_knows_with_routers_of_its_url_only():
    async with opened("redis://a") as one:
        with pytest.raises(ValueError, match="one URL"):
            RedisRouter("redis://b", timeout_s=1, on_outcome=print, topology=one.router.topology)


# --- faults of one server, by cause ---


@pytest.fixture
async def client(own_redis: RedisServer) -> AsyncIterator[Client]:
    async with opened(own_redis.url) as client:
        assert await client.writes()
        yield client


@pytest.fixture
def admin(own_redis: RedisServer):
    with redis.Redis.from_url(own_redis.url) as server:
        yield server


async def test_a_full_server_and_a_read_only_one_refuse_writes_by_cause_and_are_read_on(client: Client, admin: Any):
    admin.config_set("maxmemory", "1")
    for _ in range(10):  # more than the breaker's patience with silence
        assert await client.fault(client.set()) is Fault.OOM
    assert await client.get() == b"v"
    admin.config_set("maxmemory", "0")
    admin.replicaof("127.0.0.1", "1")
    for _ in range(10):
        assert await client.fault(client.set()) is Fault.READONLY
    assert await client.get() == b"v"
    admin.replicaof("NO", "ONE")

    assert await client.writes()
    assert not client.breaker.is_open


async def test_a_breaker_closes_while_a_server_that_cannot_save_refuses_pings_and_writes(
    client: Client, admin: Any, own_redis: RedisServer, eventually: Eventually
):
    (Path(own_redis.url.removeprefix("unix://")).parent / "dump.rdb").mkdir()
    admin.config_set("save", "3600 1000000")
    admin.bgsave()

    async def has_failed_to_save() -> bool:
        return bool(admin.info("persistence")["rdb_last_bgsave_status"] == "err")

    await eventually(has_failed_to_save)
    with pytest.raises(redis.ResponseError, match="MISCONF"):
        admin.ping()
    assert await client.fault(client.set()) is Fault.MISCONF

    for _ in range(5):
        client.breaker.failed()
    assert client.breaker.is_open

    await eventually(client.closed)
    assert await client.get() == b"v"
    admin.config_set("save", "")  # or it would not end without having saved


async def test_a_missing_password_a_wrong_one_and_a_right_that_is_lacking_are_causes_of_their_own(
    client: Client, admin: Any, own_redis: RedisServer
):
    admin.acl_setuser("reader", enabled=True, passwords=["+pw"], keys=["k"], commands=["+mget", "+eval"])
    async with opened(own_redis.url.replace("unix://", "unix://reader:pw@")) as reader:
        assert await reader.get() == b"v"
        assert await reader.fault(reader.set()) is Fault.NOPERM
        assert await reader.fault(reader.get("another")) is Fault.NOPERM
        script = packed(b"EVAL", b"return redis.call('SET', KEYS[1], 'x')", b"1", b"k")
        assert await reader.fault(reader.router.ask(b"k", script)) is Fault.NOPERM
        assert not reader.breaker.is_open
        await reader.router.check()  # which needs no right
    async with opened(own_redis.url.replace("unix://", "unix://reader:wrong@")) as wrong:
        assert await wrong.fault(wrong.get()) is Fault.NOAUTH
    admin.config_set("requirepass", "pw")
    async with opened(own_redis.url) as nobody:
        assert await nobody.fault(nobody.get()) is Fault.NOAUTH
        with pytest.raises(StoreUnavailable, match="NOAUTH"):
            await nobody.router.check()


@pytest.mark.parametrize(
    ("refusal", "fault"),
    [
        (b"-LOADING Valkey is loading the dataset in memory", Fault.LOADING),
        (b"-MASTERDOWN Link with MASTER is down", Fault.MASTERDOWN),
        (b"-BUSY Valkey is busy running a script", Fault.BUSY),
    ],
)
async def test_a_server_that_refuses_reads_for_a_while_opens_the_breaker_and_closes_it_when_it_reads(
    refusal: bytes, fault: Fault, eventually: Eventually
):
    async with (
        listening(lambda connection, _: connection.reply(refusal)) as server,
        opened(f"redis://127.0.0.1:{server.port}") as client,
    ):
        for _ in range(5):
            assert not client.breaker.is_open
            assert await client.fault(client.get()) is fault
        assert client.breaker.is_open
        await server.receives(10)  # and the probes are refused too
        assert client.breaker.is_open
        server.script = lambda connection, _: connection.reply(b"*1\r\n$1\r\nv")

        await eventually(client.closed)
        assert await client.get() == b"v"


async def test_a_frozen_server_costs_five_budgets_and_is_asked_again_when_it_thaws(
    own_redis: RedisServer, eventually: Eventually
):
    async with opened(own_redis.url, timeout_s=0.05) as client:
        await eventually(client.reads)
        os.kill(own_redis.pid, signal.SIGSTOP)
        for _ in range(5):
            assert await client.fault(client.get()) is Fault.TIMEOUT
        assert client.breaker.is_open
        os.kill(own_redis.pid, signal.SIGCONT)

        await eventually(client.closed)
        assert await client.writes()


# --- a server that moved or was demoted ---


async def test_a_reconnect_resolves_the_name_again(monkeypatch: pytest.MonkeyPatch):
    loop = asyncio.get_running_loop()
    async with listening() as old, listening(host="127.0.0.2", port=old.port) as new:
        address = "127.0.0.1"

        async def resolved(host: str, port: int, **options: Any) -> Any:
            assert host == "store.test"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

        monkeypatch.setattr(loop, "getaddrinfo", resolved)
        async with opened(f"redis://store.test:{old.port}", timeout_s=5.0) as client:
            await client.set()
            address = "127.0.0.2"
            await client.set()
            assert not new.connections
            old.connections[0].transport.abort()

            await client.set()
            assert len(new.connections) == 1


async def test_a_write_that_a_replica_refuses_makes_reads_and_writes_connect_anew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(redis_topology, "LEAVE_EVERY_S", 0.0)

    def demoted(connection: Connection, command: list[bytes]) -> None:
        connection.reply(
            b"-READONLY You can't write against a read only replica." if command[0] == b"SET" else b"*1\r\n+v"
        )

    async with listening(demoted) as server:
        url = f"redis://127.0.0.1:{server.port}"
        async with opened(url) as reader, opened(url, beside=reader) as writer:
            await reader.get()
            assert await writer.fault(writer.set()) is Fault.READONLY
            assert [connection.transport.is_closing() for connection in server.connections] == [False, False]
            await reader.get()
            await writer.get()

    assert len(server.connections) == 4


async def test_a_reader_leaves_a_demoted_server_though_nobody_writes(
    client: Client, admin: Any, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
):
    for module, name in ((redis_primary, "ROLE_EVERY_S"), (redis_topology, "LEAVE_EVERY_S")):
        monkeypatch.setattr(module, name, 0.0)
    await client.get()
    before = admin.info("stats")["total_connections_received"]
    admin.replicaof("127.0.0.1", "1")

    async def has_left() -> bool:
        assert await client.get() == b"v"  # it is all there is
        return bool(admin.info("stats")["total_connections_received"] > before + 1)

    await eventually(has_left)
    failure = client.router.state.last_failure
    assert failure is not None and failure.fault is Fault.READONLY
    assert not client.breaker.is_open


async def test_a_peer_that_vanished_is_found_out_while_nothing_is_asked():
    """By the system's keepalive, which no test can wait for: it is switched on."""
    async with listening() as server, opened(f"redis://127.0.0.1:{server.port}") as client:
        await client.set()
        sender: Any = client.router._sender
        wire = sender._connection._wire
        connection = wire.transport.get_extra_info("socket")

        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15


# --- TLS ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `localhost`, signed by itself, with its key in the same file."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    made = subprocess.run(
        ["openssl", "req", *kind, *names, "-keyout", str(path.with_suffix(".key")), "-out", str(path)],
        capture_output=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr.decode()
    return path


@pytest.mark.parametrize("scheme", ["rediss", "rediss+cluster"])
async def test_over_tls_a_server_is_spoken_to_if_its_certificate_is_one_that_the_url_trusts(
    scheme: str, certificate: Path
):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    script = pretending(lambda connection, _: connection.reply(b"*1\r\n$1\r\nv"))
    async with listening(script, tls=context) as server:
        url = f"{scheme}://localhost:{server.port}"
        async with opened(f"{url}?ssl_ca_certs={certificate}", timeout_s=5.0) as client:
            assert await client.get() == b"v"
        async with opened(url) as client:
            assert await client.fault(client.get()) is Fault.CONNECTION


# --- Sentinels ---


async def test_a_primary_that_was_replaced_while_it_is_up_is_left_by_readers_and_writers(
    replaceable: WatchedServers, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
):
    for module, name in ((redis_primary, "ROLE_EVERY_S"), (redis_topology, "LOOK_EVERY_S")):
        monkeypatch.setattr(module, name, 0.05)
    url = replaceable.url
    async with opened(url, timeout_s=1.0) as reader, opened(url, timeout_s=1.0, beside=reader) as writer:
        assert await writer.writes() and await reader.get() == b"v"
        assert reader.router.state.addresses == (f"127.0.0.1:{replaceable.primary.port}",)
        replaceable.sentinels[0].kill()  # the others are asked
        replaceable.sentinels[1].ask("SENTINEL", "FAILOVER", "clickserve")

        async def both_follow() -> bool:
            now = str(time.monotonic())
            try:
                await writer.set("by", now)
                return bool(replaceable.replica.ask("GET", "by") == await reader.get("by") == now.encode())
            except (ReplyError, OSError):
                return False

        async def is_promoted() -> bool:
            return bool(replaceable.replica.ask("ROLE")[0] == b"master")

        await eventually(is_promoted)
        await eventually(both_follow)
        assert replaceable.primary.ask("ROLE")[0] == b"master"  # the Sentinels have not demoted it yet
        for client in (reader, writer):
            assert client.router.state.addresses == (f"127.0.0.1:{replaceable.replica.port}",)


async def test_a_sentinel_that_has_not_heard_of_a_failover_is_not_believed_until_all_began_anew():
    def says(place: int) -> bytes:
        parts = [b"ip", b"127.0.0.%d" % place, b"port", b"1", b"config-epoch", b"%d" % epochs[place]]
        return b"*6\r\n" + b"\r\n".join(b"$%d\r\n%b" % (len(part), part) for part in parts)

    epochs = {1: 7, 2: 8}
    async with (
        listening(lambda *_: None) as late,
        listening(lambda connection, _: connection.reply(says(2))) as early,
    ):
        server = OneServer(RedisUrl.parse(f"redis+sentinel://127.0.0.1:{late.port},127.0.0.1:{early.port}/name"))
        assert await server.find_primary() == Address("127.0.0.2", 1)
        late.script = lambda connection, _: connection.reply(says(1))
        for _ in range(20):  # whoever answers first
            assert await server.find_primary() == Address("127.0.0.2", 1)
        epochs.update({1: 1, 2: 1})
        with pytest.raises(ConnectionError, match="has not heard of the last failover"):
            await server.find_primary()

        assert str(await server.find_primary()).startswith("127.0.0.")
        await server.aclose()


async def test_a_killed_primary_is_left_for_the_one_that_the_sentinels_name(
    watched: WatchedServers, eventually: Eventually
):
    async with opened(watched.url, timeout_s=1.0) as client:
        assert await client.writes()
        await eventually(lambda: _is(lambda: watched.replica.ask("GET", "k") == b"v"))
        watched.primary.kill()
        assert await client.fault(client.get()) is Fault.CONNECTION

        await eventually(client.writes)
        assert await client.get() == b"v"
        assert client.router.state.addresses == (f"127.0.0.1:{watched.replica.port}",)


async def _is(condition: Callable[[], bool]) -> bool:
    return condition()
