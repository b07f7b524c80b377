"""URL of the store: one server, a primary that Sentinels watch, or a Cluster; its servers, and how to speak to each.

    redis://[user:password@]host[:port][/database]          unix://[user:password@]/path/to/socket[?db=database]
    redis+sentinel://[user:password@]host[:port],.../service[/database][?sentinel_username=...&sentinel_password=...]
    redis+cluster://[user:password@]host[:port],...

With TLS they begin with rediss. Other options after the ? are redis-py's. No error repeats any part of the URL: what
is misread of it may be a part of the password.
"""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode

from redis import exceptions
from redis.asyncio.connection import Connection, parse_url

from service.settings import SettingsError


class ServerKind(StrEnum):
    STANDALONE = "standalone"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


_URL = re.compile(
    r"(?P<scheme>rediss?)(\+(?P<kind>sentinel|cluster))?://((?P<user>[^/?#]*)@)?(?P<hosts>[^@/?#]+)"
    r"(/(?P<path>[^?#]*))?(\?(?P<query>[^#]*))?"
)
_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^:\[\]\s]+)(:(?P<port>\d{1,5}))?")
_PORTS = {ServerKind.STANDALONE: 6379, ServerKind.SENTINEL: 26379, ServerKind.CLUSTER: 6379}


@dataclass(frozen=True, kw_only=True)
class RedisUrl:
    """A parsed URL. `servers` are those that it names: the server, the Sentinels, or some of the Cluster's."""

    kind: ServerKind
    servers: tuple[Address, ...]
    service: str  # the name of the primary among those that the Sentinels watch
    socket: str  # the path of a Unix socket, or ""
    is_tls: bool
    login: str = field(repr=False)  # "user:password@" as the URL has it, or ""
    sentinel_login: str = field(repr=False)
    database: str
    options: str = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises SettingsError."""
        try:
            url = cls._of_socket(text) if text.startswith("unix://") else cls._of_hosts(text)
            for address in url.servers or [Address("localhost", 0)]:
                parsed: dict[str, Any] = dict(parse_url(url.of(address)))
                # Else the first request would find out what a connection cannot take.
                parsed.pop("connection_class", Connection)(**parsed)
        except (ValueError, TypeError, exceptions.RedisError):
            raise SettingsError(
                "setting redis_url: expected redis://[user:password@]host[:port][/database], unix://path, "
                "redis+sentinel://host:port,host:port/service or redis+cluster://host:port,host:port (rediss... for "
                "TLS), with any of :/?#@% in a password written as %XX; got something else, which is not shown here"
            ) from None
        if url.kind is ServerKind.CLUSTER and parsed.get("db"):
            raise SettingsError("setting redis_url: a Cluster has one database, 0, and the URL names another one")
        return url

    @classmethod
    def _of_socket(cls, text: str) -> Self:
        options = parse_url(text)
        if not options.get("path"):
            raise ValueError
        return cls(
            kind=ServerKind.STANDALONE,
            servers=(),
            service="",
            socket=str(options["path"]),
            is_tls=False,
            login="",
            sentinel_login="",
            database="",
            options=text,
        )

    @classmethod
    def _of_hosts(cls, text: str) -> Self:
        match = _URL.fullmatch(text)
        if match is None:
            raise ValueError
        kind = ServerKind(match["kind"] or "standalone")
        servers = tuple(_address(host, _PORTS[kind]) for host in match["hosts"].split(","))
        names = (match["path"] or "").rstrip("/").split("/")
        service = unquote(names.pop(0)) if kind is ServerKind.SENTINEL else ""
        database = names.pop(0) if names else ""
        if (
            names
            or not re.fullmatch(r"\d*", database)
            or (kind is ServerKind.SENTINEL and not service)
            or (kind is ServerKind.STANDALONE and len(servers) > 1)
        ):
            raise ValueError
        options = dict(parse_qsl(match["query"], strict_parsing=True)) if match["query"] else {}
        user, password = (options.pop(name, "") for name in ("sentinel_username", "sentinel_password"))
        return cls(
            kind=kind,
            servers=servers,
            service=service,
            socket="",
            is_tls=match["scheme"] == "rediss",
            login=f"{match['user']}@" if match["user"] else "",
            sentinel_login=f"{quote(user, safe='')}:{quote(password, safe='')}@" if password else "",
            database=database,
            options=f"?{urlencode(options)}" if options else "",
        )

    def of(self, address: Address) -> str:
        """The URL of one server, as redis-py reads it."""
        return self.options if self.socket else self._one(self.login, address, self.database)

    def of_sentinel(self, address: Address) -> str:
        return self._one(self.sentinel_login, address, "")

    @property
    def names(self) -> tuple[str, ...]:
        """The servers as people read them."""
        return (self.socket,) if self.socket else tuple(map(str, self.servers))

    def _one(self, login: str, address: Address, database: str) -> str:
        scheme = "rediss" if self.is_tls else "redis"
        return f"{scheme}://{login}{address}/{database}{self.options}"


def connection_options(url: str) -> dict[str, Any]:
    """What a URL of one server says, by redis-py's names, without the class of its connections."""
    options: dict[str, Any] = dict(parse_url(url))
    options.pop("connection_class", None)
    return options


def _address(text: str, default_port: int) -> Address:
    match = _HOST.fullmatch(text)
    if match is None:
        raise ValueError
    return Address(match["host"].strip("[]"), int(match["port"] or default_port))
