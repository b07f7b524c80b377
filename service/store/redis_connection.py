"""Multiplexed connection to Redis: many callers share one, commands are written as they come, replies come in order.

redis-py gives each command a connection, tasks and timers of its own, which takes longer than the server does. Here a
command is a callback in a queue, and one timer watches the oldest of them.
"""

import asyncio
import logging
import math
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, cast

import hiredis
from redis.asyncio.connection import SSLConnection, parse_url

from service.cancellation import cancel

log = logging.getLogger(__name__)

# Turns of the event loop after a reply's time in which it may be found to have come: a loop that stood still runs its
# timers before it reads what came meanwhile, and that is no silence of the server's.
GRACE_TURNS = 3
CLOSED = "the connection was closed"
CONNECT_S = 1.0  # a connection takes several round trips: longer than any request waits for it

# A peer that vanished without a word is found out between two commands, in half a minute, and not by the next one.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}

OnReply = Callable[[Any], None]
"""Called once with the reply, or with the exception that stands for it: ReplyError, ConnectionError, TimeoutError."""

OnOutcome = Callable[[Exception | None], None]
"""Hears of the server: None for an answer, the ReplyError of a refusal, or why no answer came."""

FindPrimary = Callable[[], Awaitable[tuple[str, int]]]
"""The host and port of the primary, as those who watch over it know. Raises ConnectionError."""

ReplyError = hiredis.ReplyError
"""What the server refuses: a reply like any other, and no reason to doubt the connection."""


class _Command:
    __slots__ = ("content", "expires_at", "is_resent", "on_reply", "silent_at")

    def __init__(self, content: bytes, on_reply: OnReply, *, expires_at: float, silent_at: float) -> None:
        self.content = content
        self.on_reply: OnReply | None = on_reply  # None once it was called
        self.expires_at = expires_at
        self.silent_at = silent_at
        self.is_resent = False

    @property
    def check_at(self) -> float:
        """When to look at it next: its caller's time is over, or the server has been silent for too long."""
        return self.silent_at if self.on_reply is None else self.expires_at

    def resolve(self, reply: Any) -> None:
        on_reply, self.on_reply = self.on_reply, None
        if on_reply is not None:
            try:
                on_reply(reply)
            except Exception:  # an error of one caller must not end the connection of all
                log.exception("unforeseen error in the callback of a reply")


