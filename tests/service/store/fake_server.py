"""A server that speaks RESP on a real port, and answers as a test wants."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import hiredis

Script = Callable[["Connection", list[bytes]], None]


class Connection(asyncio.Protocol):
    """The server's end of one connection."""

    transport: asyncio.Transport

    def __init__(self, server: "FakeServer") -> None:
        self._server = server
        self._reader = hiredis.Reader()
        self.commands: list[list[bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._server.connections.append(self)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (command := self._reader.gets()) is not False:
            self.commands.append(command)
            self._server.script(self, command)
        self._server.received.set()

    def echo(self, command: list[bytes]) -> None:
        """The argument as a server replies it, and OK to what has none or belongs to the handshake."""
        value = command[1] if command[0] == b"ECHO" else b"OK"
        self.reply(b"$%d\r\n%b" % (len(value), value))

    def reply(self, content: bytes) -> None:
        self.transport.write(content + b"\r\n")


class FakeServer:
    """Speaks RESP; `script` decides what comes of each command, by default its echo."""

    def __init__(self, script: Script = Connection.echo) -> None:
        self.script = script
        self.connections: list[Connection] = []
        self.received = asyncio.Event()
        self.port = 0

    async def receives(self, num_commands: int) -> None:
        """Returns when that many commands have come, on all connections together."""
        async with asyncio.timeout(10):
            while sum(len(connection.commands) for connection in self.connections) < num_commands:
                self.received.clear()
                await self.received.wait()


@asynccontextmanager
async def listening(
    script: Script = Connection.echo, *, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[FakeServer]:
    server = FakeServer(script)
    listener = await asyncio.get_running_loop().create_server(partial(Connection, server), host, port, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        for connection in server.connections:
            connection.transport.abort()
        listener.close()
        await listener.wait_closed()


def pretending(script: Script) -> Script:
    """The script of a server that is all of a Cluster."""

    def all_slots_first(connection: Connection, command: list[bytes]) -> None:
        if command[:2] == [b"CLUSTER", b"SLOTS"]:
            port = connection.transport.get_extra_info("sockname")[1]
            connection.reply(b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$0\r\n\r\n:%d" % port)
        else:
            script(connection, command)

    return all_slots_first
