"""Request bodies: JSON for /predict that fits the served model, drawn before a run begins."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from loadtest.arrivals import Zipf, lognormal
from loadtest.errors import BenchError

from models.features.field import Field, Group
from models.features.schema import Schema
from models.features.values import Row, SchemaError, Value

Form = Literal["list", "columnar"]

MAX_BYTES = 128 * 2**20  # of all the bodies of one generator
NUM_BODIES = 2048  # different ones, which a generator draws from


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    content: bytes
    candidates: int


@dataclass(frozen=True, kw_only=True)
class RequestMix:
    """Distribution of the requests. They carry the values of the groups `sent`; the store may have the others."""

    form: Form = "list"
    candidates: int | None = None  # of every request; None: lognormal
    median: int = 100
    cap: int = 1000
    users: int | None = None  # None: as many as the schema knows, or 10,000
    items: int | None = None
    zipf: float = 1.0
    timeout_ms: float | None = None
    schema: Schema | None = None
    sent: frozenset[Group] = frozenset({"context"})
    replayed: tuple[Body, ...] = ()

    def draw(self, num: int, draw: np.random.Generator) -> list[Body]:
        """At most `num` bodies: fewer where they would not fit into memory, or as many as there are to replay."""
        if self.replayed:
            return list(self.replayed)
        sizes = lognormal(num, draw, median=self.median, cap=self.cap)
        if self.candidates is not None:
            sizes[:] = self.candidates
        bodies: list[Body] = []
        num_bytes = 0
        for size, user in zip(sizes.tolist(), self._users.draw(num, draw).tolist(), strict=True):
            bodies.append(self._body(user, self._items.distinct(size, draw).tolist(), draw))
            num_bytes += len(bodies[-1].content)
            if num_bytes > MAX_BYTES:
                break
        return bodies

    def _body(self, user: int, items: list[int], draw: np.random.Generator) -> Body:
        sent: dict[str, Any] = {"user": {"id": self._id("user", user)}}
        if features := self._features("user", user):
            sent["user"]["features"] = features
        if context := self._row("context", draw):
            sent["context"] = context
        rows = [self._features("item", item) for item in items]
        ids = [self._id("item", item) for item in items]
        if self.form == "columnar":
            sent["candidates"] = {"id": ids, **{name: [row[name] for row in rows] for name in rows[0]}}
        else:
            sent["candidates"] = [
                {"id": i, "features": row} if row else {"id": i} for i, row in zip(ids, rows, strict=True)
            ]
        if self.timeout_ms is not None:
            sent["timeout_ms"] = self.timeout_ms
        return Body(content=json.dumps(sent, separators=(",", ":")).encode(), candidates=len(items))

    def _features(self, group: Group, rank: int) -> Row:
        """A user's or an item's values: the same whenever they come, as theirs would be."""
        row = self._rows.get((group, rank))
        if row is None:
            row = self._rows[group, rank] = self._row(group, np.random.default_rng([len(group), rank]))
        return row

    def _row(self, group: Group, draw: np.random.Generator) -> Row:
        if self.schema is None or group not in self.sent:
            return {}
        keys = (self.schema.user_key, self.schema.item_key)
        fields = [f for f in self.schema.group(group) if f.kind != "time" and f.name not in keys]
        return {field.name: _value(field, draw) for field in fields}

    def _id(self, group: Group, rank: int) -> str:
        ids = self._ids(group)
        return ids[rank] if rank < len(ids) else f"{group}-{rank}"

    def _ids(self, group: Group) -> Sequence[str]:
        if self.schema is None:
            return ()
        key = self.schema.user_key if group == "user" else self.schema.item_key
        return () if key is None else self.schema.field(key).vocabulary or ()

    @cached_property
    def _users(self) -> Zipf:
        return Zipf(self.users or len(self._ids("user")) or 10_000, self.zipf)

    @cached_property
    def _items(self) -> Zipf:
        return Zipf(self.items or len(self._ids("item")) or 10_000, self.zipf)

    @cached_property
    def _rows(self) -> dict[tuple[Group, int], Row]:
        return {}


def _value(field: Field, draw: np.random.Generator) -> Value:
    """Any value the field could hold, in the form a client sends."""
    if field.kind == "numeric":
        assert field.shift is not None and field.scale is not None
        return round(field.shift + field.scale * draw.standard_normal(), 4)
    if field.discretise is not None:
        return round(draw.lognormal(), 4)
    vocabulary = field.vocabulary or ("",)
    if field.kind == "multi":
        assert field.max_values is not None
        num = int(draw.integers(1, field.max_values + 1))
        return [vocabulary[i] for i in draw.choice(len(vocabulary), min(num, len(vocabulary)), replace=False)]
    return vocabulary[int(draw.integers(len(vocabulary)))]


def read_schema(file: Path) -> Schema:
    """An artifact's schema.json, whose vocabularies the values are drawn from."""
    try:
        return Schema.from_json(file.read_bytes())
    except OSError as err:
        raise BenchError(f"--schema {file}: {err.strerror}") from None
    except SchemaError as err:
        raise BenchError(f"--schema {file}: {err}") from None


def read_requests(file: Path, timeout_ms: float | None) -> tuple[Body, ...]:
    """A JSON body of /predict a line, to be sent as it is; a `timeout_ms` other than None replaces its own."""
    try:
        lines = [line for line in file.read_bytes().splitlines() if line.strip()]
    except OSError as err:
        raise BenchError(f"--requests {file}: {err.strerror}") from None
    if not lines:
        raise BenchError(f"--requests {file}: expected a JSON body a line, it is empty")
    return tuple(_replayed(file, number, line, timeout_ms) for number, line in enumerate(lines, start=1))


def _replayed(file: Path, number: int, line: bytes, timeout_ms: float | None) -> Body:
    try:
        sent = json.loads(line)
        candidates = sent["candidates"]
        num = len(candidates["id"] if isinstance(candidates, dict) else candidates)
    except (ValueError, KeyError, TypeError):
        raise BenchError(f"--requests {file}: line {number}: expected a body of /predict with candidates") from None
    if timeout_ms is not None:
        line = json.dumps({**sent, "timeout_ms": timeout_ms}, separators=(",", ":")).encode()
    return Body(content=line.strip(), candidates=num)
