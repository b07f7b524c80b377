"""The spine: one request from its user to its click probabilities."""

import uuid
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.assembly import Given
from service.catalog import Catalog, Model
from service.deadline import Deadline
from service.errors import of_arm
from service.experiment import Experiment
from service.inputs import Inputs, Read
from service.metrics import Metrics
from service.values import spelled
from service.worker import Worker


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
    """A request on its way: whose it is, its model, and what that is fed."""

    request_id: str | int
    arm: str
    model: Model
    read: Read


class Scorer:
    def __init__(
        self, *, experiment: Experiment, catalog: Catalog, inputs: Inputs, worker: Worker, metrics: Metrics
    ) -> None:
        self._experiment = experiment
        self._catalog = catalog
        self._inputs = inputs
        self._worker = worker
        self._metrics = metrics

    async def score(self, given: Given, *, request_id: str | int | None, deadline: Deadline) -> Scored:
        """Raises Problem: 422 for a value its field cannot take, 503 while the model is busy or broken, 504 late."""
        encoded = await self.encode(given, request_id=request_id, deadline=deadline)
        for stage, seconds in encoded.read.seconds.items():
            self._metrics.stages[stage].observe(seconds)
        with of_arm(encoded.arm):
            deadline.check()
            logits = await self._worker.run(encoded.model.backend, encoded.read.arrays, deadline)
            deadline.check()
        scored = self.answer(encoded, logits)
        self._inputs.count(encoded.model, given, encoded.read)
        self._metrics.arm(encoded.arm).scored(scored.ctr)
        return scored

    async def encode(self, given: Given, *, request_id: str | int | None, deadline: Deadline) -> Encoded:
        """All that comes before the model: whose request it is, what the store knows, the arrays."""
        request_id = uuid.uuid4().hex if request_id is None else request_id
        arm = self._experiment.assign(given.user if given.user is not None else spelled(request_id)).name
        model = self._catalog.models[arm]
        with of_arm(arm):
            read = await self._inputs.read(model, given, deadline)
        return Encoded(request_id=request_id, arm=arm, model=model, read=read)

    def answer(self, encoded: Encoded, logits: NDArray[np.float32]) -> Scored:
        artifact = encoded.model.artifact
        return Scored(
            request_id=encoded.request_id,
            experiment=self._experiment.name,
            arm=encoded.arm,
            model=artifact.manifest.model,
            version=artifact.manifest.version,
            ctr=artifact.calibration(logits),
            degraded=encoded.read.degraded,
        )
