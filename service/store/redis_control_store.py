"""Control store in Redis (or Valkey): the document is one hash, a change one script, the audit trail a bounded list."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import msgspec
from redis import exceptions
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from service.settings import SettingsError
from service.store.control_store import MAX_AUDIT_ENTRIES, AuditEntry, ControlDocument, audit_entry
from service.store.feature_store import StoreUnavailable

_REPLACE = Path(__file__).with_name("replace_control.lua").read_text(encoding="utf-8")
_CONNECTIONS = 8  # one polls, the others are for operators


class RedisControlStore:
    """The document of one experiment. Its two keys share a slot of a cluster, and nothing makes them expire."""

    def __init__(self, client: Redis, *, experiment: str) -> None:
        self._client = client
        self._key = document_key(experiment)
        self._audit_key = f"{self._key}:audit"
        self._replace = client.register_script(_REPLACE)

    @classmethod
    def connect(cls, url: str, *, experiment: str, timeout_s: float) -> Self:
        """Connects on first use; silence is not retried. Raises SettingsError for a URL that is none."""
        try:
            pool = ConnectionPool.from_url(
                url,
                max_connections=_CONNECTIONS,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 1, supported_errors=(exceptions.ConnectionError,)),
                health_check_interval=0,
            )
            pool.connection_class(**pool.connection_kwargs)  # or the first poll would find out what it cannot take
        except (ValueError, TypeError, exceptions.RedisError) as err:
            raise SettingsError(f"setting redis_url: {err}") from None
        return cls(Redis.from_pool(pool), experiment=experiment)

    async def revision(self) -> str | None:
        async with self._answering():
            revision: Any = await self._client.hget(self._key, "revision")
        return None if revision is None else revision.decode()

    async def read(self) -> ControlDocument | None:
        async with self._answering():
            packed: Any = await self._client.hget(self._key, "document")
        return None if packed is None else _decoded(packed, ControlDocument)

    async def replace(self, document: ControlDocument, *, expected: ControlDocument | None) -> bool:
        arguments: list[str | bytes | int] = [
            "" if expected is None else expected.revision,
            document.revision,
            msgspec.json.encode(document),
            msgspec.json.encode(audit_entry(document, expected)),
            MAX_AUDIT_ENTRIES,
        ]
        async with self._answering():
            return bool(await self._replace([self._key, self._audit_key], arguments))

    async def audit(self) -> list[AuditEntry]:
        async with self._answering():
            entries: Any = await self._client.lrange(self._audit_key, 0, -1)
        return [_decoded(entry, AuditEntry) for entry in entries]

    async def aclose(self) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def _answering(self) -> AsyncIterator[None]:
        try:
            yield
        except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as err:
            raise StoreUnavailable(f"no answer from the store: {type(err).__name__}: {err}") from err
        except exceptions.RedisError as err:
            if isinstance(err, exceptions.ReadOnlyError):
                # After a failover this was the primary: the address must be looked up again.
                await self._client.connection_pool.disconnect(inuse_connections=False)
            raise StoreUnavailable(f"the store refused: {type(err).__name__}: {err}") from err


def document_key(experiment: str) -> str:
    return f"cs1:control:{{{experiment}}}"


def _decoded(packed: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(packed, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        raise StoreUnavailable(f"the store holds no {kind.__name__} that can be read: {err}") from err
