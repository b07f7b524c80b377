"""A keep-alive HTTP/1.1 client connection with one request in flight."""

import asyncio
from dataclasses import dataclass
from typing import Protocol, cast

import httptools
from loadtest.results import OK, PRIOR

_DEGRADED = b'"degraded":['


@dataclass(frozen=True, kw_only=True)
class Address:
    host: str
    port: int
    path: str = "/predict"

    def request(self, body: bytes) -> bytes:
        """Head and body as bytes."""
        head = f"POST {self.path} HTTP/1.1\r\nhost: {self.host}:{self.port}\r\ncontent-type: application/json\r\n"
        return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


class Owner(Protocol):
    """Callbacks of a connection: `free` when it can send, `lost` once, with the number of the request in flight."""

    def answered(self, number: int, status: int, *, degraded: bool) -> None: ...

    def free(self, connection: "Connection") -> None: ...

    def lost(self, connection: "Connection", number: int | None) -> None: ...


class Connection(asyncio.Protocol):
    """Calls `owner.free` once it is open too."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self.number: int | None = None  # of the request in flight

    @classmethod
    async def open(cls, owner: Owner, address: Address) -> None:
        """Raises OSError where nobody listens."""
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: cls(owner), address.host, address.port)

    def send(self, number: int, request: bytes) -> None:
        assert self._transport is not None
        self.number = number
        self._transport.write(request)

    def abandon(self) -> None:
        assert self._transport is not None
        self._transport.abort()
        self.connection_lost(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but its base class
        self._owner.free(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        number, self.number = self.number, None
        self._owner.lost(self, number)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abandon()

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        number, self.number = self.number, None
        if number is None:
            return
        status = self._parser.get_status_code()
        reasons = b"".join(self._parts).rpartition(_DEGRADED)[2] if status == OK else b"]"
        self._parts.clear()
        degraded = not reasons.startswith(b"]")
        if degraded and b'"deadline"' in reasons:
            status = PRIOR
        self._owner.answered(number, status, degraded=degraded)
        if self._parser.should_keep_alive():
            self._owner.free(self)
        else:
            self.abandon()
