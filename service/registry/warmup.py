"""Warm-up of a new model version beside the one that serves: loaded, verified, run on recent live requests."""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence

import numpy as np

from models.artifact import folder as artifact
from models.artifact.errors import ArtifactError
from models.artifact.folder import CURRENT
from models.features.arrays import Arrays, concat
from models.features.column_encoding import EncodingError
from service.deadline import Deadline
from service.errors import Problem, artifact_refused, no_such_version
from service.registry.background_thread import BackgroundThread
from service.registry.registry import ModelRegistry
from service.runtime.backend import BackendError
from service.scoring.feature_merge import Given, Unreadable
from service.scoring.loaded_model import LoadedModel
from service.scoring.model_inputs import Inputs
from service.scoring.recent_requests import Recent

log = logging.getLogger(__name__)

REPLAY_MS = 10_000.0  # for what one request needs of the store
SIZES = (1, 2, 100, 1000)  # candidates
JOINED = 8  # requests of one run


class ModelWarmer:
    """Prepares one version at a time; whoever comes while one is prepared waits."""

    def __init__(self, *, registry: ModelRegistry, inputs: Inputs, recent: Recent) -> None:
        self._registry = registry
        self._inputs = inputs
        self._recent = recent
        self._one_at_a_time = asyncio.Lock()

    async def prepare(self, arm: str, version: str = CURRENT) -> LoadedModel:
        """The version, verified and warm; `ModelRegistry.flip` makes it serve, and `ModelRegistry.release` drops it.

        The requests that the arm answered last are read and scored anew, at every size, where there were any. Beside
        them the service goes on: all that can wait for it is done by a thread that gives way. Raises Problem: 422 if
        there is no such version, 409 with the reason if its artifact must not serve.
        """
        async with self._one_at_a_time:
            return await self._prepare(arm, version)

    async def _prepare(self, arm: str, version: str) -> LoadedModel:
        root, name = self._registry.root, self._registry.arms[arm].model
        try:
            path = await asyncio.to_thread(artifact.resolve, root, name, version)
        except ArtifactError as err:
            raise no_such_version(str(err)) from None
        started = time.perf_counter()
        with BackgroundThread() as background:
            try:
                model = await background.run(self._registry.read, arm, path.name)
            except ArtifactError as err:
                log.warning("artifact refused", extra={"arm": arm, "version": path.name, "reason": str(err)})
                raise artifact_refused(str(err)) from None
            try:
                replayed = await self._replay(arm, model, background)
            except BaseException:
                self._registry.release(model)
                raise
        took = round(time.perf_counter() - started, 3)
        log.info("model ready", extra={"arm": arm, "version": path.name, "requests": replayed, "seconds": took})
        return model

    async def _replay(self, arm: str, model: LoadedModel, background: BackgroundThread) -> int:
        """Raises Problem (409) where a request that the arm has answered cannot be, or gets a score that is none."""
        recent: list[Arrays] = []
        for request in self._recent.of(arm):
            recent.append(await self._read(model, request))
            await self._try(model, recent[-1], background)  # between two readings, which are the event loop's work
        for arrays in _mixed(recent):
            await self._try(model, arrays, background)
        return len(recent)

    async def _try(self, model: LoadedModel, arrays: Arrays, background: BackgroundThread) -> None:
        try:
            logits = await background.run(model.backend.run, arrays)
        except BackendError as err:
            raise _refused(model, f"it does not run on a recent request: {err}") from None
        if not np.isfinite(logits).all():
            raise _refused(model, "it gives a recent request a score that is no number")

    async def _read(self, model: LoadedModel, request: Given) -> Arrays:
        try:
            return (await self._inputs.read(model, request, Deadline.after(REPLAY_MS, since=time.monotonic()))).arrays
        except (Problem, EncodingError, Unreadable) as err:
            raise _refused(model, f"it cannot take a recent request: {err}") from None


def _refused(model: LoadedModel, reason: str) -> Problem:
    log.warning("artifact refused", extra={"version": model.version, "reason": reason})
    return artifact_refused(f"{model.artifact.path}: {reason}")


def _mixed(recent: Sequence[Arrays]) -> Iterator[Arrays]:
    """Several of them joined, and single ones in every size."""
    for first in range(0, len(recent), JOINED):
        yield concat(recent[first : first + JOINED])
    for number, size in enumerate(SIZES):
        if recent:
            yield _sized(recent[number % len(recent)], size)


def _sized(arrays: Arrays, num_candidates: int) -> Arrays:
    """One request with its candidates again and again, up to that number."""
    rows = np.arange(num_candidates) % len(arrays["user_index"])
    of_candidates = {name for name in arrays if name.startswith("item.")} | {"user_index"}
    return {name: values[rows] if name in of_candidates else values for name, values in arrays.items()}
