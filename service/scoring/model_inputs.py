"""Model inputs: what the store knows of a request, merged with what the client sent, as packed tensors."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from models.artifact.folder import Artifact
from models.artifact.manifest import MODEL
from models.features.arrays import Arrays
from models.features.column_encoding import EncodingError
from models.features.history import Event, history
from models.features.values import Row
from service.errors import Degraded, InvalidValue
from service.scoring import feature_merge
from service.scoring.candidate_cache import CacheLookup, CandidateCache, ItemGraph, unknown_fields
from service.scoring.history_cache import HistoryCache
from service.scoring.request import ScoringRequest
from service.store.codec import NO_HISTORY, unpack_row
from service.store.feature_store import Fetched

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputLookup:
    """What of a request's inputs is cached, and what the store has to be asked for."""

    candidates: CacheLookup
    behaviours: Sequence[Event] | None  # those of the request that count, where it brings its own
    items: Sequence[str]  # to fetch: candidates that are missing, then the items of those behaviours
    num_clicks: int  # to fetch of the user's history

    def needs_store(self, request: ScoringRequest) -> bool:
        return request.user is not None or bool(self.items)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInput:
    """The packed tensors of one request, and what has to be said of it."""

    arrays: Arrays
    history: Sequence[Event]  # the clicks that the arrays hold, oldest first
    degraded: list[Degraded]
    unknown: Mapping[str, int]  # values never seen in training, by field
    num_unnamed: int  # features that the client sent and the model does not have


