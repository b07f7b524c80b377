"""Commands to one server: the one that the URL names, or the primary that its Sentinels name."""

import time
from typing import Any

from service.store.faults import Fault, OnFailure, fault_of
from service.store.redis_connection import (
    HELLO,
    MultiplexedConnection,
    OnOutcome,
    OnReply,
    ReplyError,
    introduction,
    packed,
)
from service.store.redis_topology import OneServer
from service.store.redis_url import ServerKind

ROLE_EVERY_S = 1.0


class PrimarySender:
    """On one connection, which leaves a server that turned out to be a replica: it would answer reads for ever, from a
    past that stands still. While commands come, it is asked every second, and its Sentinels too.
    """

    def __init__(self, server: OneServer, *, timeout_s: float, on_outcome: OnOutcome, on_failure: OnFailure) -> None:
        self._server = server
        self._on_outcome = on_outcome
        self._on_failure = on_failure
        self._role_asked_at = time.monotonic()
        url = server.url
        self._connection = MultiplexedConnection(
            url.of(url.servers[0]) if url.servers else url.options,
            timeout_s=timeout_s,
            on_outcome=self._record,
            find_primary=server.find_primary if url.kind is ServerKind.SENTINEL else None,
        )
        server.subscribe(self._connection.leave)

    @property
    def addresses(self) -> tuple[str, ...]:
        return (self._server.name,)

    def slot(self, key: bytes) -> int:  # noqa: ARG002 - as a Cluster's
        return 0

    def send(self, key: bytes, content: bytes, on_reply: OnReply, *, timeout_s: float | None = None) -> None:  # noqa: ARG002
        now = time.monotonic()
        if now - self._role_asked_at >= ROLE_EVERY_S and self._connection.is_open:
            self._role_asked_at = now
            self._connection.send(HELLO, self._on_role)
            self._server.look_again_soon()
        self._connection.send(content, on_reply, timeout_s=timeout_s)

    async def probe(self, key: bytes) -> None:
        await self._connection.ask(packed(b"MGET", key))

    async def aclose(self) -> None:
        self._server.unsubscribe(self._connection.leave)
        await self._connection.aclose()

    def _on_role(self, reply: Any) -> None:
        if introduction(reply).get(b"role") == b"replica":
            self._on_failure(ReplyError(f"READONLY {self._server.name} is a replica"))
            self._server.leave()

    def _record(self, error: Exception | None) -> None:
        if error is not None:
            self._on_failure(error)
            if fault_of(error) is Fault.READONLY:
                self._server.leave()
        self._on_outcome(error)
