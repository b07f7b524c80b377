"""A client of the router as the store is one, and what its tests ask of it."""

import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from service.store.circuit_breaker import CircuitBreaker
from service.store.faults import Fault, fault_of
from service.store.redis_connection import ReplyError, packed
from service.store.redis_router import RedisRouter

BUDGET_S = 0.2


class Client:
    """A router behind a breaker, as the store has them."""

    def __init__(self, url: str, *, timeout_s: float = BUDGET_S, beside: "Client | None" = None) -> None:
        self.breaker = CircuitBreaker(self._probe, every_s=0.01)
        self.router: RedisRouter = RedisRouter(
            url,
            timeout_s=timeout_s,
            on_outcome=self.breaker.record,
            topology=beside.router.topology if beside is not None else None,
        )

    async def _probe(self) -> None:
        await self.router.probe(b"k")

    async def get(self, key: str = "k") -> Any:
        return (await self.router.ask(key.encode(), packed(b"MGET", key.encode())))[0]

    async def set(self, key: str = "k", value: str = "v") -> Any:
        return await self.router.ask(key.encode(), packed(b"SET", key.encode(), value.encode()))

    async def reads(self) -> bool:
        try:
            await self.get()
        except (ReplyError, OSError):
            return False
        return True

    async def writes(self) -> bool:
        try:
            await self.set()
        except (ReplyError, OSError):
            return False
        return True

    async def closed(self) -> bool:
        return not self.breaker.is_open

    async def fault(self, asked: Awaitable[Any]) -> Fault:
        """Why this fails, in time, as the router and the breaker tell it too."""
        started = time.monotonic()
        with pytest.raises((ReplyError, OSError)) as failed:
            await asked
        assert time.monotonic() - started < BUDGET_S + 0.5
        failure = self.router.state.last_failure
        assert failure is not None and failure.fault is fault_of(failed.value)
        assert abs(failure.at - time.time()) < 60
        return failure.fault

    async def aclose(self) -> None:
        await self.breaker.aclose()
        await self.router.aclose()


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Client]:
    async with aclosing(Client(url, **options)) as client:
        yield client
