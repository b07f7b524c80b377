"""Topology of the store: which server to ask, as the servers themselves know it. Shared by all routers of one URL.

One server has a name that is resolved at each connect, a watched primary has Sentinels who know where it is, and a
Cluster has a map from slots to primaries.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from service.cancellation import cancel
from service.settings import SettingsError
from service.store.faults import Fault, fault_of, first_cause
from service.store.redis_connection import HELLO, MultiplexedConnection, ReplyError, introduction, packed
from service.store.redis_url import Address, RedisUrl, ServerKind

log = logging.getLogger(__name__)

NUM_SLOTS = 16384
MAX_PORT = 65535
ASK_S = 0.8  # how long a server may take to be connected to and to say what it knows
LOOK_EVERY_S = 1.0  # at the Sentinels' primary
LEAVE_EVERY_S = 1.0  # a demoted primary is left at once, and while it is all there is, no oftener than this
REFRESH_EVERY_S = 0.1
_NUM_ASKED = 3  # of the Cluster's servers, at once: one may be frozen, and one cut off from the others
_CLUSTER_SLOTS = packed(b"CLUSTER", b"SLOTS")

T = TypeVar("T")


class OneServer:
    """A server by its name, or the primary that Sentinels watch."""

    def __init__(self, url: RedisUrl) -> None:
        self.url = url
        self._primary: Address | None = None  # where it was when the Sentinels were asked last
        self._epoch = 0  # of their configuration then: the next failover's is higher
        self._on_left: set[Callable[[], None]] = set()
        self._left_at = -LEAVE_EVERY_S
        self._sentinels: dict[Address, MultiplexedConnection] = {}
        self._looking: asyncio.Task[None] | None = None
        self._looked_at = -LOOK_EVERY_S

    @property
    def name(self) -> str:
        return str(self._primary) if self._primary is not None else ",".join(self.url.names)

    def subscribe(self, on_left: Callable[[], None]) -> None:
        """`on_left` is called when the server turns out to be no primary: connections to it should be made anew."""
        self._on_left.add(on_left)

    def unsubscribe(self, on_left: Callable[[], None]) -> None:
        self._on_left.discard(on_left)

    def leave(self) -> None:
        now = time.monotonic()
        if now - self._left_at >= LEAVE_EVERY_S:
            self._left_at = now
            log.warning("the store's server is no primary", extra={"server": self.name})
            self._tell()

    async def find_primary(self) -> Address:
        """Asks the Sentinels. If it is another one than before, the one before is left. Raises ConnectionError.

        A Sentinel that has not heard of a failover yet is not believed once another one has told of it.
        """
        command = packed(b"SENTINEL", b"MASTER", self.url.service.encode())
        for sentinel in self.url.servers:
            if sentinel not in self._sentinels:
                self._sentinels[sentinel] = _connection(self.url.of_sentinel(sentinel))
        asked = {sentinel: connection.ask(command) for sentinel, connection in self._sentinels.items()}
        try:
            primary, self._epoch = await _first(asked, self._read)
        except ConnectionError:
            self._epoch = 0  # should all be Sentinels that began anew
            raise
        before, self._primary = self._primary, primary
        if before is not None and before != primary:
            log.warning("the store's primary is another server", extra={"server": str(primary), "before": str(before)})
            self._tell()
        return primary

    def look_again_soon(self) -> None:
        """For Sentinels. They take some seconds until they demote a primary that they replaced while it was up."""
        now = time.monotonic()
        is_due = self._looking is None and now - self._looked_at >= LOOK_EVERY_S
        if self.url.kind is ServerKind.SENTINEL and is_due:
            self._looked_at = now
            self._looking = asyncio.get_running_loop().create_task(self._look_again())

    async def aclose(self) -> None:
        if self._looking is not None:
            await cancel(self._looking)
        for connection in self._sentinels.values():
            await connection.aclose()

    async def _look_again(self) -> None:
        try:
            await self.find_primary()
        except ConnectionError as err:  # without Sentinels the primary serves on
            log.debug("no Sentinel answers", extra={"error": str(err)})
        finally:
            self._looking = None

    def _read(self, reply: Any, sentinel: Address) -> tuple[Address, int]:
        said = dict(zip(reply[::2], reply[1::2], strict=True))
        epoch = int(said[b"config-epoch"])
        if epoch < self._epoch:
            raise ConnectionError(f"the Sentinel at {sentinel} has not heard of the last failover")
        return Address(said[b"ip"].decode(), int(said[b"port"])), epoch

    def _tell(self) -> None:
        for on_left in list(self._on_left):
            on_left()

    async def check(self) -> None:
        """Raises SettingsError where another kind of server answers than the URL says; else what _asked raises."""
        if self.url.kind is ServerKind.SENTINEL:
            try:
                server = self.url.of(await self.find_primary())
            except ConnectionError as err:
                cause = first_cause(err)
                if isinstance(cause, ReplyError) and "No such master" in str(cause):
                    raise SettingsError("setting redis_url: the Sentinels watch no primary by the URL's name") from None
                if isinstance(cause, ReplyError) and "unknown command" in str(cause):
                    raise SettingsError(
                        f"setting redis_url: a URL of Sentinels, but {self.name} are none; of one server it begins "
                        "with redis://, of a Cluster with redis+cluster://"
                    ) from None
                raise
        else:
            server = self.url.of(self.url.servers[0]) if self.url.servers else self.url.options
        try:
            said = introduction(await _asked(server, HELLO))
        except ReplyError as err:
            if fault_of(err) is not Fault.OTHER:
                raise
            raise SettingsError(
                f"setting redis_url: {self.name} does not know HELLO: Redis 7 or Valkey 8 or later is needed"
            ) from None
        if said.get(b"mode") == b"cluster":
            raise SettingsError(
                f"setting redis_url: {self.name} is part of a Cluster: its URL begins with redis+cluster://"
            )
        if said.get(b"mode") == b"sentinel":
            raise SettingsError(
                f"setting redis_url: {self.name} is a Sentinel: its URL is redis+sentinel://host:port,host:port/service"
            )
        if said.get(b"role") == b"replica":
            raise SettingsError(f"setting redis_url: {self.name} is a replica: the URL must name the primary")


class ClusterMap:
    """Which primary serves each slot, by what the Cluster's servers said last and what their redirections added."""

    def __init__(self, url: RedisUrl) -> None:
        self.url = url
        self.error: Exception | None = None
        """Why the last look at the Cluster failed."""
        self._slots: list[Address | None] = [None] * NUM_SLOTS
        self._primaries: set[Address] = set()
        self._servers: set[Address] = set(url.servers)
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = -REFRESH_EVERY_S

    @property
    def primaries(self) -> set[Address]:
        return self._primaries

    def primary(self, slot: int) -> Address | None:
        return self._slots[slot]

    def move(self, slot: int, address: Address) -> None:
        self._slots[slot] = address
        self._primaries.add(address)

    def refresh_soon(self) -> None:
        now = time.monotonic()
        if self._refreshing is None and now - self._refreshed_at >= REFRESH_EVERY_S:
            self._refreshed_at = now
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh())

    async def refresh(self) -> None:
        """Look at the Cluster now. Raises ConnectionError, with what a server said against it as its cause."""
        if self._refreshing is None:
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh())
        await asyncio.shield(self._refreshing)
        if self.error is not None:
            raise self.error

    async def check(self) -> None:
        """Raises SettingsError where what answers is no Cluster; ConnectionError where it does not serve every slot."""
        try:
            await self.refresh()
        except ConnectionError as err:
            said = str(first_cause(err)) if isinstance(first_cause(err), ReplyError) else ""
            if "cluster support disabled" in said or "unknown command" in said:
                raise SettingsError(
                    f"setting redis_url: a URL of a Cluster, but {','.join(self.url.names)} is none; of one server it "
                    "begins with redis://, of Sentinels with redis+sentinel://"
                ) from None
            raise
        num_unserved = self._slots.count(None)
        if num_unserved:
            raise ConnectionError(f"the Cluster serves {NUM_SLOTS - num_unserved} of its {NUM_SLOTS} slots")

    async def aclose(self) -> None:
        if self._refreshing is not None:
            await cancel(self._refreshing)

    async def _refresh(self) -> None:
        try:
            known = list(self._servers)
            random.shuffle(known)
            for first in range(0, len(known), _NUM_ASKED):
                few = known[first : first + _NUM_ASKED]
                asked = {address: _asked(self.url.of(address), _CLUSTER_SLOTS) for address in few}
                try:
                    slots, servers = await _first(asked, _slots_and_servers)
                except ConnectionError as err:
                    self.error = err
                else:
                    self._slots, self._primaries = slots, {address for address in slots if address is not None}
                    self._servers = servers | set(self.url.servers)  # should all the others be gone
                    self.error = None
                    return
        finally:
            self._refreshing = None


