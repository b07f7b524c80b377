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
from service.store.circuit_breaker import CircuitBreaker
from service.store.codec import (
    NO_HISTORY,
    Click,
    behaviours_key,
    enriched,
    item_key,
    mark_key,
    order,
    pack_click,
    pack_row,
    unpack_history,
    unpack_row,
    user_key,
)
from service.store.feature_store import MARK_TTL_S, FeatureStore, Fetched, OnFetched, StoreUnavailable
from service.store.redis_connection import MultiplexedConnection, ReplyError, packed_command

_APPEND = Path(__file__).with_name("append.lua").read_text(encoding="utf-8")
_ROWS_A_COMMAND = 1000
BREAKER_OPEN = "the store has stopped answering and is being probed"


def opened(settings: Settings, *, timeout_s: float) -> "RedisStore":
    """The store that the settings name. Raises SettingsError."""
    if settings.redis_url is None:
        raise SettingsError("no store: set redis_url in --config or CLICKSERVE_REDIS_URL")
    days = settings.keep_behaviours_days
    return RedisStore.connect(
        settings.redis_url, timeout_s=timeout_s, keep=settings.keep_behaviours, keep_s=days * 86_400
    )


class RedisStore(FeatureStore):
    """A user's clicks, their features and the items' as three kinds of string values: see features.py for the layout.

    One server (a primary with replicas is one). A user's keys share a slot, but `fetch` also reads item keys, so a
    Redis Cluster would want the items elsewhere.
    """

    def __init__(
        self, client: Redis, *, url: str, connections: int, timeout_s: float, keep: int, keep_s: float
    ) -> None:
        self._client = client
        self._free = asyncio.Semaphore(connections)
        self._connections = connections
        self._timeout_s = timeout_s
        self._kept = [keep, math.ceil(keep_s), MARK_TTL_S]
        self._append = client.register_script(_APPEND)
        self._breaker = CircuitBreaker(self._probe)
        self._reads = MultiplexedConnection(url, timeout_s=timeout_s, on_outcome=self._breaker.record)

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
        client = Redis.from_pool(pool)
        return cls(client, url=url, connections=connections, timeout_s=timeout_s, keep=keep, keep_s=keep_s)

    def fetch_soon(
        self,
        user: str | None,
        items: Sequence[str],
        on_fetched: OnFetched,
        *,
        before: float,
        limit: int,
        timeout_s: float | None = None,
    ) -> None:
        keys = [item_key(item) for item in items]
        if user is not None:
            keys += [user_key(user), behaviours_key(user)]
        if not keys:
            on_fetched(Fetched(user=None, behaviours=NO_HISTORY, items=[]))
            return
        if self._breaker.is_open:
            on_fetched(StoreUnavailable(BREAKER_OPEN))
            return

        def on_reply(values: Any) -> None:
            if isinstance(values, Exception):
                on_fetched(StoreUnavailable(_description(values)))
                return
            profile, past = values[len(items) :] if user is not None else (None, None)
            on_fetched(
                Fetched(
                    user=unpack_row(profile),
                    behaviours=unpack_history(past, before=before, limit=limit),
                    items=values[: len(items)],
                )
            )

        self._reads.send(packed_command(b"MGET", keys), on_reply, timeout_s=timeout_s)

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
                batch = [clicks[p] for p in positions]
                keys = [behaviours_key(user), *(mark_key(user, click.event_id) for click in batch)]
                records = [pack_click(enriched(click, items.get(click.item))) for click in batch]
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
        """On the connection of the predictions, which is open then before the first of them comes."""
        if self._breaker.is_open:
            raise StoreUnavailable(BREAKER_OPEN)
        try:
            await self._reads.ask(packed_command(b"PING", []))
        except (ReplyError, OSError) as err:  # TimeoutError and ConnectionError are OSErrors
            raise StoreUnavailable(_description(err)) from err

    async def aclose(self) -> None:
        await self._breaker.aclose()
        await self._reads.aclose()
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
    async def _answering(self) -> AsyncIterator[None]:
        """Bounds the calls at once, turns whatever redis-py raises into StoreUnavailable, and feeds the breaker.

        Only silence counts for the breaker: a server that refuses writes (full, read-only) still answers reads.
        """
        if self._breaker.is_open:
            raise StoreUnavailable(BREAKER_OPEN)
        await self._take_connection()
        try:
            yield
        except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as err:
            self._breaker.failed()
            raise StoreUnavailable(_description(err)) from err
        except exceptions.RedisError as err:
            self._breaker.succeeded()
            if isinstance(err, exceptions.ReadOnlyError):
                # After a failover this was the primary: the address must be looked up again.
                await self._client.connection_pool.disconnect(inuse_connections=False)
            raise StoreUnavailable(_description(err)) from err
        else:
            self._breaker.succeeded()
        finally:
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


def _description(err: Exception) -> str:
    """What kept the store from answering, in a sentence: it refused, or it did not answer."""
    if isinstance(err, exceptions.ConnectionError | exceptions.TimeoutError | OSError):
        return f"no answer from the store: {type(err).__name__}: {err}"
    return f"the store refused: {type(err).__name__}: {err}"
