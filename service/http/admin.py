"""The routes that change a running service, for who has the token."""

import hmac
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Protocol

import msgspec
from fastapi import Request, Response
from msgspec import Meta, Struct
from pydantic import SecretStr
from starlette.types import Receive, Scope

from models.artifact.folder import CURRENT
from service.errors import FieldError, InvalidValue, NotFound, pointer, shown
from service.experiments.assignment import MAX_SHARE, Running
from service.http import openapi
from service.http.decoding import Decoder
from service.http.problems import NotAllowed, Unauthorized
from service.registry.changes import Load, Reshare, Rollback
from service.registry.coordination import Peers
from service.registry.registry import Catalog


class LoadRequest(Struct, frozen=True, forbid_unknown_fields=True):
    version: str = CURRENT


class SharesRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """Who is not named keeps its share. To kill is to set a share of 0; it wins over the other two."""

    shares: dict[str, Annotated[float, Meta(ge=0, le=MAX_SHARE)]] = {}
    shadow: dict[str, Annotated[float, Meta(ge=0, le=100)]] = {}
    kill: list[str] = []


class Changeable(Protocol):
    """What of an open service this needs."""

    @property
    def peers(self) -> Peers: ...
    @property
    def catalog(self) -> Catalog: ...
    @property
    def running(self) -> Running: ...


class Admin:
    def __init__(
        self,
        token: SecretStr | None,
        *,
        parts: Callable[[], Changeable],
        body: Callable[[Scope, Receive], Awaitable[bytes]],
    ) -> None:
        self._token = token
        self._parts = parts
        self._body = body
        self._load_decoder = Decoder(LoadRequest)
        self._shares_decoder = Decoder(SharesRequest)

    def add_routes(self, add: Callable[..., None]) -> None:
        add("/models/{arm}/load", self.load, methods=["POST"], **openapi.LOAD)
        add("/models/{arm}/rollback", self.rollback, methods=["POST"], **openapi.ROLLBACK)
        add("/experiments/{name}", self.reshare, methods=["PUT"], **openapi.RESHARE)

    async def load(self, request: Request, arm: str) -> Response:
        parts = self._allowed(request)
        asked = self._load_decoder.decode(await self._body(request.scope, request.receive) or b"{}")
        await parts.peers.make(Load(arm=arm, version=asked.version))
        return _json(parts.catalog.describe(arm))

    async def rollback(self, request: Request, arm: str) -> Response:
        parts = self._allowed(request)
        await parts.peers.make(Rollback(arm=arm))
        return _json(parts.catalog.describe(arm))

    async def reshare(self, request: Request, name: str) -> Response:
        parts = self._allowed(request)
        asked = self._shares_decoder.decode(await self._body(request.scope, request.receive))
        now = parts.running.now
        if name != now.name:
            raise NotFound(f"there is no experiment {shown(name)}; {now.name} runs")
        shares, shadow = dict(asked.shares), dict(asked.shadow)
        arms, shadows = {arm.name for arm in now.arms}, {arm.name for arm in now.shadow}
        for position, killed in enumerate(asked.kill):
            if killed not in arms | shadows:
                known = f"one of {', '.join(sorted(arms | shadows))}"
                raise InvalidValue([FieldError(pointer=pointer("kill", position), expected=known, got=shown(killed))])
            (shares if killed in arms else shadow)[killed] = 0.0
        await parts.peers.make(Reshare(experiment=name, shares=shares, shadow=shadow))
        return _json(parts.running.now.describe())

    def _allowed(self, request: Request) -> Changeable:
        """Raises Problem: 403 where nobody may, 401 without the token. Before the body is read."""
        if self._token is None:
            raise NotAllowed()
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthorized("send the admin token as `Authorization: Bearer ...`")
        if not hmac.compare_digest(given.strip().encode(), self._token.get_secret_value().encode()):
            raise Unauthorized("that is not the admin token")
        return self._parts()


def _json(told: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(told), media_type="application/json")
