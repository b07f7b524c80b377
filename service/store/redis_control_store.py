"""Control store in Redis (or Valkey): the document is one hash, a change one script, the audit trail a bounded list."""

from pathlib import Path
from typing import Any, Self

import msgspec

from service.store.control_store import MAX_AUDIT_ENTRIES, AuditEntry, ControlDocument, audit_entry
from service.store.feature_store import StoreUnavailable
from service.store.keys import KeySpace
from service.store.redis_connection import ReplyError, packed
from service.store.redis_router import RedisRouter

_REPLACE = Path(__file__).with_name("replace_control.lua").read_bytes()


class RedisControlStore:
    """The document of one experiment. Its two keys share a slot of a cluster, and nothing makes them expire."""

    def __init__(self, router: RedisRouter, *, experiment: str, prefix: str) -> None:
        self._router = router
        self._key = KeySpace(prefix).control(experiment).encode()
        self._audit_key = self._key + b":audit"

    @classmethod
    def connect(cls, url: str, *, experiment: str, timeout_s: float, prefix: str = "cs") -> Self:
        """Connects on first use. Raises SettingsError for a URL that is none."""
        return cls(
            RedisRouter(url, timeout_s=timeout_s, on_outcome=lambda _: None), experiment=experiment, prefix=prefix
        )

    async def revision(self) -> str | None:
        revision = await self._ask(b"HGET", self._key, b"revision")
        return None if revision is None else revision.decode()

    async def read(self) -> ControlDocument | None:
        content = await self._ask(b"HGET", self._key, b"document")
        return None if content is None else _decoded(content, ControlDocument)

    async def replace(self, document: ControlDocument, *, expected: ControlDocument | None) -> bool:
        arguments = [
            b"" if expected is None else expected.revision.encode(),
            document.revision.encode(),
            msgspec.json.encode(document),
            msgspec.json.encode(audit_entry(document, expected)),
            b"%d" % MAX_AUDIT_ENTRIES,
        ]
        return bool(await self._ask(b"EVAL", _REPLACE, b"2", self._key, self._audit_key, *arguments))

    async def audit(self) -> list[AuditEntry]:
        entries = await self._ask(b"LRANGE", self._audit_key, b"0", b"-1")
        return [_decoded(entry, AuditEntry) for entry in entries]

    async def aclose(self) -> None:
        await self._router.aclose()

    async def _ask(self, *command: bytes) -> Any:
        try:
            return await self._router.ask(self._key, packed(*command))
        except ReplyError as err:
            raise StoreUnavailable(f"the store refused: {err}") from err
        except OSError as err:  # TimeoutError and ConnectionError are OSErrors
            raise StoreUnavailable(f"no answer from the store: {err or type(err).__name__}") from err


def _decoded(content: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        raise StoreUnavailable(f"the store holds no {kind.__name__} that can be read: {err}") from err