class ModelInputBuilder:
    """One model version's inputs. It keeps `item_rows` encoded candidates and as many clicks.

    Candidates are kept for `fresh_s` seconds where they are the store's to say. The store may be down: that costs its
    values, not the answer.
    """

    def __init__(self, artifact: Artifact, item_graph: ItemGraph, *, item_rows: int, fresh_s: float) -> None:
        encoder, manifest = artifact.encoder, artifact.manifest
        schema = encoder.schema
        self._encoder = encoder
        self._candidates = CandidateCache(
            encoder, item_graph, item_width=manifest.item_width, capacity=item_rows, fresh_s=fresh_s
        )
        names = {i.name for i in manifest.graphs[MODEL].inputs}
        reads_history = any(name.startswith("history_") for name in names)
        self._histories = None
        if reads_history:
            self._histories = HistoryCache(encoder, capacity=item_rows, reads_age="history_age" in names)
        self._history_length = schema.history_length if reads_history else 0
        self._user_names = frozenset(f.name for f in schema.group("user"))
        self._context_names = frozenset(f.name for f in schema.group("context"))
        self._has_request_fields = bool(encoder.layout.request.fields)

    def expire_items(self, items: Iterable[str] | None) -> None:
        """Has these items' features read again when they are asked for; None: everybody's."""
        self._candidates.expire(items)

    def find(self, request: ScoringRequest, *, with_ids: bool = False) -> InputLookup:
        """Raises MalformedFeatures."""
        candidates = self._candidates.find(request.candidates, with_ids=with_ids)
        items: Sequence[str] = candidates.missing_ids
        behaviours = None
        if request.behaviours is not None:
            behaviours = history(request.behaviours, before=request.ts, limit=self._history_length)
            items = [*items, *(event.item for event in behaviours)]
        num_clicks = self._history_length if behaviours is None else 0
        return InputLookup(candidates=candidates, behaviours=behaviours, items=items, num_clicks=num_clicks)

    def build(self, request: ScoringRequest, lookup: InputLookup, fetched: Fetched | None) -> ModelInput:
        """The tensors of a request, given what the store answered; None where it did not.

        A stored value that cannot be encoded counts as absent and is named in `degraded`. Raises InvalidValue for one
        of the client's, and MalformedFeatures.
        """
        try:
            return self._build(request, lookup, fetched)
        except EncodingError as err:
            errors = feature_merge.invalid_values(self._encoder, request)
            raise (InvalidValue(errors) if errors else err) from None

    def _build(self, request: ScoringRequest, lookup: InputLookup, fetched: Fetched | None) -> ModelInput:
        encoder, stored = self._encoder, fetched or _NOTHING
        missing = lookup.candidates.missing_ids
        items = None if fetched is None else dict(zip(missing, fetched.items, strict=False))
        rows = self._candidates.rows(request.candidates, lookup.candidates, items)
        arrays, unknown, has_invalid = rows.arrays, rows.unknown, rows.has_invalid
        if self._has_request_fields:
            has_invalid |= self._add_request(arrays, unknown, request, stored.user)
        past: Sequence[Event] = stored.behaviours
        if self._histories is not None:
            if lookup.behaviours is None:
                of_history, unknown_clicks, bad = self._histories.arrays(stored.behaviours, request.ts)
            else:
                of_items = [unpack_row(packed) for packed in stored.items[len(missing) :]]
                of_history, unknown_clicks, past, bad = self._sent_history(request, lookup.behaviours, of_items)
            arrays |= of_history
            has_invalid |= bad
            for name, count in unknown_clicks.items():
                unknown[name] = unknown.get(name, 0) + count
        degraded: list[Degraded] = []
        if fetched is None:
            degraded = feature_merge.degraded_reasons(
                encoder.schema,
                request,
                reads_history=self._histories is not None,
                lacks_items=rows.has_gaps or feature_merge.lacks_item_features(encoder.schema, lookup.behaviours or ()),
            )
        if rows.has_stale:
            degraded.append(Degraded.ITEM_FEATURES_STALE)
        if has_invalid:
            degraded.append(Degraded.STORED_VALUES_INVALID)
        num_unnamed = len(rows.unnamed)
        if request.user_features:
            num_unnamed += len(request.user_features.keys() - self._user_names)
        if request.context:
            num_unnamed += len(request.context.keys() - self._context_names)
        return ModelInput(arrays=arrays, history=past, degraded=degraded, unknown=unknown, num_unnamed=num_unnamed)

    def _add_request(
        self, arrays: Arrays, unknown: dict[str, int], request: ScoringRequest, stored: Row | None
    ) -> bool:
        """Adds the `request_*` tensors; whether stored values were invalid."""
        encoder, schema = self._encoder, self._encoder.schema
        user, has_invalid = feature_merge.merge_user_features(schema, request, stored), False
        try:
            packed = encoder.pack_request(user, request.context, request.ts)
        except EncodingError as err:
            valid, _ = feature_merge.drop_invalid(encoder, stored, schema.group("user"))
            user = feature_merge.merge_user_features(schema, request, valid)
            packed, has_invalid = encoder.pack_request(user, request.context, request.ts), True
            log.warning("bad stored value", extra={"field": err.field.name, "expected": err.expected})
        for name in unknown_fields(encoder.layout.request, packed["request_ids"]).get(0, ()):
            unknown[name] = unknown.get(name, 0) + 1
        arrays |= packed
        return has_invalid

    def _sent_history(
        self, request: ScoringRequest, behaviours: Sequence[Event], items: Sequence[Row | None]
    ) -> tuple[Arrays, dict[str, int], list[Event], bool]:
        """The `history_*` tensors of behaviours that came with the request, unknown values, those, stored ones bad."""
        encoder, has_invalid = self._encoder, False
        items = items or [None] * len(behaviours)
        past = [feature_merge.with_item_features(event, item) for event, item in zip(behaviours, items, strict=True)]
        try:
            arrays = encoder.encode_history(past, request.ts)
        except EncodingError as err:
            fields = feature_merge.history_item_fields(encoder.schema)
            valid = [feature_merge.drop_invalid(encoder, item, fields)[0] for item in items]
            past = [feature_merge.with_item_features(e, item) for e, item in zip(behaviours, valid, strict=True)]
            arrays, has_invalid = encoder.encode_history(past, request.ts), True
            log.warning("bad stored value", extra={"field": err.field.name, "expected": err.expected})
        packed = encoder.layout.pack_history(arrays)
        unknown: dict[str, int] = {}
        for names in unknown_fields(encoder.layout.history, packed["history_ids"][0]).values():
            for name in names:
                unknown[name] = unknown.get(name, 0) + 1
        return packed, unknown, past, has_invalid


_NOTHING = Fetched(user=None, behaviours=NO_HISTORY, items=[])
