"""The spine: one request from its user to its click probabilities."""

import asyncio
import logging
import time
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.encoding import Arrays, Encoder, EncodingError, Event, history
from models.schema import OOV, input_name
from service import assembly
from service.assembly import Given
from service.catalog import Catalog, Model
from service.errors import invalid, of_arm
from service.experiment import Experiment
from service.features import FeatureStore, Fetched, StoreUnavailable
from service.metrics import OTHER_FIELD, Metrics, Stage
from service.values import spelled
from service.worker import Deadline, Worker

log = logging.getLogger(__name__)

STORE_SHARE = 0.5  # of the time a request has left; the model needs the rest
BAD_STORED_VALUES = "stored_values_invalid"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """An answer: calibrated click probabilities in the candidates' order, and what it had to do without."""

    request_id: str | int
    experiment: str
    arm: str
    model: str
    version: str
    ctr: NDArray[np.float64]
    degraded: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A request on its way: whose it is, what its model is fed, and the past clicks that the arrays hold."""

    request_id: str | int
    arm: str
    model: Model
    arrays: Arrays
    past: Sequence[Event]
    degraded: list[str]
    seconds: dict[Stage, float]  # that it took so far


class Scorer:
    def __init__(
        self, *, experiment: Experiment, catalog: Catalog, store: FeatureStore, worker: Worker, metrics: Metrics
    ) -> None:
        self._experiment = experiment
        self._catalog = catalog
        self._store = store
        self._worker = worker
        self._metrics = metrics
        self._fetches: set[asyncio.Task[Fetched]] = set()  # the loop itself holds no task

    async def score(self, given: Given, *, request_id: str | int | None, deadline: Deadline) -> Scored:
        """Raises Problem: 422 for a value its field cannot take, 503 while the model is busy or broken, 504 late."""
        encoded = await self.encode(given, request_id=request_id, deadline=deadline)
        for stage, seconds in encoded.seconds.items():
            self._metrics.stages[stage].observe(seconds)
        with of_arm(encoded.arm):
            deadline.check()
            logits = await self._worker.run(encoded.model.backend, encoded.arrays, deadline)
            deadline.check()
        scored = self.answer(encoded, logits)
        self._count(given, encoded)
        self._metrics.arm(encoded.arm).scored(scored.ctr)
        return scored

    async def encode(self, given: Given, *, request_id: str | int | None, deadline: Deadline) -> Encoded:
        """All that comes before the model: whose request it is, what the store knows, the arrays."""
        request_id = uuid.uuid4().hex if request_id is None else request_id
        arm = self._experiment.assign(given.user if given.user is not None else spelled(request_id)).name
        model = self._catalog.models[arm]
        started = time.perf_counter()
        with of_arm(arm):
            stored, past, degraded = await self._fetch(model, given, deadline)
            fetched = time.perf_counter()
            arrays = self._encode(model.encoder, given, stored, past, degraded)
        return Encoded(
            request_id=request_id,
            arm=arm,
            model=model,
            arrays=arrays,
            past=past,
            degraded=degraded,
            seconds={"fetch": fetched - started, "encode": time.perf_counter() - fetched},
        )

    def answer(self, encoded: Encoded, logits: NDArray[np.float32]) -> Scored:
        artifact = encoded.model.artifact
        return Scored(
            request_id=encoded.request_id,
            experiment=self._experiment.name,
            arm=encoded.arm,
            model=artifact.manifest.model,
            version=artifact.manifest.version,
            ctr=artifact.calibration(logits),
            degraded=encoded.degraded,
        )

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

    def _count(self, given: Given, encoded: Encoded) -> None:
        schema = encoded.model.artifact.schema
        for field in schema.fields:
            if field.vocabulary is not None:
                unknown = int(np.count_nonzero(encoded.arrays[input_name(field)] == OOV))
                if unknown:
                    self._metrics.unknown_values(field.name).inc(unknown)
        unnamed = assembly.unknown_names(schema, given)
        if unnamed:
            self._metrics.unknown_values(OTHER_FIELD).inc(unnamed)
        for reason in encoded.degraded:
            self._metrics.degraded(reason).inc()
