"""The connection that all callers share: who gets which reply, and what happens to them when it fails."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.store import redis_connection
from service.store.redis_connection import MultiplexedConnection, ReplyError, packed_command
from tests.service.store.fake_server import Connection, FakeServer, listening


class Client:
    """The connection under test, with every outcome it reported."""

    def __init__(self, server: FakeServer, *, timeout_s: float, user: str = "", path: str = "") -> None:
        self.outcomes: list[bool] = []  # whether each command was answered
        url = f"redis://{user}127.0.0.1:{server.port}{path}"
        self.connection = MultiplexedConnection(url, timeout_s=timeout_s, on_outcome=self._record)

    def _record(self, error: Exception | None) -> None:
        self.outcomes.append(error is None or isinstance(error, ReplyError))

    async def aclose(self) -> None:
        await self.connection.aclose()

    def echo(self, text: str, *, timeout_s: float | None = None) -> "asyncio.Future[Any]":
        """The reply to ECHO, or the exception in its place, as a result. A second reply would be an error."""
        outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.connection.send(packed_command(b"ECHO", [text]), outcome.set_result, timeout_s=timeout_s)
        return outcome

    async def ask(self, text: str) -> Any:
        async with asyncio.timeout(10):
            return await self.echo(text)


Open = Callable[..., Client]


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """Makes clients of a server, which are closed with the test."""
    clients: list[Client] = []

    def client(server: FakeServer, *, timeout_s: float = 10.0, **options: str) -> Client:
        clients.append(Client(server, timeout_s=timeout_s, **options))
        return clients[-1]

    yield client
    for each in clients:
        await each.aclose()


@given(
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    losses=st.sets(st.integers(0, 30), max_size=3),
    departures=st.sets(st.integers(0, 30)),
    failures=st.sets(st.integers(0, 30)),
    turns=st.lists(st.integers(0, 3), min_size=1, max_size=10),
    num_commands=st.integers(1, 30),
)
async def test_every_caller_gets_its_own_reply_whatever_is_cut_lost_given_up_or_raised(
    cuts: list[int], losses: set[int], departures: set[int], failures: set[int], turns: list[int], num_commands: int
):
    """Replies come in pieces of any size; the connection is lost before some of them; callers depart or raise."""
    replies: dict[int, list[Any]] = {number: [] for number in range(num_commands)}
    all_replied = asyncio.Event()
    remaining_losses = set(losses)

    def script(connection: Connection, command: list[bytes]) -> None:
        number = int(command[1].split()[0])
        if number in remaining_losses:
            remaining_losses.discard(number)
            connection.transport.abort()
        if not connection.transport.is_closing():
            value = b"$%d\r\n%b\r\n" % (len(command[1]), command[1])
            for at in range(0, len(value), cuts[number % len(cuts)]):
                connection.transport.write(value[at : at + cuts[number % len(cuts)]])

    def on_reply(number: int, reply: Any) -> None:
        replies[number].append(reply)
        if all(replies.values()):
            all_replied.set()
        if number in failures:
            raise RuntimeError("a caller's error")

    async with listening(script) as server, aclosing(Client(server, timeout_s=10.0)) as client:
        for number in range(num_commands):
            command = packed_command(b"ECHO", [f"{number} " + "x" * (number % 7)])
            client.connection.send(command, partial(on_reply, number), timeout_s=0.0 if number in departures else None)
            for _ in range(turns[number % len(turns)]):
                await asyncio.sleep(0)
        async with asyncio.timeout(20):
            await all_replied.wait()

    assert all(len(each) == 1 for each in replies.values())
    for number, (reply,) in replies.items():
        assert (
            reply == f"{number} ".encode() + b"x" * (number % 7)
            or (isinstance(reply, TimeoutError) and number in departures)
            or (isinstance(reply, ConnectionError) and len(losses) > 1)  # lost twice
        )


async def test_an_error_in_one_callers_callback_is_logged_and_costs_nobody_the_connection(
    opened: Open, caplog: pytest.LogCaptureFixture
):
    def fails(_: Any) -> None:
        raise RuntimeError("a caller's error")

    async with listening() as server:
        client = opened(server)
        client.connection.send(packed_command(b"ECHO", ["x"]), fails)
        replies = [await client.ask(f"{number}") for number in range(3)]

    assert replies == [b"0", b"1", b"2"]
    assert len(server.connections) == 1
    assert [record.message for record in caplog.records] == ["unforeseen error in the callback of a reply"]


@pytest.mark.parametrize(
    ("user", "path", "handshake"),
    [
        ("", "", []),
        ("", "/0", []),
        ("", "/3", [[b"SELECT", b"3"]]),
        (":s%40crét@", "", [[b"AUTH", "s@crét".encode()]]),
        ("reader:secret@", "/1", [[b"AUTH", b"reader", b"secret"], [b"SELECT", b"1"]]),
    ],
)
async def test_a_connection_begins_with_the_password_and_the_database_that_the_url_names(
    opened: Open, user: str, path: str, handshake: list[list[bytes]]
):
    async with listening() as server:
        assert await opened(server, user=user, path=path).ask("x") == b"x"

        assert server.connections[0].commands == [*handshake, [b"ECHO", b"x"]]


async def test_a_server_that_refuses_the_handshake_has_answered_nobody(opened: Open):
    def script(connection: Connection, command: list[bytes]) -> None:
        connection.transport.write(b"-WRONGPASS invalid password\r\n")

    async with listening(script) as server:
        client = opened(server, user=":wrong@")
        reply = await client.ask("x")

    assert isinstance(reply, ConnectionError)
    assert "WRONGPASS" in str(reply)
    assert client.outcomes == [False]
    assert server.connections[0].commands == [[b"AUTH", b"wrong"]]


async def test_a_refused_command_is_a_reply_and_no_fault_of_the_connection(opened: Open):
    def script(connection: Connection, command: list[bytes]) -> None:
        connection.transport.write(b"-ERR unknown command\r\n") if command[1] == b"bad" else connection.echo(command)

    async with listening(script) as server:
        client = opened(server)
        refused = await client.ask("bad")
        with pytest.raises(ReplyError, match="unknown command"):
            await client.connection.ask(packed_command(b"ECHO", ["bad"]))

        assert isinstance(refused, ReplyError)
        assert await client.ask("good") == b"good"
    assert len(server.connections) == 1
    assert client.outcomes == [True] * 3


async def test_one_timer_watches_a_thousand_commands(opened: Open, monkeypatch: pytest.MonkeyPatch):
    async with listening() as server:
        client = opened(server)
        await client.ask("x")
        loop, timers = asyncio.get_running_loop(), []
        call_later = loop.call_later

        def counted(*args: Any) -> asyncio.TimerHandle:
            timers.append(args[0])
            return call_later(*args)

        with monkeypatch.context() as patched:
            patched.setattr(loop, "call_later", counted)
            replies = [client.echo(f"{number}") for number in range(1000)]
        assert await asyncio.gather(*replies) == [b"%d" % number for number in range(1000)]

    assert len(timers) <= 1


async def test_a_caller_with_little_time_gives_up_alone_and_its_late_reply_is_nobodys(opened: Open):
    kept: list[tuple[Connection, list[bytes]]] = []
    async with listening(lambda *command: kept.append(command)) as server:
        client = opened(server)
        first, hasty, last = client.echo("first"), client.echo("hasty", timeout_s=0.02), client.echo("last")

        assert isinstance(await hasty, TimeoutError)
        assert not first.done()
        await server.receives(3)
        for connection, command in kept:
            connection.echo(command)

        assert [await first, await last] == [b"first", b"last"]
        server.script = Connection.echo
        assert await client.ask("next") == b"next"
    assert len(server.connections) == 1
    assert False not in client.outcomes


async def test_a_silent_connection_is_replaced_and_callers_still_in_time_are_answered_on_it(opened: Open):
    kept: list[tuple[Connection, list[bytes]]] = []

    def script(connection: Connection, command: list[bytes]) -> None:
        if connection is server.connections[0] and len(connection.commands) > 1:
            kept.append((connection, command))
        else:
            connection.echo(command)

    async with listening(script) as server:
        client = opened(server, timeout_s=0.2)
        await client.ask("first")
        early = client.echo("early")
        await server.receives(2)
        loop = asyncio.get_running_loop()
        halfway = loop.create_future()
        loop.call_later(0.1, halfway.set_result, None)
        await halfway
        late = client.echo("late")
        assert isinstance(await early, TimeoutError)
        assert not late.done()

        assert await client.ask("another") == b"another"
        for connection, command in kept:
            connection.echo(command)

        assert await late == b"late"
        assert len(server.connections) == 2
    assert client.outcomes.count(False) == 1


async def test_on_a_connection_that_was_replaced_no_caller_waits_longer_than_its_time(opened: Open):
    async with listening() as server:
        client = opened(server, timeout_s=0.5)
        await client.ask("x")
        server.script = lambda *_: None
        loop = asyncio.get_running_loop()
        started = loop.time()
        first = client.echo("first")
        almost = loop.create_future()
        loop.call_later(0.45, almost.set_result, None)
        await almost
        second = client.echo("second", timeout_s=0.1)  # until 0.55, when the first has given up the connection

        assert isinstance(await first, TimeoutError)
        assert isinstance(await second, TimeoutError)
        took_s = loop.time() - started

    assert took_s < 0.9  # not until the connection is closed, one more timeout after it was given up


async def test_what_was_on_its_way_on_a_lost_connection_is_sent_once_more_in_its_order(opened: Open):
    def script(connection: Connection, command: list[bytes]) -> None:
        if connection is not server.connections[0]:
            connection.echo(command)
        elif len(connection.commands) == 3:
            connection.transport.abort()

    async with listening(script) as server:
        client = opened(server)
        replies = await asyncio.gather(*(client.echo(f"{number}") for number in range(3)))

    assert replies == [b"0", b"1", b"2"]
    assert [connection.commands for connection in server.connections] == [[[b"ECHO", b"%d" % n] for n in range(3)]] * 2
    assert False not in client.outcomes


async def test_a_command_whose_connection_is_lost_twice_fails_and_counts_as_unanswered(opened: Open):
    async with listening(lambda connection, _: connection.transport.abort()) as server:
        client = opened(server)
        reply = await client.ask("x")

        assert isinstance(reply, ConnectionError)
        assert len(server.connections) == 2
        assert client.outcomes == [False]
        server.script = Connection.echo
        assert await client.ask("y") == b"y"


async def test_a_caller_that_departed_is_not_sent_again(opened: Open):
    async with listening(lambda *_: None) as server:
        client = opened(server)
        hasty = client.echo("hasty", timeout_s=0.01)
        patient = client.echo("patient")
        assert isinstance(await hasty, TimeoutError)
        await server.receives(2)
        server.script = Connection.echo
        server.connections[0].transport.abort()

        assert await patient == b"patient"
        assert server.connections[1].commands == [[b"ECHO", b"patient"]]


async def test_the_servers_silence_begins_when_it_is_asked_not_while_it_is_connected_to(opened: Open):
    """Else a server whose handshake takes a good part of the timeout would never be connected to."""
    handshakes: list[Connection] = []

    def script(connection: Connection, command: list[bytes]) -> None:
        if command[0] == b"SELECT":
            handshakes.append(connection)

    async with listening(script) as server:
        client = opened(server, timeout_s=0.3, path="/1")
        first = client.echo("first")
        await server.receives(1)
        loop = asyncio.get_running_loop()
        loop.call_later(0.2, handshakes[0].echo, [b"SELECT"])

        assert isinstance(await first, TimeoutError)
        server.script = Connection.echo
        handshakes[0].echo(handshakes[0].commands[-1])  # late for its caller, within the timeout of being asked
        assert await client.ask("second") == b"second"

    assert len(server.connections) == 1
    assert client.outcomes == [True, True]


@pytest.mark.parametrize("rubbish", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"+OK\r\n+OK\r\n"])
async def test_what_speaks_another_protocol_or_out_of_turn_is_hung_up_on(
    opened: Open, rubbish: bytes, caplog: pytest.LogCaptureFixture
):
    async with listening(lambda connection, _: connection.transport.write(rubbish)) as server:
        client = opened(server)
        await client.ask("x")
        server.script = Connection.echo

        assert await client.ask("y") == b"y"
    assert len(server.connections) > 1
    assert "the store speaks another protocol" in [record.message for record in caplog.records]


async def test_nobody_waits_on_a_connection_that_was_closed(opened: Open):
    async with listening(lambda *_: None) as server:
        client = opened(server)
        sent = client.echo("sent")
        await server.receives(1)
        connecting = opened(server)
        unsent = connecting.echo("unsent")
        for each in (client, connecting):
            await each.aclose()

        async with asyncio.timeout(10):
            replies = [await sent, await unsent, await client.echo("after")]

    assert [str(reply) for reply in replies] == [redis_connection.CLOSED] * 3
    assert all(isinstance(reply, ConnectionError) for reply in replies)


async def test_a_port_where_nobody_listens_fails_every_caller_at_once(opened: Open, caplog: pytest.LogCaptureFixture):
    async with listening() as server:
        pass
    client = opened(server)

    with caplog.at_level(logging.WARNING):
        replies = await asyncio.gather(*(client.echo(f"{number}") for number in range(5)))

    assert all(isinstance(reply, ConnectionError) and "no connection to the store" in str(reply) for reply in replies)
    assert client.outcomes == [False]
