"""From a request to its model's arrays: what the store knows of it, merged with what the client sent, encoded."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.encoding import Arrays, Encoder, EncodingError, Event, history
from models.schema import OOV, input_name
from service import assembly
from service.assembly import Given
from service.catalog import Model
from service.deadline import Deadline
from service.errors import invalid
from service.features import FeatureStore, Fetched, StoreUnavailable
from service.metrics import OTHER_FIELD, Metrics, Stage

log = logging.getLogger(__name__)

STORE_SHARE = 0.5  # of the time a request has left; the model needs the rest
BAD_STORED_VALUES = "stored_values_invalid"


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """What a model is fed for one request, the past clicks that the arrays hold, and what could not be had."""

    arrays: Arrays
    past: Sequence[Event]
    degraded: list[str]
    seconds: dict[Stage, float]  # that it took


class Inputs:
    """Reads what a request's model needs. The store may be down: that costs its values, not the answer."""

    def __init__(self, *, store: FeatureStore, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._fetches: set[asyncio.Task[Fetched]] = set()  # the loop itself holds no task

    async def read(self, model: Model, given: Given, deadline: Deadline) -> Read:
        """Raises Problem (422) for a value of the client that its field cannot take."""
        started = time.perf_counter()
        stored, past, degraded = await self._fetch(model, given, deadline)
        fetched = time.perf_counter()
        arrays = self._encode(model.encoder, given, stored, past, degraded)
        seconds: dict[Stage, float] = {"fetch": fetched - started, "encode": time.perf_counter() - fetched}
        return Read(arrays=arrays, past=past, degraded=degraded, seconds=seconds)

    async def _fetch(
        self, model: Model, given: Given, deadline: Deadline
    ) -> tuple[Fetched, Sequence[Event], list[str]]:
        """What the store knows, the user's past, and what is missing: a store that is down takes no answer away."""
        schema = model.artifact.schema
        limit = schema.history_length
        own = None if given.behaviours is None else history(given.behaviours, before=given.ts, limit=limit)
        items = [*given.candidates.ids, *(event.item for event in own or ())]
        asked = list(dict.fromkeys(items))
        try:
            with self._metrics.store_call("fetch"):
                fetch = self._store.fetch(given.user, asked, before=given.ts, limit=limit if own is None else 0)
                stored = await self._in_time(fetch, deadline)
        except StoreUnavailable:
            nothing = Fetched(user=None, behaviours=[], items=[None] * len(given.candidates.ids))
            return nothing, own or (), assembly.missing(schema, given)
        rows = dict(zip(asked, stored.items, strict=True))
        past = stored.behaviours if own is None else [assembly.completed(e, rows[e.item]) for e in own]
        aligned = [rows[item] for item in given.candidates.ids]
        return Fetched(user=stored.user, behaviours=stored.behaviours, items=aligned), past, []

    async def _in_time(self, fetch: Coroutine[Any, Any, Fetched], deadline: Deadline) -> Fetched:
        """What the store answers within its share of the request's time: a slow one costs the past, not the answer."""
        task = asyncio.create_task(fetch)
        self._fetches.add(task)
        task.add_done_callback(self._fetches.discard)
        await asyncio.wait([task], timeout=max(STORE_SHARE * deadline.left_s, 0))
        if not task.done():
            # Left to the store's own timeout: to cancel it would cost its connection, and hide it from the breaker.
            task.add_done_callback(asyncio.Task.exception)  # nobody is left to read it
            raise StoreUnavailable(f"no answer from the store within its share of {deadline.timeout_ms:g} ms")
        return task.result()

    def _encode(
        self, encoder: Encoder, given: Given, stored: Fetched, past: Sequence[Event], degraded: list[str]
    ) -> Arrays:
        """A client's bad value is the client's error; a stored one is taken for absent and named in `degraded`."""
        schema = encoder.schema
        try:
            return encoder.encode(assembly.assemble(schema, given, stored, past))
        except EncodingError as err:
            errors = assembly.bad_values(encoder, given)
            if errors:
                raise invalid(errors) from None
            log.warning("bad stored value", extra={"field": err.field.name, "expected": err.expected})
        degraded.append(BAD_STORED_VALUES)
        stored, past = assembly.cleaned(encoder, stored, past)
        return encoder.encode(assembly.assemble(schema, given, stored, past))

    def count(self, model: Model, given: Given, read: Read) -> None:
        """What the answered request did without, in the metrics."""
        schema = model.artifact.schema
        for field in schema.fields:
            if field.vocabulary is not None:
                unknown = int(np.count_nonzero(read.arrays[input_name(field)] == OOV))
                if unknown:
                    self._metrics.unknown_values(field.name).inc(unknown)
        unnamed = assembly.unknown_names(schema, given)
        if unnamed:
            self._metrics.unknown_values(OTHER_FIELD).inc(unnamed)
        for reason in read.degraded:
            self._metrics.degraded(reason).inc()
