"""One scoring request as a client sent it, free of HTTP: a user, a context, a time, past clicks, candidate ads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from models.features.history import Event
from models.features.values import Row, Value
from service.errors import pointer


class MalformedFeatures(ValueError):  # noqa: N818 - a state of a request, not of the program
    """A candidate's features that are no JSON object: what is wrong, and where, the body has to tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """The ads to score, in the client's order: their features as JSON, or as columns. The other one is None."""

    ids: Sequence[str]
    features: Sequence[msgspec.Raw | msgspec.UnsetType] | None
    columns: Mapping[str, Sequence[Value]] | None

    def keys(self) -> Sequence[str | tuple[str, bytes]]:
        """What tells two candidates apart: the item, and the features that came with it, not yet decoded."""
        if self.features is None or set(map(type, self.features)) == _NO_FEATURES:
            return self.ids
        return [
            item if sent is msgspec.UNSET else (item, bytes(sent))
            for item, sent in zip(self.ids, self.features, strict=True)
        ]

    def row(self, position: int) -> Row:
        """The features that came with one candidate of a list; none in columns. Raises MalformedFeatures."""
        sent = msgspec.UNSET if self.features is None else self.features[position]
        if isinstance(sent, msgspec.UnsetType):
            return {}
        try:
            return _FEATURES.decode(sent) or {}
        except (msgspec.MsgspecError, UnicodeDecodeError) as err:
            raise MalformedFeatures(str(err)) from None

    def column(self, name: str) -> Sequence[Value]:
        """One feature of every candidate, None where it was not sent. Slow for a list of rows."""
        if self.columns is None:
            return [self.row(position).get(name) for position in range(len(self.ids))]
        return self.columns.get(name) or [None] * len(self.ids)

    def has_value(self, name: str, position: int) -> bool:
        """Whether a column brings this candidate's feature."""
        return self.columns is not None and name in self.columns and self.columns[name][position] is not None

    def pointer(self, row: int, name: str) -> str:
        parts = ("candidates", name, row) if self.features is None else ("candidates", row, "features", name)
        return pointer(*parts)


_NO_FEATURES = {msgspec.UnsetType}
_FEATURES: msgspec.json.Decoder[dict[str, Any] | None] = msgspec.json.Decoder(dict[str, Any] | None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringRequest:
    """`ts` is the request's own time in Unix seconds. `behaviours` is None where the store's history counts."""

    user: str | None
    user_features: Row
    context: Row
    ts: float
    behaviours: Sequence[Event] | None
    candidates: Candidates
