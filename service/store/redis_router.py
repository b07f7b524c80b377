"""Router of the store's commands: to one server, to the primary that Sentinels watch, or to a Cluster's by slot."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from service.store.faults import Failure, Fault, failure_of
from service.store.feature_store import StoreUnavailable
from service.store.redis_cluster import ClusterSender
from service.store.redis_connection import OnOutcome, OnReply, ReplyError, reply_or_error, set_reply
from service.store.redis_primary import PrimarySender
from service.store.redis_topology import ClusterMap, OneServer
from service.store.redis_url import RedisUrl, ServerKind

Topology = OneServer | ClusterMap
"""What is known of the servers. The routers of one URL share it: what one of them finds out, all know."""


@dataclass(frozen=True, kw_only=True)
class RouterState:
    kind: ServerKind
    addresses: tuple[str, ...]
    """The server, or the primaries; before they are known, the servers that the URL names."""
    last_failure: Failure | None
    """The latest silence, loss or refusal of any server, however long ago."""


class RedisRouter:
    """Sends packed commands, all of which must be idempotent: after a loss or a failover they are sent again.

    `on_outcome` hears what came of the commands: None for an answer, the ReplyError of a refusal (which is an answer
    too, unless it says that nothing can be read), or why there was none. Of a Cluster whose other servers answer, it
    does not hear that one of them does not. `on_failure` hears of every one.

    Raises SettingsError for a URL that is none. Connects on first use. `topology` is that of another router of the same
    URL, which closes it.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        on_outcome: OnOutcome,
        on_failure: Callable[[Failure], None] | None = None,
        topology: Topology | None = None,
    ) -> None:
        self._url = RedisUrl.parse(url)
        self._on_failure = on_failure
        self._last_failure: Failure | None = None
        self._owns_topology = topology is None
        if topology is None:
            topology = ClusterMap(self._url) if self._url.kind is ServerKind.CLUSTER else OneServer(self._url)
        elif topology.url != self._url:
            raise ValueError("a topology can be shared by routers of one URL only")
        self.topology: Topology = topology
        self._sender: PrimarySender | ClusterSender
        if isinstance(topology, ClusterMap):
            self._sender = ClusterSender(topology, timeout_s=timeout_s, on_outcome=on_outcome, on_failure=self._note)
        else:
            self._sender = PrimarySender(topology, timeout_s=timeout_s, on_outcome=on_outcome, on_failure=self._note)

    @property
    def state(self) -> RouterState:
        return RouterState(kind=self._url.kind, addresses=self._sender.addresses, last_failure=self._last_failure)

    def slot(self, key: bytes) -> int:
        """Keys of one slot may stand in one command; on one server all keys have slot 0."""
        return self._sender.slot(key)

    def send(self, key: bytes, content: bytes, on_reply: OnReply, *, timeout_s: float | None = None) -> None:
        """`on_reply` is called once from the event loop, perhaps before this returns: with the reply, or with a
        ReplyError, ConnectionError or TimeoutError in its place. Within `timeout_s` and the router's own, whichever
        is less.
        """
        self._sender.send(key, content, on_reply, timeout_s=timeout_s)

    async def ask(self, key: bytes, content: bytes, *, timeout_s: float | None = None) -> Any:
        """The reply to one command. Raises ReplyError, ConnectionError and TimeoutError."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.send(key, content, partial(set_reply, reply), timeout_s=timeout_s)
        return reply_or_error(await reply)

    async def probe(self, key: bytes) -> None:
        """A read as predictions make, of a key that need not exist. Raises where no server answers it."""
        await self._sender.probe(key)

    async def check(self) -> None:
        """Is what answers what the URL says it is? Raises SettingsError if not, StoreUnavailable if nothing answers."""
        try:
            await self.topology.check()
        except (ReplyError, OSError) as err:  # TimeoutError and ConnectionError are OSErrors
            self._note(err)
            raise StoreUnavailable(f"no answer from the store: {err or type(err).__name__}") from err

    async def aclose(self) -> None:
        await self._sender.aclose()
        if self._owns_topology:
            await self.topology.aclose()

    def _note(self, error: Exception) -> None:
        failure = failure_of(error)
        if self._on_failure is not None:
            self._on_failure(failure)
        if failure.fault is not Fault.OTHER:  # a fault of the command, not of the server
            self._last_failure = failure
