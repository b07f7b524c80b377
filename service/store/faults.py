"""Faults of the store: why a server refuses a command or does not answer, as metrics and /readyz name it."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from service.store.redis_connection import ReplyError

OnFailure = Callable[[Exception], None]


class Fault(StrEnum):
    """The `cause` of a failure."""

    READONLY = "readonly"  # a replica, or a primary that was demoted
    MISCONF = "misconf"  # it cannot write its snapshot or its log, and so refuses writes
    OOM = "oom"
    LOADING = "loading"
    MASTERDOWN = "masterdown"  # a replica that lost its primary and may not answer without
    BUSY = "busy"  # a script has run for too long
    NOAUTH = "noauth"  # no password, or a wrong one
    NOPERM = "noperm"  # the access list forbids the command or the key
    CLUSTERDOWN = "clusterdown"  # no server of the cluster serves the slot now
    TRYAGAIN = "tryagain"  # the keys of one command lie apart while their slot migrates
    TIMEOUT = "timeout"
    CONNECTION = "connection"
    OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class Failure:
    fault: Fault
    message: str
    at: float  # unix time


# The server stands, but answers no command of a kind that predictions need.
UNAVAILABLE = frozenset(
    {Fault.LOADING, Fault.MASTERDOWN, Fault.BUSY, Fault.CLUSTERDOWN, Fault.TIMEOUT, Fault.CONNECTION}
)

_NOPERM_IN_SCRIPT = ("ACL failure in script", "The user executing the script can't")  # Valkey's and Redis 7.0's words
_BY_WORD = {
    "READONLY": Fault.READONLY,
    "MISCONF": Fault.MISCONF,
    "OOM": Fault.OOM,
    "LOADING": Fault.LOADING,
    "MASTERDOWN": Fault.MASTERDOWN,
    "BUSY": Fault.BUSY,
    "NOAUTH": Fault.NOAUTH,
    "WRONGPASS": Fault.NOAUTH,
    "NOPERM": Fault.NOPERM,
    "CLUSTERDOWN": Fault.CLUSTERDOWN,
    "TRYAGAIN": Fault.TRYAGAIN,
}


# What only writes are refused for: an answered read does not say that it is over.
OF_WRITES = frozenset({Fault.READONLY, Fault.MISCONF, Fault.OOM, Fault.NOPERM})


class FaultState:
    """The faults that stand: each from its first failure until a command that it would have failed is answered."""

    def __init__(self, on_change: Callable[[Fault, bool], None], on_failure: Callable[[Fault], None]) -> None:
        """`on_change` hears which fault stands or is over, `on_failure` of each failure."""
        self._on_change = on_change
        self._on_failure = on_failure
        self.standing: dict[Fault, Failure] = {}

    def failed(self, failure: Failure) -> None:
        self._on_failure(failure.fault)
        if failure.fault is not Fault.OTHER:
            if failure.fault not in self.standing:
                self._on_change(failure.fault, True)
            self.standing[failure.fault] = failure

    def answered(self) -> None:
        """A read was."""
        self._clear([fault for fault in self.standing if fault not in OF_WRITES])

    def written(self) -> None:
        self._clear(list(self.standing))

    def _clear(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            del self.standing[fault]
            self._on_change(fault, False)


def fault_of(error: BaseException) -> Fault:
    """By the first cause of a chain: a refused handshake, for one, is a ConnectionError because of a reply."""
    error = first_cause(error)
    if isinstance(error, ReplyError):
        text = str(error)
        if any(words in text for words in _NOPERM_IN_SCRIPT):
            return Fault.NOPERM
        return _BY_WORD.get(text.partition(" ")[0], Fault.OTHER)
    if isinstance(error, TimeoutError):
        return Fault.TIMEOUT
    return Fault.CONNECTION if isinstance(error, OSError) else Fault.OTHER


def failure_of(error: BaseException) -> Failure:
    return Failure(fault=fault_of(error), message=str(error) or type(error).__name__, at=time.time())


def is_answer(error: BaseException) -> bool:
    """Whether a server that replied this to a read is one to read from: it does not refuse all reads."""
    fault = fault_of(error)
    return isinstance(first_cause(error), ReplyError) and fault not in UNAVAILABLE | {Fault.NOAUTH, Fault.NOPERM}


def first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
