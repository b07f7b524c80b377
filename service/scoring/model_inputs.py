"""From a request to its model's arrays: what the store knows of it, merged with what the client sent, encoded."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from models.features.arrays import Arrays
from models.features.column_encoding import EncodingError
from models.features.encoder import Encoder
from models.features.field import OOV, input_name
from models.features.history import Event, history
from models.features.values import Row
from service.deadline import Deadline
from service.errors import invalid
from service.observability.metrics import OTHER_FIELD, Metrics, Stage
from service.scoring import feature_merge
from service.scoring.candidate_cache import Items, Wanted
from service.scoring.feature_merge import Given
from service.scoring.history_cache import Pasts
from service.scoring.loaded_model import LoadedModel
from service.store.codec import NO_CLICKS, unpack_row
from service.store.feature_store import FeatureStore, Fetched, StoreUnavailable

log = logging.getLogger(__name__)

STORE_SHARE = 0.5  # of the time a request has left; the model needs the rest
BAD_STORED_VALUES = "stored_values_invalid"
STALE_ITEMS = "item_features_stale"


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """What a model is fed for one request, the past clicks that the arrays hold, and what could not be had."""

    arrays: Arrays
    past: Sequence[Event]
    degraded: list[str]
    unnamed: int  # features of the candidates that the model does not have
    seconds: dict[Stage, float]  # that it took


class _Kept:
    """What is kept of one loaded model's rows."""

    def __init__(self, encoder: Encoder, *, rows: int, fresh_s: float) -> None:
        schema = encoder.schema
        self.encoder = encoder
        self.items = Items(encoder, capacity=rows, fresh_s=fresh_s)
        self.pasts = Pasts(encoder, capacity=rows) if schema.group("behaviour") else None
        self.words = [(f.name, input_name(f)) for f in schema.fields if f.vocabulary is not None]
        self.user_names = frozenset(f.name for f in schema.group("user"))
        self.context_names = frozenset(f.name for f in schema.group("context"))
        self.first_of_all = np.zeros(1, dtype=np.int64)

    def user_index(self, num_candidates: int) -> NDArray[np.int64]:
        """All candidates are of the one user. The same zeros for every request: nobody writes into them."""
        if num_candidates > len(self.first_of_all):
            self.first_of_all = np.zeros(num_candidates, dtype=np.int64)
        return self.first_of_all[:num_candidates]


