"""Refusals as HTTP answers (RFC 9457): the one table of status codes and headers, and the refusals only HTTP knows."""

import http
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from service.errors import (
    Conflict,
    DeadlinePassed,
    FieldError,
    InvalidValue,
    NoSuchVersion,
    NotFound,
    Reason,
    Refusal,
    Unavailable,
    VersionConflict,
    shown,
)

MEDIA_TYPE = "application/problem+json"


class NotJSON(Refusal):
    reason = Reason.NOT_JSON


class BadHTTP(Refusal):
    """Bytes that are no HTTP request."""

    reason = Reason.INVALID


class BodyTooSlow(Refusal):
    reason = Reason.TOO_SLOW

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"the body did not arrive within {limit_s:g} s")


class HeadersTooSlow(Refusal):
    reason = Reason.TOO_SLOW

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"the request's headers did not arrive within {limit_s:g} s")


class HeadersTooLarge(Refusal):
    reason = Reason.TOO_LARGE

    def __init__(self, limit: int) -> None:
        super().__init__(f"the request's headers are larger than {limit} bytes")


class BodyTooLarge(Refusal):
    reason = Reason.TOO_LARGE

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is larger than {limit} bytes")


class Compressed(Refusal):
    reason = Reason.COMPRESSED

    def __init__(self, coding: str) -> None:
        super().__init__(f"the body is sent as {shown(coding)}; send it as it is, without a Content-Encoding")


class Upgrading(Refusal):
    reason = Reason.UPGRADING

    def __init__(self) -> None:
        super().__init__(
            "the connection asks to become another protocol, by which the body is lost; ask without `Upgrade`"
        )


class Unauthorized(Refusal):
    reason = Reason.UNAUTHORIZED


class NotAllowed(Refusal):
    reason = Reason.NOT_ALLOWED

    def __init__(self) -> None:
        super().__init__(
            "no admin_token is set (CLICKSERVE_ADMIN_TOKEN, or CLICKSERVE_ADMIN_TOKENS), so nothing can be changed"
        )


class InvalidTensors(Refusal):
    """Tensors that are not what the model takes."""

    reason = Reason.INVALID


class NoSuchModel(NotFound):
    """What the Open Inference Protocol calls a model, and we an arm."""

    reason = Reason.NO_SUCH_MODEL


class Internal(Refusal):
    """An error of ours, without its internals."""

    def __init__(self) -> None:
        super().__init__("an error of the service; it has been logged")


class FrameworkError(Refusal):
    """What the framework itself refuses: no such path, no such method. It brings its own status."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None) -> None:
        super().__init__(detail)
        self.status, self.headers = status, dict(headers or {})
        reasons = {404: Reason.NO_SUCH_PATH, 405: Reason.NO_SUCH_METHOD}
        self.reason = reasons.get(status, Reason.OTHER)  # type: ignore[misc] # one class for all of the framework's


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one class of refusals is answered. `closes`: what is still to come of the body would be the next request."""

    status: int
    closes: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


RULES: Mapping[type[Refusal], Rule] = {
    NotJSON: Rule(status=400),
    BadHTTP: Rule(status=400, closes=True),
    InvalidTensors: Rule(status=400),
    Upgrading: Rule(status=400, closes=True),
    Unauthorized: Rule(status=401, headers={"WWW-Authenticate": 'Bearer realm="clickserve"'}),
    NotAllowed: Rule(status=403),
    NotFound: Rule(status=404),
    BodyTooSlow: Rule(status=408, closes=True),
    HeadersTooSlow: Rule(status=408, closes=True),
    Conflict: Rule(status=409),
    VersionConflict: Rule(status=412),
    BodyTooLarge: Rule(status=413, closes=True),
    Compressed: Rule(status=415, closes=True, headers={"Accept-Encoding": "identity"}),
    InvalidValue: Rule(status=422),
    NoSuchVersion: Rule(status=422),
    HeadersTooLarge: Rule(status=431, closes=True),
    Internal: Rule(status=500),
    Unavailable: Rule(status=503),
    DeadlinePassed: Rule(status=504),
}
"""By class; a class that has no row of its own has its base's."""


def rule_of(refusal: Refusal) -> Rule:
    if isinstance(refusal, FrameworkError):
        return Rule(status=refusal.status, headers=refusal.headers)
    return next(RULES[kind] for kind in type(refusal).__mro__ if kind in RULES)


def headers_of(refusal: Refusal) -> dict[str, str]:
    """The headers that the answer has beside its type and length."""
    rule = rule_of(refusal)
    headers = dict(rule.headers)
    if isinstance(refusal, Unavailable):
        headers["Retry-After"] = str(max(math.ceil(refusal.retry_after_s), 1))
    if isinstance(refusal, Conflict) and refusal.reason is Reason.BUSY_CHANGING:
        headers["Retry-After"] = "1"
    if isinstance(refusal, VersionConflict):
        headers["ETag"] = f'"{refusal.version}"'
    if rule.closes:
        headers["Connection"] = "close"
    return headers


class _Document(msgspec.Struct, omit_defaults=True):
    """Its title is the status code's own phrase, as `about:blank` asks."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldError] = []


def body_of(refusal: Refusal) -> bytes:
    """The problem document as JSON."""
    status = rule_of(refusal).status
    errors = list(refusal.errors) if isinstance(refusal, InvalidValue) else []
    phrase = http.HTTPStatus(status).phrase
    return msgspec.json.encode(_Document("about:blank", phrase, status, refusal.detail, errors))


def response_bytes(refusal: Refusal, *, close: bool) -> bytes:
    """The answer as it goes over the connection, where no framework stands between; `close` ends it."""
    body, status = body_of(refusal), rule_of(refusal).status
    headers = {"content-type": MEDIA_TYPE, "content-length": str(len(body)), **headers_of(refusal)}
    if close:
        headers["Connection"] = "close"
    lines = "".join(f"{name.lower()}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n{lines}\r\n".encode() + body


def nested_too_deep() -> InvalidValue:
    return InvalidValue([FieldError(pointer="", expected="less nesting", got="lists or objects too deep")])
