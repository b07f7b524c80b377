"""What the service refuses, and what an answer had to do without: exceptions and reasons, free of HTTP.

Status codes, headers and media types of these stand in `service/http/problems.py`.
"""

import json
from collections.abc import Sequence
from enum import StrEnum
from typing import ClassVar

import msgspec

MAX_ERRORS = 100  # of one answer: a client that sends a thousand bad candidates needs no list of them all


class LoadError(ValueError):
    """A file that cannot be loaded into the store: what was expected, what came, where."""


class Reason(StrEnum):
    """Why a request is refused: the `reason` label of clickserve_rejected_total and of the log."""

    ARTIFACT_REFUSED = "artifact_refused"
    BUSY_CHANGING = "busy_changing"
    COMPRESSED = "compressed"
    DEADLINE = "deadline"
    INTERNAL = "internal"
    INVALID = "invalid"
    MODEL_FAILED = "model_failed"
    NO_SUCH_METHOD = "no_such_method"
    NO_SUCH_MODEL = "no_such_model"
    NO_SUCH_PATH = "no_such_path"
    NO_SUCH_VERSION = "no_such_version"
    NOT_ALLOWED = "not_allowed"
    NOT_EXPLAINED = "not_explained"
    NOT_FOUND = "not_found"
    NOT_JSON = "not_json"
    NOT_OPEN = "not_open"
    OTHER = "other"
    OTHER_EXPERIMENT = "other_experiment"
    OVERLOADED = "overloaded"
    PREDICTED_LATE = "predicted_late"
    SHADOW_DROPPED = "shadow_dropped"
    STORE_UNAVAILABLE = "store_unavailable"
    TOO_LARGE = "too_large"
    TOO_SLOW = "too_slow"
    UNAUTHORIZED = "unauthorized"
    UPGRADING = "upgrading"
    VERSION_CONFLICT = "version_conflict"


class Degraded(StrEnum):
    """What an answered request had to do without: the strings of `degraded`, and the label of the metric."""

    BEHAVIOURS_UNAVAILABLE = "behaviours_unavailable"
    ITEM_FEATURES_UNAVAILABLE = "item_features_unavailable"
    USER_FEATURES_UNAVAILABLE = "user_features_unavailable"
    ITEM_FEATURES_STALE = "item_features_stale"
    STORED_VALUES_INVALID = "stored_values_invalid"
    DEADLINE = "deadline"
    OVERLOADED = "overloaded"
    PRIOR = "prior"
    PREVIOUS_VERSION = "previous_version"


class FieldError(msgspec.Struct, frozen=True, kw_only=True):
    """One bad value: where (a JSON pointer, RFC 6901; "" is the whole body), what was expected, what came."""

    pointer: str
    expected: str
    got: str


class Refusal(Exception):  # noqa: N818 - a refused request is no error of the program
    """A request that gets no score: `reason` in short, the message in a sentence, `arm` once one was assigned."""

    reason: ClassVar[Reason] = Reason.INTERNAL

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.arm: str | None = None


class InvalidValue(Refusal):
    """Values that the client sent and that cannot be used, each with its place."""

    reason = Reason.INVALID

    def __init__(self, errors: Sequence[FieldError]) -> None:
        super().__init__(sentence(errors, body="the body"))
        self.errors = errors[:MAX_ERRORS]


class NoSuchVersion(Refusal):
    reason = Reason.NO_SUCH_VERSION


class NotFound(Refusal):
    reason = Reason.NOT_FOUND


class Conflict(Refusal):
    """What is asked for does not go with the state of the service."""

    reason = Reason.BUSY_CHANGING


class ArtifactRefused(Conflict):
    """An artifact that exists and must not serve."""

    reason = Reason.ARTIFACT_REFUSED


class NotExplained(Conflict):
    reason = Reason.NOT_EXPLAINED

    def __init__(self, model: str, version: str) -> None:
        super().__init__(
            f"{model} {version}, which answers this user, explains nothing: the model has nothing to show,"
            " or was exported before it had"
        )


class OtherExperiment(Conflict):
    """The control document is of another experiment file than this worker's."""

    reason = Reason.OTHER_EXPERIMENT

    def __init__(self, version: int) -> None:
        super().__init__(
            f"version {version} of the control document is of another experiment file than this worker's, which"
            " follows it no more"
        )


class VersionConflict(Conflict):
    """A change that was meant for another version of the control document than `version`, its present one."""

    reason = Reason.VERSION_CONFLICT

    def __init__(self, version: int) -> None:
        super().__init__(
            f"the control document is at version {version}, which If-Match does not name; read it and decide again"
        )
        self.version = version


class Unavailable(Refusal):
    """Nothing is wrong with the request: the same one may be answered in `retry_after_s` seconds."""

    def __init__(self, detail: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class Overloaded(Unavailable):
    reason = Reason.OVERLOADED


class WouldBeLate(Unavailable):
    """Refused on arrival: the work already admitted makes it miss its deadline."""

    reason = Reason.PREDICTED_LATE

    def __init__(self, wait_s: float) -> None:
        detail = f"{wait_s * 1000:.1f} ms of work is waiting already: this would be scored after its deadline"
        super().__init__(detail, retry_after_s=wait_s)


class ShadowDropped(Unavailable):
    """Shadow work that live requests leave no room for."""

    reason = Reason.SHADOW_DROPPED

    def __init__(self) -> None:
        super().__init__("live requests need the model")


class ModelFailed(Unavailable):
    reason = Reason.MODEL_FAILED


class StoreDown(Unavailable):
    reason = Reason.STORE_UNAVAILABLE

    def __init__(self, cause: str) -> None:
        super().__init__(f"{cause}; nothing is lost by sending the same call again")


class NotOpen(Unavailable):
    reason = Reason.NOT_OPEN

    def __init__(self) -> None:
        super().__init__("the service is starting or stopping")


class DeadlinePassed(Refusal):
    reason = Reason.DEADLINE

    def __init__(self, timeout_ms: float) -> None:
        super().__init__(f"no score within {timeout_ms:g} ms")


def sentence(errors: Sequence[FieldError], *, body: str) -> str:
    """The first error in words, and how many follow. `body` is what an empty pointer points at."""
    first = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{first.pointer or body}: expected {first.expected}, got {first.got}{more}"


def pointer(*parts: str | int) -> str:
    """A JSON pointer: ("candidates", 3, "a/b") is /candidates/3/a~1b. What is no Unicode in a name is escaped."""
    path = "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)
    return path.encode(errors="backslashreplace").decode()


def shown(value: object) -> str:
    """A client's value as an error shows it: short, and as JSON writes it."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return f"a list of {len(value)}"
        case dict():
            return "an object"
        case str():
            return json.dumps(value[:40]) + ("..." if len(value) > 40 else "")
        case _:
            return str(value)[:40]
