"""Client of the store's servers: commands of those who wait equally long, behind a circuit breaker of their own."""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

from service.store.circuit_breaker import CircuitBreaker
from service.store.faults import FaultState
from service.store.feature_store import StoreUnavailable
from service.store.redis_connection import OnReply, packed_command
from service.store.redis_router import RedisRouter, Topology
from service.store.redis_url import ServerKind

BREAKER_OPEN = "the store has stopped answering and is being probed"


class RedisClient:
    """Commands by their key, each answered or failed within `timeout_s`, and at once while the breaker is open."""

    def __init__(
        self, url: str, *, timeout_s: float, probe_key: str, faults: FaultState, topology: Topology | None = None
    ) -> None:
        self._probe_key = probe_key.encode()
        self.timeout_s = timeout_s
        self._faults = faults
        self.breaker = CircuitBreaker(self._probe)
        self.router = RedisRouter(
            url, timeout_s=timeout_s, on_outcome=self._record, on_failure=faults.failed, topology=topology
        )
        self._has_slots = self.router.state.kind is ServerKind.CLUSTER

    def _record(self, error: Exception | None) -> None:
        self.breaker.record(error)
        if error is None and self._faults.standing:
            self._faults.answered()

    def slot(self, key: str) -> int:
        return self.router.slot(key.encode())

    def send(self, key: str, content: bytes, on_reply: OnReply, timeout_s: float | None) -> None:
        if self.breaker.is_open:
            on_reply(StoreUnavailable(BREAKER_OPEN))
        else:
            self.router.send(key.encode(), content, on_reply, timeout_s=timeout_s)

    def send_mget(self, keys: Sequence[str], on_values: OnReply, *, timeout_s: float | None = None) -> None:
        """The values in the order of the keys, in one command for each slot; or the first exception."""
        if not self._has_slots:
            self.send(keys[0], packed_command(b"MGET", keys), on_values, timeout_s)
            return
        by_slot: dict[int, list[int]] = defaultdict(list)
        for position, key in enumerate(keys):
            by_slot[self.slot(key)].append(position)
        values: list[Any] = [None] * len(keys)
        outstanding, failure = len(by_slot), None

        def on_some(positions: Sequence[int], reply: Any) -> None:
            nonlocal outstanding, failure
            outstanding -= 1
            if isinstance(reply, Exception):
                failure = failure or reply
            else:
                for position, value in zip(positions, reply, strict=True):
                    values[position] = value
            if not outstanding:
                on_values(values if failure is None else failure)

        for positions in by_slot.values():
            some = [keys[p] for p in positions]
            content = packed_command(b"MGET", some)
            self.send(some[0], content, partial(on_some, positions), timeout_s)

    async def mget(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        """Raises StoreUnavailable, as all that follow."""
        outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def on_values(values: Any) -> None:
            if not outcome.done():  # else the caller has gone
                outcome.set_result(values)

        self.send_mget(keys, on_values)
        values: Sequence[bytes | None] = value_of(await outcome)
        return values

    async def ask(self, key: str, content: bytes) -> Any:
        (reply,) = await self.ask_all([(key, content)])
        return reply

    async def ask_all(self, commands: Sequence[tuple[str, bytes]]) -> list[Any]:
        """The replies to commands by their key, sent in one go."""
        return [value_of(reply) for reply in await self.replies(commands)]

    async def replies(self, commands: Sequence[tuple[str, bytes]]) -> list[Any]:
        """The same, with what went wrong with one command in place of its reply."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        replies: list[Any] = [None] * len(commands)
        outstanding = len(commands)

        def on_reply(position: int, reply: Any) -> None:
            nonlocal outstanding
            replies[position] = reply
            outstanding -= 1
            if not outstanding and not done.done():
                done.set_result(None)

        for position, (key, content) in enumerate(commands):
            self.send(key, content, partial(on_reply, position), None)
        if commands:
            await done
        return replies

    async def _probe(self) -> None:
        await self.router.probe(self._probe_key)

    async def aclose(self) -> None:
        await self.breaker.aclose()
        await self.router.aclose()


def unavailable(err: Exception) -> StoreUnavailable:
    """What kept the store from answering, in a sentence: it refused, or it did not answer."""
    if isinstance(err, StoreUnavailable):
        return err
    if isinstance(err, OSError):
        return StoreUnavailable(f"no answer from the store: {type(err).__name__}: {err}")
    return StoreUnavailable(f"the store refused: {err}")


def value_of(reply: Any) -> Any:
    """Raises StoreUnavailable for an exception in place of a reply."""
    if isinstance(reply, Exception):
        raise unavailable(reply)
    return reply
