"""Admin routes: what should serve and what is stored of a user, read and changed by operators who have a token."""

import hmac
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Protocol

import msgspec
from fastapi import Request, Response
from msgspec import Meta, Struct
from pydantic import SecretStr
from starlette.types import Receive, Scope

from models.artifact.folder import CURRENT
from service.errors import StoreDown
from service.experiments.assignment import Running
from service.http import openapi
from service.http.decoding import Decoder
from service.http.problems import NotAllowed, Unauthorized
from service.registry import control
from service.registry.changes import Changes, check_experiment
from service.registry.follower import ControlFollower
from service.store.control_store import ControlStore
from service.store.feature_store import FeatureStore, StoreUnavailable

log = logging.getLogger(__name__)

MAX_CLICKS = 10_000  # the most that any store keeps of a user

Percent = Annotated[float, Meta(ge=0, le=100)]


class LoadRequest(Struct, frozen=True, forbid_unknown_fields=True):
    version: str = CURRENT


class SetShares(Struct, frozen=True, forbid_unknown_fields=True):
    """An arm that is not named stays as it is; the shares that result sum to 100.

    `kill` and `unkill` name arms of either kind. A killed arm keeps its share, and answers nobody until it comes back.
    """

    shares: dict[str, Percent] = {}
    shadow: dict[str, Percent] = {}
    kill: list[str] = []
    unkill: list[str] = []


class ControlParts(Protocol):
    """What of an open service this needs."""

    @property
    def changes(self) -> Changes: ...
    @property
    def control(self) -> ControlFollower: ...
    @property
    def control_store(self) -> ControlStore: ...
    @property
    def running(self) -> Running: ...
    @property
    def store(self) -> FeatureStore: ...


class Admin:
    """`tokens` are those of operators by name; without any nobody may change anything."""

    def __init__(
        self,
        tokens: Mapping[str, SecretStr],
        *,
        parts: Callable[[], ControlParts],
        body: Callable[[Scope, Receive], Awaitable[bytes]],
    ) -> None:
        self._tokens = {name: token.get_secret_value().encode() for name, token in tokens.items()}
        self._parts = parts
        self._body = body
        self._load_decoder = Decoder(LoadRequest)
        self._shares_decoder = Decoder(SetShares)

    def add_routes(self, add: Callable[..., None]) -> None:
        add("/models/{arm}/load", self.load, methods=["POST"], **openapi.LOAD)
        add("/models/{arm}/rollback", self.roll_back, methods=["POST"], **openapi.ROLLBACK)
        add("/experiments/{name}", self.experiment, **openapi.EXPERIMENT)
        add("/experiments/{name}", self.set_shares, methods=["PUT"], **openapi.SET_SHARES)
        add("/experiments/{name}/audit", self.audit, **openapi.AUDIT)
        add("/users/{user:path}", self.user, **openapi.USER)
        add("/users/{user:path}", self.delete_user, methods=["DELETE"], **openapi.DELETE_USER)

    async def load(self, request: Request, arm: str) -> Response:
        parts, name = self._allowed(request)
        sent = self._load_decoder.decode(await self._body(request.scope, request.receive) or b"{}")
        try:
            await parts.changes.load(arm, sent.version, changed_by=name, expected=_expected(request))
        except StoreUnavailable as err:
            raise StoreDown(str(err)) from err
        return _json(parts.control.describe_arm(arm), parts.control)

    async def roll_back(self, request: Request, arm: str) -> Response:
        parts, name = self._allowed(request)
        try:
            await parts.changes.roll_back(arm, changed_by=name, expected=_expected(request))
        except StoreUnavailable as err:
            raise StoreDown(str(err)) from err
        return _json(parts.control.describe_arm(arm), parts.control)

    async def experiment(self, name: str) -> Response:
        parts = self._parts()
        check_experiment(name, parts.running.now)
        return _json(parts.control.describe_experiment(), parts.control)

    async def set_shares(self, request: Request, name: str) -> Response:
        parts, changed_by = self._allowed(request)
        sent = self._shares_decoder.decode(await self._body(request.scope, request.receive))
        experiment = parts.running.now
        check_experiment(name, experiment)
        edit = control.set_shares(
            experiment, shares=sent.shares, shadow=sent.shadow, kill=sent.kill, unkill=sent.unkill
        )
        try:
            await parts.changes.set_shares(edit, changed_by=changed_by, expected=_expected(request))
        except StoreUnavailable as err:
            raise StoreDown(str(err)) from err
        return _json(parts.control.describe_experiment(), parts.control)

    async def audit(self, request: Request, name: str) -> Response:
        parts, _ = self._allowed(request)
        check_experiment(name, parts.running.now)
        try:
            return _json(await parts.control_store.audit())
        except StoreUnavailable as err:
            raise StoreDown(str(err)) from err

    async def user(self, request: Request, user: str) -> Response:
        parts, _ = self._allowed(request)
        try:
            fetched = await parts.store.fetch(user, [], before=math.inf, limit=MAX_CLICKS)
        except StoreUnavailable as err:
            raise StoreDown(str(err)) from err
        clicks = [
            {
                "item": click.item,
                "ts": click.ts,
                "features": click.features,
                "context": click.context,
                "item_features": click.item_features,
            }
            for click in fetched.behaviours
        ]
        return _json({"user": user, "features": fetched.user, "behaviours": clicks})

    async def delete_user(self, request: Request, user: str) -> Response:
        parts, name = self._allowed(request)
        try:
            await parts.store.delete_user(user, at=time.time())
        except StoreUnavailable as err:
            raise StoreDown(str(err)) from err
        log.warning("a user was deleted", extra={"changed_by": name})
        return Response(status_code=204)

    def _allowed(self, request: Request) -> tuple[ControlParts, str]:
        """The open service, and the name of whoever asks. Before the body is read.

        Raises Refusal: 403 where nobody may, 401 without a token.
        """
        if not self._tokens:
            raise NotAllowed
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthorized("send an admin token as `Authorization: Bearer ...`")
        token = sent.strip().encode()
        # All of them are compared, so that the time it takes tells nothing.
        names = [name for name, known in self._tokens.items() if hmac.compare_digest(token, known)]
        if not names:
            raise Unauthorized("that is not an admin token")
        return self._parts(), names[0]


def _expected(request: Request) -> frozenset[int] | None:
    """The versions that If-Match names; None where the header is absent, or is `*`. A weak tag never matches."""
    header = request.headers.get("if-match")
    if header is None or header.strip() == "*":
        return None
    tags = (tag.strip().strip('"') for tag in header.split(","))
    return frozenset(int(tag) for tag in tags if tag.isascii() and tag.isdigit())


def _json(content: Any, version_of: ControlFollower | None = None) -> Response:
    headers = {} if version_of is None else {"etag": f'"{version_of.document.version}"'}
    return Response(msgspec.json.encode(content), media_type="application/json", headers=headers)