class MultiplexedConnection:
    """Connects on first use, and anew after a loss; what was on its way then is sent once more: it must be idempotent.

    Each connect resolves the host's name again, or asks `find_primary`, and then takes nothing but a primary.
    `timeout_s` is how long the server may stay silent before the connection is given up.
    """

    def __init__(
        self, url: str, *, timeout_s: float, on_outcome: OnOutcome, find_primary: FindPrimary | None = None
    ) -> None:
        self._options: dict[str, Any] = dict(parse_url(url))
        self._options.pop("connection_class", None)
        self._is_tls = url.startswith("rediss://")
        self._timeout_s = timeout_s
        self._on_outcome = on_outcome
        self._find_primary = find_primary
        self._unsent: deque[_Command] = deque()
        self._wire: _Wire | None = None
        self._retired: list[_Wire] = []  # silent for too long, with callers whose time is not over
        self._connecting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._check_at = 0.0
        self._is_closed = False

    def send(self, content: bytes, on_reply: OnReply, *, timeout_s: float | None = None) -> None:
        """Write one command. `on_reply` is called from the event loop, within `timeout_s` (default: the connection's).

        A caller that gives up leaves its command to be answered; nobody's connection is lost by that.
        """
        now = time.monotonic()
        silent_at = now + self._timeout_s
        expires_at = silent_at if timeout_s is None else min(now + max(timeout_s, 0.0), silent_at)
        command = _Command(content, on_reply, expires_at=expires_at, silent_at=silent_at)
        if self._is_closed:
            command.resolve(ConnectionError(CLOSED))
            return
        if self._wire is not None:
            self._wire.write(command)
        else:
            self._unsent.append(command)
            self._connect_soon()
        if self._timer is None or expires_at < self._check_at:
            self._check_by(expires_at, now)

    async def ask(self, content: bytes) -> Any:
        """The reply to one command. Raises ReplyError, ConnectionError and TimeoutError."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.send(content, partial(set_reply, reply))
        return reply_or_error(await reply)

    @property
    def is_open(self) -> bool:
        return self._wire is not None

    def leave(self) -> None:
        """Connect anew for the next command. Those on their way are answered where they are, if they are in time."""
        self._retire()
        self._abort_retired()

    async def aclose(self) -> None:
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._connecting is not None:
            await cancel(self._connecting)
        wires = self._retired if self._wire is None else [*self._retired, self._wire]
        self._wire, self._retired = None, []
        for wire in wires:
            wire.transport.abort()
            self._fail(wire.pending, ConnectionError(CLOSED))
        self._fail(self._unsent, ConnectionError(CLOSED))

    def _connect_soon(self) -> None:
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_S):
                wire = await self._opened()
        except (OSError, ReplyError, hiredis.HiredisError, ValueError, OverflowError) as err:  # the last: no such port
            self._connecting = None
            error = ConnectionError(f"no connection to the store: {str(err) or 'it took too long'}")
            error.__cause__ = err
            self._on_outcome(error)
            unsent, self._unsent = self._unsent, deque()
            self._fail(unsent, error)
            return
        self._connecting = None
        self._wire = wire
        wire.is_open = True
        # The server's silence begins when it is asked: what was spent on connecting is none of it.
        silent_at = time.monotonic() + self._timeout_s
        while self._unsent:
            command = self._unsent.popleft()
            if command.on_reply is not None:
                command.silent_at = silent_at
                wire.write(command)

    async def _opened(self) -> "_Wire":
        """A connection past its handshake: AUTH and SELECT, as the URL asks, and what it is connected to."""
        loop, options = asyncio.get_running_loop(), self._options
        if "path" in options:
            _, wire = await loop.create_unix_connection(partial(_Wire, self), options["path"])
        else:
            host, port = options.get("host", "localhost"), int(options.get("port", 6379))
            if self._find_primary is not None:
                host, port = await self._find_primary()
            tls = SSLConnection(**{k: v for k, v in options.items() if k.startswith("ssl_")}) if self._is_tls else None
            context = tls.ssl_context.get() if tls is not None else None
            _, wire = await loop.create_connection(partial(_Wire, self), host, port, ssl=context)
        try:
            for handshake in _handshake(options):
                await wire.ask(handshake)
            if self._find_primary is not None:
                await _expect_primary(wire)
        except BaseException:
            wire.transport.abort()
            raise
        if wire.transport.is_closing():
            raise ConnectionError("the connection was lost")
        return wire

    def on_reply(self, reply: Any) -> None:
        self._on_outcome(reply if isinstance(reply, Exception) else None)

    def on_lost(self, wire: "_Wire") -> None:
        """What was on its way on a lost connection is sent once more: a server that restarts closes it unread."""
        if wire is not self._wire:
            if wire in self._retired:
                self._retired.remove(wire)
            self._fail(wire.pending, ConnectionError("the connection was lost"))
            return
        self._wire = None
        pending, wire.pending = wire.pending, deque()
        again = deque(c for c in pending if c.on_reply is not None and not c.is_resent)
        failed = deque(c for c in pending if c.on_reply is not None and c.is_resent)
        for command in again:
            command.is_resent = True
        self._unsent.extendleft(reversed(again))
        if failed:
            error = ConnectionError("the connection was lost")
            self._on_outcome(error)
            self._fail(failed, error)
        if self._unsent:
            self._connect_soon()

    def _fail(self, commands: deque[_Command], error: Exception) -> None:
        while commands:
            commands.popleft().resolve(error)

    def _check_by(self, at: float, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._check_at = at
        self._timer = asyncio.get_running_loop().call_later(max(at - now, 0), self._check, GRACE_TURNS)

    def _check(self, turns: int) -> None:
        """Expire what has waited too long, and give up a connection that has been silent."""
        now = time.monotonic()
        due = [command for command in self._commands() if command.check_at <= now]
        if due and turns:
            self._timer = asyncio.get_running_loop().call_later(0, self._check, turns - 1)
            return
        is_silent = False
        for command in due:
            is_silent |= command.silent_at <= now
            command.resolve(TimeoutError("the store did not answer in time"))
        if is_silent:
            self._on_outcome(TimeoutError("the store did not answer in time"))
            self._unsent = deque(c for c in self._unsent if c.silent_at > now)
            self._retire()
        self._abort_retired()
        check_at = min((command.check_at for command in self._commands()), default=math.inf)
        if check_at < math.inf:
            self._check_by(check_at, now)
        else:
            self._timer = None

    def _commands(self) -> Iterator[_Command]:
        wires = self._retired if self._wire is None else [*self._retired, self._wire]
        return chain(*(wire.pending for wire in wires), self._unsent)

    def _retire(self) -> None:
        """A connection that was silent for so long may be dead: the next command gets another one.

        Those still in time keep their place on it: if it only was slow, they are answered.
        """
        wire, self._wire = self._wire, None
        if wire is not None:
            for command in wire.pending:
                command.silent_at = math.inf  # its silence has been counted
            self._retired.append(wire)

    def _abort_retired(self) -> None:
        for wire in self._retired[:]:
            if all(command.on_reply is None for command in wire.pending):
                self._retired.remove(wire)
                wire.pending.clear()
                wire.transport.abort()


class _Wire(asyncio.Protocol):
    """One open connection: the commands that were written, in the order in which their replies come."""

    transport: asyncio.Transport

    def __init__(self, owner: MultiplexedConnection) -> None:
        self.pending: deque[_Command] = deque()
        self.is_open = False  # past its handshake
        self._owner = owner
        self._reader = hiredis.Reader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's own is no subclass
        _keep_alive(transport.get_extra_info("socket"))

    def write(self, command: _Command) -> None:
        self.pending.append(command)
        self.transport.write(command.content)

    async def ask(self, content: bytes) -> Any:
        """One command of the handshake, which is bounded as a whole."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.write(_Command(content, partial(set_reply, reply), expires_at=math.inf, silent_at=math.inf))
        return reply_or_error(await reply)

    def data_received(self, data: bytes) -> None:
        reader, pending = self._reader, self.pending
        reader.feed(data)
        try:
            while (reply := reader.gets()) is not False:
                command = pending.popleft()
                if self.is_open:  # a server that refuses the handshake has answered nobody
                    self._owner.on_reply(reply)
                command.resolve(reply)
        except (hiredis.ProtocolError, IndexError) as err:  # no Redis at the other end, or one reply too many
            log.warning("the store speaks another protocol", extra={"error": str(err)})
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        self._owner.on_lost(self)


