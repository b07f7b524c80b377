"""The store in Redis (or Valkey): one MGET a request, one script an append, no waiting beyond its timeout."""

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from redis import exceptions
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from models.features.values import Row
from service.settings import Settings, SettingsError
from service.store.circuit_breaker import Breaker
from service.store.codec import (
    NO_CLICKS,
    Click,
    behaviours_key,
    enriched,
    item_key,
    mark_key,
    order,
    pack_click,
    pack_row,
    unpack_past,
    unpack_row,
    user_key,
)
from service.store.feature_store import MARK_TTL_S, Fetched, StoreUnavailable
from service.store.redis_connection import CONNECT_S, Wire

_APPEND = Path(__file__).with_name("append.lua").read_text(encoding="utf-8")
_ROWS_A_COMMAND = 1000


def opened(settings: Settings, *, timeout_s: float) -> "RedisStore":
    """The store that the settings name. Raises SettingsError."""
    if settings.redis_url is None:
        raise SettingsError("no store: set redis_url in --config or CLICKSERVE_REDIS_URL")
    days = settings.keep_behaviours_days
    return RedisStore.connect(
        settings.redis_url, timeout_s=timeout_s, keep=settings.keep_behaviours, keep_s=days * 86_400
    )


class RedisStore:
    """A user's clicks, their features and the items' as three kinds of string values: see features.py for the layout.

    One server (a primary with replicas is one). A user's keys share a slot, but `fetch` also reads item keys, so a
    Redis Cluster would want the items elsewhere.
    """

    def __init__(self, client: Redis, *, connections: int, timeout_s: float, keep: int, keep_s: float) -> None:
        self._client = client
        self._free = asyncio.Semaphore(connections)
        self._connections = connections
        self._timeout_s = timeout_s
        self._kept = [keep, math.ceil(keep_s), MARK_TTL_S]
        self._append = client.register_script(_APPEND)
        self._breaker = Breaker(self._probe)
        pool = client.connection_pool
        unbounded = {
            **pool.connection_kwargs,
            "socket_timeout": None,
            "socket_connect_timeout": CONNECT_S,
            "health_check_interval": 0,
        }  # the wire has its own
        self._wire = Wire(lambda: pool.connection_class(**unbounded), timeout_s=timeout_s, told=self._breaker.told)

    @classmethod
    def connect(
        cls, url: str, *, timeout_s: float, connections: int = 32, keep: int = 200, keep_s: float = 30 * 86_400
    ) -> Self:
        """Connects on first use. `timeout_s` bounds the wait for a free connection, and then for each answer.

        Of a user it keeps the newest `keep` clicks, for `keep_s` seconds after the last one came.

        redis-py retries ten times by default, and so hangs for a minute on a frozen server. Here silence is not
        retried; a connection found closed is made anew once, as a server that restarts leaves a pool full of them.
        Raises SettingsError for a URL that is none.
        """
        # Not BlockingConnectionPool: a waiter cancelled just as it is woken takes the wake-up with it, and the next
        # one waits out its time beside a free connection. One connection more than callers: the breaker's probe.
        try:
            pool = ConnectionPool.from_url(
                url,
                max_connections=connections + 1,
                socket_timeout=timeout_s,
                socket_connect_timeout=max(timeout_s, 0.05),
                retry=Retry(NoBackoff(), 1, supported_errors=(exceptions.ConnectionError,)),
                health_check_interval=10,
            )
            pool.connection_class(**pool.connection_kwargs)  # or the first request would find out what it cannot take
        except (ValueError, TypeError, exceptions.RedisError) as err:
            raise SettingsError(f"setting redis_url: {err}") from None
        return cls(Redis.from_pool(pool), connections=connections, timeout_s=timeout_s, keep=keep, keep_s=keep_s)

    async def fetch(self, user: str | None, items: Sequence[str], *, before: float, limit: int) -> Fetched:
        keys = [item_key(item) for item in items]
        if user is not None:
            keys += [user_key(user), behaviours_key(user)]
        if not keys:
            return Fetched(user=None, behaviours=NO_CLICKS, items=[])
        async with self._answering(on_wire=True):
            values: Sequence[Any] = await self._wire.ask(_command(b"MGET", keys))
        profile, past = values[len(items) :] if user is not None else (None, None)
        return Fetched(
            user=unpack_row(profile),
            behaviours=unpack_past(past, before=before, limit=limit),
            items=values[: len(items)],
        )

    async def append(self, clicks: Sequence[Click]) -> list[bool]:
        if not clicks:
            return []
        first: dict[str, dict[str, int]] = defaultdict(dict)  # where each event of a user stands first
        for position, click in enumerate(clicks):
            first[click.user].setdefault(click.event_id, position)
        by_user = {user: sorted(events.values(), key=lambda p: order(clicks[p])) for user, events in first.items()}
        async with self._answering():
            items = await self._items_of(clicks)
            pipeline = self._client.pipeline(transaction=False)
            for user, positions in by_user.items():
                own = [clicks[p] for p in positions]
                keys = [behaviours_key(user), *(mark_key(user, click.event_id) for click in own)]
                records = [pack_click(enriched(click, items.get(click.item))) for click in own]
                await self._append(keys, [*self._kept, *records], client=pipeline)
            answers = await pipeline.execute()
        new = [False] * len(clicks)
        for positions, answer in zip(by_user.values(), answers, strict=True):
            for position, is_new in zip(positions, answer, strict=True):
                new[position] = bool(is_new)
        return new

    async def mark(self, events: Sequence[tuple[str, str]]) -> list[bool]:
        if not events:
            return []
        async with self._answering():
            pipeline = self._client.pipeline(transaction=False)
            for owner, event_id in events:
                pipeline.set(mark_key(owner, event_id), b"", nx=True, ex=MARK_TTL_S)
            return [bool(answer) for answer in await pipeline.execute()]

    async def put_users(self, rows: Mapping[str, Row]) -> None:
        await self._put({user_key(user): pack_row(row) for user, row in rows.items()})

    async def put_items(self, rows: Mapping[str, Row]) -> None:
        await self._put({item_key(item): pack_row(row) for item, row in rows.items()})

    async def ping(self) -> None:
        async with self._answering(on_wire=True):  # which is open then, before the first prediction comes
            await self._wire.ask(_command(b"PING", []))

    async def aclose(self) -> None:
        await self._breaker.aclose()
        await self._wire.aclose()
        await self._client.aclose()

    async def _probe(self) -> None:
        await self._client.ping()

    async def _items_of(self, clicks: Sequence[Click]) -> dict[str, Row | None]:
        items = list({click.item for click in clicks})
        values: Sequence[Any] = await self._client.mget([item_key(item) for item in items])
        return {item: unpack_row(value) for item, value in zip(items, values, strict=True)}

    async def _put(self, values: Mapping[str, bytes]) -> None:
        pairs = list(values.items())
        for first in range(0, len(pairs), _ROWS_A_COMMAND):
            async with self._answering():
                await self._client.mset(dict(pairs[first : first + _ROWS_A_COMMAND]))

    @asynccontextmanager
    async def _answering(self, *, on_wire: bool = False) -> AsyncIterator[None]:
        """Bounds the calls at once, turns whatever redis-py raises into StoreUnavailable, and tells the breaker.

        The wire has room for all, and tells it by itself, as a caller may have gone before there is anything to tell.
        Only silence counts for the breaker: a server that refuses writes (full, read-only) still answers reads.
        """
        if self._breaker.is_open:
            raise StoreUnavailable("the store has stopped answering and is being probed")
        if not on_wire:
            await self._take_connection()
        try:
            yield
        except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as err:
            if not on_wire:
                self._breaker.failed()
            raise StoreUnavailable(f"no answer from the store: {type(err).__name__}: {err}") from err
        except exceptions.RedisError as err:
            self._breaker.succeeded()
            if isinstance(err, exceptions.ReadOnlyError):
                # After a failover this was the primary: the address must be looked up again.
                await self._client.connection_pool.disconnect(inuse_connections=False)
            raise StoreUnavailable(f"the store refused: {type(err).__name__}: {err}") from err
        else:
            if not on_wire:
                self._breaker.succeeded()
        finally:
            if not on_wire:
                self._free.release()

    async def _take_connection(self) -> None:
        try:
            if self._free.locked():
                async with asyncio.timeout(self._timeout_s):
                    await self._free.acquire()
            else:
                await self._free.acquire()
        except TimeoutError:
            raise StoreUnavailable(f"all {self._connections} connections to the store are busy") from None


def _command(name: bytes, arguments: Sequence[str]) -> list[bytes]:
    """A command as it goes over the wire."""
    encoded = [name, *(argument.encode() for argument in arguments)]
    return [b"".join([b"*%d\r\n" % len(encoded), *(b"$%d\r\n%b\r\n" % (len(part), part) for part in encoded)])]
