"""What a client is told when there is no answer: RFC 9457 problems, each with its status code."""

import http
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

MEDIA_TYPE = "application/problem+json"
MAX_ERRORS = 100  # of one answer: a client that sends a thousand bad candidates needs no list of them all


class FieldError(msgspec.Struct, frozen=True, kw_only=True):
    """One bad value: where (a JSON pointer, RFC 6901; "" is the whole body), what was expected, what came."""

    pointer: str
    expected: str
    got: str


class Problem(Exception):  # noqa: N818 - the name RFC 9457 gives it
    """A refusal with a reason. `reason` is its short name in metrics and logs."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        reason: str,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.reason = reason
        self.errors = errors
        self.headers = dict(headers or {})
        self.arm: str | None = None  # that the request was drawn for, once it was

    def to_json(self) -> bytes:
        document: dict[str, Any] = {
            "type": "about:blank",  # the status code says it all; its title is then the code's own phrase
            "title": http.HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
        }
        if self.errors:
            document["errors"] = self.errors
        return msgspec.json.encode(document)


@contextmanager
def of_arm(name: str) -> Iterator[None]:
    """Every refusal inside is of a request that was drawn for this arm."""
    try:
        yield
    except Problem as problem:
        problem.arm = name
        raise


def not_json(detail: str) -> Problem:
    return Problem(400, detail, reason="not_json")


def too_slow(limit_s: float) -> Problem:
    # What is still to come of the body would be read as the next request.
    detail = f"the body did not arrive within {limit_s:g} s"
    return Problem(408, detail, reason="too_slow", headers={"Connection": "close"})


def head_too_slow(limit_s: float) -> Problem:
    return Problem(408, f"the request's headers did not arrive within {limit_s:g} s", reason="too_slow")


def head_too_large(limit: int) -> Problem:
    return Problem(431, f"the request's headers are larger than {limit} bytes", reason="too_large")


def bad_http(detail: str) -> Problem:
    return Problem(400, detail, reason="invalid")


def answer_to(problem: Problem) -> bytes:
    """The whole answer as bytes, where no framework stands between; the connection ends with it."""
    body = problem.to_json()
    head = f"HTTP/1.1 {problem.status} {http.HTTPStatus(problem.status).phrase}\r\ncontent-type: {MEDIA_TYPE}\r\n"
    return f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body


def compressed(coding: str) -> Problem:
    detail = f"the body is sent as {shown(coding)}; send it as it is, without a Content-Encoding"
    return Problem(415, detail, reason="compressed", headers={"Accept-Encoding": "identity"})


def upgrading() -> Problem:
    # What is still to come of the body would be read as the next request.
    detail = "the connection asks to become another protocol, by which the body is lost; ask without `Upgrade`"
    return Problem(400, detail, reason="upgrading", headers={"Connection": "close"})


def too_large(limit: int) -> Problem:
    return Problem(413, f"the body is larger than {limit} bytes", reason="too_large")


def invalid(errors: Sequence[FieldError]) -> Problem:
    return Problem(422, sentence(errors, whole="the body"), reason="invalid", errors=errors[:MAX_ERRORS])


def too_deep() -> Problem:
    return invalid([FieldError(pointer="", expected="less nesting", got="lists or objects too deep")])


def overloaded(waiting: int) -> Problem:
    detail = f"{waiting} candidates are waiting already; try again"
    return Problem(503, detail, reason="overloaded", headers={"Retry-After": "1"})


def predicted_late(wait_s: float) -> Problem:
    detail = f"{wait_s * 1000:.1f} ms of work is waiting already: this would be scored after its deadline"
    return Problem(503, detail, reason="predicted_late", headers={"Retry-After": str(max(math.ceil(wait_s), 1))})


def shadow_dropped() -> Problem:
    return Problem(503, "live requests need the model", reason="shadow_dropped", headers={"Retry-After": "1"})


def explaining_enough(under_way: int) -> Problem:
    detail = f"{under_way} explanations are under way already; try again"
    return Problem(503, detail, reason="overloaded", headers={"Retry-After": "1"})


def not_explained(model: str, version: str) -> Problem:
    detail = (
        f"{model} {version}, which answers this user, explains nothing: the model has nothing to show,"
        " or was exported before it had"
    )
    return Problem(409, detail, reason="not_explained")


def no_such_version(detail: str) -> Problem:
    return Problem(422, detail, reason="no_such_version")


def artifact_refused(detail: str) -> Problem:
    return Problem(409, detail, reason="artifact_refused")


def busy_changing(detail: str) -> Problem:
    return Problem(409, detail, reason="busy_changing", headers={"Retry-After": "1"})


def version_mismatch(version: int) -> Problem:
    detail = f"the control document is at version {version}, which If-Match does not name; read it and decide again"
    return Problem(412, detail, reason="version_mismatch", headers={"ETag": f'"{version}"'})


def not_found(detail: str) -> Problem:
    return Problem(404, detail, reason="not_found")


def not_allowed() -> Problem:
    detail = "no admin_token is set (CLICKSERVE_ADMIN_TOKEN, or CLICKSERVE_ADMIN_TOKENS), so nothing can be changed"
    return Problem(403, detail, reason="not_allowed")


def unauthorized(detail: str) -> Problem:
    challenge = {"WWW-Authenticate": 'Bearer realm="clickserve"'}
    return Problem(401, detail, reason="unauthorized", headers=challenge)


def model_failed(detail: str) -> Problem:
    return Problem(503, detail, reason="model_failed", headers={"Retry-After": "1"})


def store_down() -> Problem:
    detail = "the store does not answer; nothing is lost by sending the same call again"
    return Problem(503, detail, reason="store_unavailable", headers={"Retry-After": "1"})


def not_open() -> Problem:
    return Problem(503, "the service is starting or stopping", reason="not_open", headers={"Retry-After": "1"})


def too_late(timeout_ms: float) -> Problem:
    return Problem(504, f"no score within {timeout_ms:g} ms", reason="deadline")


def sentence(errors: Sequence[FieldError], *, whole: str) -> str:
    """The first error in words, and how many follow. `whole` is what an empty pointer points at."""
    first = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{first.pointer or whole}: expected {first.expected}, got {first.got}{more}"


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