def set_reply(reply: "asyncio.Future[Any]", value: Any) -> None:
    if not reply.done():  # else the caller has gone
        reply.set_result(value)


def reply_or_error(reply: Any) -> Any:
    if isinstance(reply, Exception):
        raise reply
    return reply


def _handshake(options: dict[str, Any]) -> list[bytes]:
    commands = []
    if options.get("password"):
        user = [options["username"]] if options.get("username") else []
        commands.append(packed_command(b"AUTH", [*user, options["password"]]))
    if options.get("db"):
        commands.append(packed_command(b"SELECT", [str(options["db"])]))
    return commands


def _keep_alive(connection: Any) -> None:
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def introduction(hello: Any) -> dict[bytes, Any]:
    """A server's reply to HELLO: `mode` (standalone, sentinel or cluster), `role` (master or replica), `version`."""
    if not isinstance(hello, list):  # it speaks RESP, and is something else
        return {}
    return {name: value for name, value in zip(hello[::2], hello[1::2], strict=False) if isinstance(name, bytes)}


async def _expect_primary(wire: _Wire) -> None:
    if introduction(await wire.ask(HELLO)).get(b"role") == b"replica":
        raise ConnectionError("what the Sentinels name is a replica, not yet or no longer the primary")


def packed_command(name: bytes, arguments: Sequence[str | bytes]) -> bytes:
    """A command as it goes over the connection."""
    return packed(name, *arguments)


def packed(*parts: str | bytes) -> bytes:
    return cast("bytes", hiredis.pack_command(cast("Any", parts)))  # its stub knows no tuple of several


HELLO = packed(b"HELLO", b"2")
"""What kind of server this is, and whether it is a primary. No access list can forbid the question."""
