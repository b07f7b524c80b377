"""Redis router: the one way from the store to its server."""

from collections.abc import Callable
from typing import Any

from service.store.redis_connection import MultiplexedConnection, OnReply


class RedisRouter:
    """One server."""

    def __init__(self, url: str, *, timeout_s: float, on_outcome: Callable[[bool], None]) -> None:
        self._connection = MultiplexedConnection(url, timeout_s=timeout_s, on_outcome=on_outcome)

    def send(self, key: bytes, content: bytes, on_reply: OnReply, *, timeout_s: float | None = None) -> None:  # noqa: ARG002
        self._connection.send(content, on_reply, timeout_s=timeout_s)

    async def ask(self, key: bytes, content: bytes) -> Any:  # noqa: ARG002
        return await self._connection.ask(content)

    def slot(self, key: bytes) -> int:  # noqa: ARG002
        return 0

    async def aclose(self) -> None:
        await self._connection.aclose()
