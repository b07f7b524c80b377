"""Control document: what should serve, in one versioned document; the store that holds it, and its in-memory twin."""

from collections import deque
from typing import Protocol

import msgspec

MAX_AUDIT_ENTRIES = 200  # the latest


class ControlState(msgspec.Struct, frozen=True, kw_only=True):
    """What operators decide: shares in percent, killed arms of either kind, and the model versions of every arm.

    `models` lists of each arm the version that should serve, then those before it, the latest first.
    """

    shares: dict[str, float]
    shadow: dict[str, float]
    killed: list[str]
    models: dict[str, list[str]]


class PastShares(msgspec.Struct, frozen=True, kw_only=True):
    """Shares that held until a time, in Unix seconds."""

    until: float
    shares: dict[str, float]
    killed: list[str]


class ControlDocument(msgspec.Struct, frozen=True, kw_only=True):
    """One version of the state, who made it and when.

    `fingerprint` is that of the experiment file's arms: the state means nothing for other arms. `revision` is random:
    a store that lost its latest data can be given two documents of the same version number.
    """

    version: int
    revision: str
    experiment: str
    fingerprint: str
    state: ControlState
    past: list[PastShares]
    changed_by: str
    changed_at: float


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One change: `before` is None where the store held no document."""

    version: int
    changed_by: str
    changed_at: float
    before: ControlState | None
    after: ControlState


class ControlStore(Protocol):
    """Holds the control document of one experiment. Every method may raise StoreUnavailable."""

    async def revision(self) -> str | None:
        """Of the document that `read` would return, for less work: workers poll it."""

    async def read(self) -> ControlDocument | None: ...

    async def replace(self, document: ControlDocument, *, expected: ControlDocument | None) -> bool:
        """Compare and set: False, and nothing changes, unless the store holds just the `expected` document.

        None expects that it holds none. After StoreUnavailable the document may have been written or not.
        """

    async def audit(self) -> list[AuditEntry]:
        """The latest MAX_AUDIT_ENTRIES changes, the latest first."""

    async def aclose(self) -> None: ...


class MemoryControlStore:
    """In-memory control store: for a service of one process without Redis, and for tests."""

    def __init__(self) -> None:
        self._document: ControlDocument | None = None
        self._audit: deque[AuditEntry] = deque(maxlen=MAX_AUDIT_ENTRIES)

    async def revision(self) -> str | None:
        return None if self._document is None else self._document.revision

    async def read(self) -> ControlDocument | None:
        return self._document

    async def replace(self, document: ControlDocument, *, expected: ControlDocument | None) -> bool:
        if self._document is not None and self._document.revision == document.revision:
            return True
        if (self._document and self._document.revision) != (expected and expected.revision):
            return False
        self._document = document
        self._audit.appendleft(audit_entry(document, expected))
        return True

    async def audit(self) -> list[AuditEntry]:
        return list(self._audit)

    async def aclose(self) -> None:
        return


def audit_entry(document: ControlDocument, before: ControlDocument | None) -> AuditEntry:
    return AuditEntry(
        version=document.version,
        changed_by=document.changed_by,
        changed_at=document.changed_at,
        before=None if before is None else before.state,
        after=document.state,
    )
