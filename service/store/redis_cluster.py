"""Commands to a Redis Cluster: each to the primary of its slot, and again where the Cluster says it has moved."""

import asyncio
import re
import time
from functools import partial
from typing import Any

import hiredis
from redis.crc import key_slot

from service.cancellation import cancel
from service.store.faults import UNAVAILABLE, Fault, OnFailure, fault_of, is_answer
from service.store.redis_connection import MultiplexedConnection, OnOutcome, OnReply, ReplyError, packed
from service.store.redis_topology import MAX_PORT, ClusterMap
from service.store.redis_url import Address

MAX_REDIRECTIONS = 5
RETRY_S = 0.005
REST_AFTER = 5  # failures in a row
REST_S = 0.25
_ASKING = packed(b"ASKING")
_SLOT_DOWN = "Hash slot not served"
_REDIRECTION = re.compile(r"(?:MOVED|ASK) \d+ (?P<host>\S*):(?P<port>\d{1,5})")
_PASSING = ("TRYAGAIN", "CLUSTERDOWN", "LOADING", "MASTERDOWN")  # worth another try while there is time


class ClusterSender:
    """One connection to each primary. All commands are idempotent: any of them may be sent more than once.

    A command is tried until its time is over. A primary that failed several times in a row rests: its commands fail at
    once, but for one now and then, so that its slots' callers do not wait in vain until a replica has taken over.
    """

    def __init__(self, cluster: ClusterMap, *, timeout_s: float, on_outcome: OnOutcome, on_failure: OnFailure) -> None:
        self._map = cluster
        self._timeout_s = timeout_s
        self._on_outcome = on_outcome
        self._on_failure = on_failure
        self._nodes: dict[Address, _Node] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(map(str, sorted(self._map.primaries or self._map.url.servers)))

    def slot(self, key: bytes) -> int:
        return key_slot(key)

    def send(self, key: bytes, content: bytes, on_reply: OnReply, *, timeout_s: float | None = None) -> None:
        wait_s = self._timeout_s if timeout_s is None else min(max(timeout_s, 0.0), self._timeout_s)
        self._try(_Command(key_slot(key), content, on_reply, time.monotonic() + wait_s))

    async def probe(self, key: bytes) -> None:
        """Returns if any primary answers: what the others' slots lack is no reason to do without these."""
        if not self._map.primaries:
            await self._map.refresh()
        nodes = [self._node(address) for address in self._map.primaries]
        replies = await asyncio.gather(
            *(node.connection.ask(packed(b"MGET", key)) for node in nodes), return_exceptions=True
        )
        errors = [reply for reply in replies if isinstance(reply, BaseException) and not is_answer(reply)]
        if len(errors) == len(replies):
            raise errors[0]

    async def aclose(self) -> None:
        self._is_closed = True
        for node in self._nodes.values():
            await node.connection.aclose()
        await cancel(*self._closing)

    def _try(self, command: "_Command") -> None:
        address = self._map.primary(command.slot)
        if address is not None:
            self._send(self._node(address), command)
            return
        self._map.refresh_soon()
        unknown = ConnectionError("no connection to the store: the Cluster has not been found yet")
        self._try_again_or_fail(command, self._map.error or command.error or unknown)

    def _send(self, node: "_Node", command: "_Command", *, is_asking: bool = False) -> None:
        now = time.monotonic()
        if node.rests(now):
            self._map.refresh_soon()
            command.on_reply(node.error)
            return
        left_s = command.expires_at - now
        if is_asking:  # the two go out together
            node.connection.send(_ASKING, _ignore, timeout_s=left_s)
        node.connection.send(command.content, partial(self._on_reply, node, command), timeout_s=left_s)

    def _on_reply(self, node: "_Node", command: "_Command", reply: Any) -> None:
        if not isinstance(reply, Exception):
            command.on_reply(reply)
            return
        word = str(reply).partition(" ")[0] if isinstance(reply, ReplyError) else ""
        if word in {"MOVED", "ASK"} and command.redirections < MAX_REDIRECTIONS:
            redirection = _REDIRECTION.fullmatch(str(reply))
            if redirection is not None and 0 < int(redirection["port"]) <= MAX_PORT:
                command.redirections += 1
                # An empty host is that of the server which redirects.
                address = Address(redirection["host"].strip("[]") or node.address.host, int(redirection["port"]))
                if word == "MOVED":
                    self._map.move(command.slot, address)
                    self._map.refresh_soon()
                self._send(self._node(address), command, is_asking=word == "ASK")
                return
        if word == "TRYAGAIN" and self._read_one_by_one(command):
            return
        fault = fault_of(reply)
        if fault in UNAVAILABLE or fault is Fault.READONLY:
            self._map.refresh_soon()
        if isinstance(reply, TimeoutError) and command.error is not None:
            reply = command.error  # its time ended during another try, and that tells less
        if word in _PASSING or isinstance(reply, ConnectionError):
            self._try_again_or_fail(command, reply)
        else:
            command.on_reply(reply)

    def _read_one_by_one(self, command: "_Command") -> bool:
        """If it is an MGET of several keys. While their slot migrates, a server answers it only if it has all of them,
        and a key that exists nowhere would keep the others from being read until the migration is over.
        """
        reader = hiredis.Reader()
        reader.feed(command.content)
        name, *keys = reader.gets()
        if name != b"MGET" or len(keys) < 2:
            return False
        values: list[Any] = [None] * len(keys)
        missing = set(range(len(keys)))

        def on_value(place: int, reply: Any) -> None:
            if not missing:  # another key has failed
                return
            if isinstance(reply, Exception):
                missing.clear()
                command.on_reply(reply)
                return
            values[place] = reply[0]
            missing.discard(place)
            if not missing:
                command.on_reply(values)

        for place, key in enumerate(keys):
            self._try(_Command(command.slot, packed(b"MGET", key), partial(on_value, place), command.expires_at))
        return True

    def _try_again_or_fail(self, command: "_Command", error: Exception) -> None:
        left_s = command.expires_at - time.monotonic()
        if left_s > 0 and not self._is_closed:
            asyncio.get_running_loop().call_later(min(RETRY_S, left_s), self._next_try, command, error)
            return
        if not self._map.primaries:
            self._on_failure(error)
            self._on_outcome(error)
        command.on_reply(error)

    def _next_try(self, command: "_Command", error: Exception) -> None:
        if self._is_closed or time.monotonic() >= command.expires_at:
            self._try_again_or_fail(command, error)
        else:
            command.redirections, command.error = 0, error
            self._try(command)

    def _node(self, address: Address) -> "_Node":
        node = self._nodes.get(address)
        if node is None:
            self._close_others()
            node = self._nodes[address] = _Node(address)
            node.connection = MultiplexedConnection(
                self._map.url.of(address), timeout_s=self._timeout_s, on_outcome=partial(self._record, node)
            )
        return node

    def _close_others(self) -> None:
        """Servers that left the Cluster, once others come in their places."""
        for address in self._nodes.keys() - self._map.primaries:
            task = asyncio.get_running_loop().create_task(self._nodes.pop(address).connection.aclose())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _record(self, node: "_Node", error: Exception | None) -> None:
        """One server's failure is the store's only where no other server answers."""
        if error is not None:
            self._on_failure(error)
        if error is not None and _SLOT_DOWN in str(error):  # which says nothing of the server's other slots
            return
        if error is not None and fault_of(error) in UNAVAILABLE:
            node.fail(error)
            others = [self._nodes.get(address) for address in self._map.primaries]
            if any(other is not None and other.error is None for other in others):
                return
        else:
            node.num_failures, node.error = 0, None
        self._on_outcome(error)


class _Command:
    __slots__ = ("content", "error", "expires_at", "on_reply", "redirections", "slot")

    def __init__(self, slot: int, content: bytes, on_reply: OnReply, expires_at: float) -> None:
        self.slot = slot
        self.content = content
        self.on_reply = on_reply
        self.expires_at = expires_at
        self.redirections = 0
        self.error: Exception | None = None  # why it is tried again


class _Node:
    """One server: its connection, and how it has failed lately."""

    connection: MultiplexedConnection

    def __init__(self, address: Address) -> None:
        self.address = address
        self.error: Exception | None = None  # None: it answers
        self.num_failures = 0
        self._rests_until = 0.0

    def fail(self, error: Exception) -> None:
        self.error = error
        self.num_failures += 1
        if self.num_failures >= REST_AFTER:
            self._rests_until = time.monotonic() + REST_S

    def rests(self, now: float) -> bool:
        """Once its rest is over, one command finds out whether it is back; the others rest on."""
        if self.num_failures < REST_AFTER:
            return False
        if now < self._rests_until:
            return True
        self._rests_until = now + REST_S
        return False


def _ignore(_: Any) -> None:
    pass
