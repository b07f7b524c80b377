"""Warm-up of a new model version beside the one that serves: loaded, verified, run on recent live requests."""

import asyncio
import logging
import time

import numpy as np

from models.artifact import folder as artifact
from models.artifact.errors import ArtifactError
from models.artifact.folder import CURRENT
from models.features.arrays import Arrays
from models.features.column_encoding import EncodingError
from models.features.packing import num_candidates, slice_candidates
from service.deadline import Deadline
from service.errors import ArtifactRefused, NoSuchVersion, Refusal
from service.registry.background_thread import BackgroundThread
from service.registry.registry import ModelRegistry
from service.runtime.scheduler import run_once
from service.scoring.loaded_model import LoadedModel
from service.scoring.request import MalformedFeatures, ScoringRequest
from service.scoring.scorer import Scorer

log = logging.getLogger(__name__)

REPLAY_MS = 10_000.0  # for what one request needs of the store
SIZES = (1, 2, 100, 1000)  # candidates


class ModelWarmer:
    """Prepares one version at a time; whoever comes while one is prepared waits."""

    def __init__(self, *, registry: ModelRegistry, scorer: Scorer) -> None:
        self._registry = registry
        self._scorer = scorer
        self._one_at_a_time = asyncio.Lock()

    async def prepare(self, arm: str, version: str = CURRENT) -> LoadedModel:
        """The version, verified and warm; `ModelRegistry.flip` makes it serve, and `ModelRegistry.release` drops it.

        The requests that the arm answered last are read and scored anew, at every size, where there were any. Beside
        them the service goes on: all that can wait for it is done by a thread that gives way. Raises Refusal: 422 if
        there is no such version, 409 with the reason if its artifact must not serve.
        """
        async with self._one_at_a_time:
            return await self._prepare(arm, version)

    async def _prepare(self, arm: str, version: str) -> LoadedModel:
        root, name = self._registry.root, self._registry.arms[arm].model
        try:
            path = await asyncio.to_thread(artifact.resolve, root, name, version)
        except ArtifactError as err:
            raise NoSuchVersion(str(err)) from None
        started = time.perf_counter()
        with BackgroundThread() as background:
            try:
                model = await background.run(self._registry.read, arm, path.name)
            except ArtifactError as err:
                log.warning("artifact refused", extra={"arm": arm, "version": path.name, "reason": str(err)})
                raise ArtifactRefused(str(err)) from None
            try:
                replayed = await self._replay(arm, model, background)
            except BaseException:
                self._registry.release(model)
                raise
        took = round(time.perf_counter() - started, 3)
        log.info("model ready", extra={"arm": arm, "version": path.name, "requests": replayed, "seconds": took})
        return model

    async def _replay(self, arm: str, model: LoadedModel, background: BackgroundThread) -> int:
        """Raises ArtifactRefused where a request that the arm has answered cannot be, or gets a score that is none."""
        inputs: list[Arrays] = []
        for request in self._scorer.recent.of(arm):
            inputs.append(await self._build(model, request))
            await self._try(model, inputs[-1], background)  # between two readings, which are the event loop's work
        if inputs:
            for number, size in enumerate(SIZES):
                arrays = inputs[number % len(inputs)]
                rows = np.arange(size) % num_candidates(arrays)
                await self._try(model, slice_candidates(arrays, rows), background)
        return len(inputs)

    async def _try(self, model: LoadedModel, arrays: Arrays, background: BackgroundThread) -> None:
        outcome = await background.run(run_once, model.served.backend, arrays, num_candidates(arrays))
        if isinstance(outcome, Refusal):
            raise _refused(model, f"it does not run on a recent request: {outcome.__cause__}")
        if not np.isfinite(outcome).all():
            raise _refused(model, "it gives a recent request a score that is no number")

    async def _build(self, model: LoadedModel, request: ScoringRequest) -> Arrays:
        deadline = Deadline.after(REPLAY_MS, since=time.monotonic())
        try:
            return (await self._scorer.build_input(model, request, deadline)).arrays
        except (Refusal, EncodingError, MalformedFeatures) as err:
            raise _refused(model, f"it cannot take a recent request: {err}") from None


def _refused(model: LoadedModel, reason: str) -> ArtifactRefused:
    log.warning("artifact refused", extra={"version": model.version, "reason": reason})
    return ArtifactRefused(f"{model.artifact.path}: {reason}")