class Inputs:
    """Reads what a request's model needs. The store may be down: that costs its values, not the answer.

    Of every model that is loaded it keeps `item_rows` encoded candidates, for `fresh_s` seconds where they are the
    store's to say, and as many clicks.
    """

    def __init__(self, *, store: FeatureStore, metrics: Metrics, item_rows: int, fresh_s: float) -> None:
        self._store = store
        self._metrics = metrics
        self._item_rows = item_rows
        self._fresh_s = fresh_s
        self._kept: WeakKeyDictionary[LoadedModel, _Kept] = WeakKeyDictionary()

    async def read(self, model: LoadedModel, given: Given, deadline: Deadline) -> Read:
        """Raises Problem (422) for a value of the client that its field cannot take, and Unreadable."""
        started = time.perf_counter()
        kept = self._of(model)
        wanted = kept.items.find(given.candidates)
        own = None
        if given.behaviours is not None:
            own = history(given.behaviours, before=given.ts, limit=kept.encoder.schema.history_length)
        found = time.perf_counter()
        stored = await self._fetch(kept, given, wanted, own, deadline)
        fetched = time.perf_counter()
        try:
            read = self._encode(kept, given, wanted, own, stored)
        except EncodingError as err:
            errors = feature_merge.bad_values(kept.encoder, given)
            raise (invalid(errors) if errors else err) from None
        read.seconds["fetch"] = fetched - found
        read.seconds["encode"] = time.perf_counter() - fetched + found - started
        return read

    def _of(self, model: LoadedModel) -> _Kept:
        kept = self._kept.get(model)
        if kept is None:
            kept = self._kept[model] = _Kept(model.encoder, rows=self._item_rows, fresh_s=self._fresh_s)
        return kept

    async def _fetch(
        self, kept: _Kept, given: Given, wanted: Wanted, own: Sequence[Event] | None, deadline: Deadline
    ) -> Fetched | None:
        """What the store knows: of the items asked for, then of the client's own behaviours. None where it is down."""
        items = wanted.asked if not own else [*wanted.asked, *(event.item for event in own)]
        if given.user is None and not items:
            return _NOTHING
        limit = kept.encoder.schema.history_length if own is None else 0
        try:
            with self._metrics.store_call("fetch"):
                # A slow store costs the past, not the answer. It goes on by itself, and tells its breaker.
                async with asyncio.timeout(max(STORE_SHARE * deadline.left_s, 0)):
                    return await self._store.fetch(given.user, items, before=given.ts, limit=limit)
        except (StoreUnavailable, TimeoutError):
            return None

    def _encode(
        self, kept: _Kept, given: Given, wanted: Wanted, own: Sequence[Event] | None, stored: Fetched | None
    ) -> Read:
        """Raises EncodingError for a client's bad value; a stored one is taken for absent and named in `degraded`."""
        encoder, known = kept.encoder, stored or _NOTHING
        of_items = None if stored is None else dict(zip(wanted.asked, stored.items, strict=False))
        rows = kept.items.encode(given.candidates, wanted, of_items)
        arrays, bad_profile = self._profile(encoder, given, known.user)
        past: Sequence[Event] = known.behaviours
        bad_past = False
        if kept.pasts is not None and own is None:
            clicks, bad_past = kept.pasts.encode(known.behaviours, given.ts)
            arrays |= clicks
        elif kept.pasts is not None:
            of_own = [unpack_row(packed) for packed in known.items[len(wanted.asked) :]] or [None] * len(own or ())
            clicks, past, bad_past = self._own_past(encoder, own or (), of_own, given.ts)
            arrays |= clicks
        arrays |= rows.arrays
        arrays["user_index"] = kept.user_index(len(given.candidates.ids))
        degraded = []
        if stored is None:
            gaps = rows.gaps or feature_merge.lack_features(encoder.schema, own or ())
            degraded = feature_merge.missing(encoder.schema, given, items=gaps)
        if rows.stale:
            degraded.append(STALE_ITEMS)
        if rows.invalid or bad_profile or bad_past:
            degraded.append(BAD_STORED_VALUES)
        return Read(arrays=arrays, past=past, degraded=degraded, unnamed=len(rows.unnamed), seconds={})

    def _profile(self, encoder: Encoder, given: Given, stored: Row | None) -> tuple[Arrays, bool]:
        """The `user.*` and `ctx.*` inputs, and whether stored values were invalid."""
        schema = encoder.schema
        try:
            return encoder.encode_request(feature_merge.profile(schema, given, stored), given.context, given.ts), False
        except EncodingError as err:
            cleaned, _ = feature_merge.cleaned(encoder, stored, schema.group("user"))
            arrays = encoder.encode_request(feature_merge.profile(schema, given, cleaned), given.context, given.ts)
            log.warning("bad stored value", extra={"field": err.field.name, "expected": err.expected})
            return arrays, True

    def _own_past(
        self, encoder: Encoder, own: Sequence[Event], items: Sequence[Row | None], ts: float
    ) -> tuple[Arrays, list[Event], bool]:
        """The `hist*` inputs of behaviours that came with the request, those, and whether stored values were bad."""
        past = [feature_merge.completed(event, item) for event, item in zip(own, items, strict=True)]
        try:
            return encoder.encode_history(past, ts), past, False
        except EncodingError as err:
            repeated = feature_merge.repeated(encoder.schema)
            cleaned = [feature_merge.cleaned(encoder, item, repeated)[0] for item in items]
            past = [feature_merge.completed(event, item) for event, item in zip(own, cleaned, strict=True)]
            arrays = encoder.encode_history(past, ts)
            log.warning("bad stored value", extra={"field": err.field.name, "expected": err.expected})
            return arrays, past, True

    def count(self, model: LoadedModel, given: Given, read: Read) -> None:
        """What the answered request did without, in the metrics."""
        kept = self._of(model)
        for name, named in kept.words:
            values = read.arrays[named]
            if values.size == 1:
                unknown = int(values.item() == OOV)
            else:
                unknown = int(np.count_nonzero(values == OOV))
            if unknown:
                self._metrics.unknown_values(name).inc(unknown)
        unnamed = read.unnamed
        for sent, names in ((given.user_features, kept.user_names), (given.context, kept.context_names)):
            unnamed += len(sent.keys() - names)
        if unnamed:
            self._metrics.unknown_values(OTHER_FIELD).inc(unnamed)
        for reason in read.degraded:
            self._metrics.degraded(reason).inc()


_NOTHING = Fetched(user=None, behaviours=NO_CLICKS, items=[])