def _slots_and_servers(reply: Any, source: Address) -> tuple[list[Address | None], set[Address]]:
    """Of CLUSTER SLOTS: first and last slot, then the servers as (host, port, ...), the primary first."""
    slots: list[Address | None] = [None] * NUM_SLOTS
    servers: set[Address] = set()
    for first, last, *entries in reply:
        # An empty host is the one that was asked.
        addresses = [Address(entry[0].decode() if entry[0] else source.host, int(entry[1])) for entry in entries]
        if not all(0 < address.port <= MAX_PORT for address in addresses):
            raise ValueError(addresses)
        servers.update(addresses)
        slots[first : last + 1] = [addresses[0]] * (last + 1 - first)
    if not servers:
        raise ConnectionError(f"{source} knows of no slots")
    return slots, servers


async def _first(asked: Mapping[Address, Coroutine[Any, Any, Any]], read: Callable[[Any, Address], T]) -> T:
    """What the first of the servers knows, all being asked at once. Raises ConnectionError with a refusal as its cause
    if there was one: what one server says tells more than that another is silent.
    """
    tasks = {asyncio.create_task(reply): address for address, reply in asked.items()}
    pending: set[asyncio.Task[Any]] = set(tasks)
    error: ConnectionError | None = None
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                try:
                    return read(task.result(), tasks[task])
                except (ReplyError, OSError) as err:
                    if error is None or isinstance(err, ReplyError):
                        error = ConnectionError(f"{tasks[task]}: {str(err) or 'no answer in time'}")
                        error.__cause__ = err
                except (AttributeError, LookupError, TypeError, ValueError):
                    error = error or ConnectionError(f"{tasks[task]}: a reply that cannot be read")
    finally:
        if pending:
            await cancel(*pending)
    assert error is not None
    raise error


async def _asked(url: str, command: bytes) -> Any:
    """The reply on a connection made for it. Raises ReplyError, ConnectionError and TimeoutError."""
    connection = _connection(url)
    try:
        return await connection.ask(command)
    finally:
        await connection.aclose()


def _connection(url: str) -> MultiplexedConnection:
    return MultiplexedConnection(url, timeout_s=ASK_S, on_outcome=lambda _: None)
