"""The models that serve: one for each arm, replaced while requests are answered, and those before them."""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from models import artifact
from models.artifact import Artifact, ArtifactError
from models.encoding import Encoder
from service import backends
from service.backends import Backend, BackendError, Device, Kind, OnnxBackend
from service.batching import Batcher, Runner
from service.cost import Cost
from service.experiment import Arm

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """One artifact, ready to score; two arms may share it."""

    artifact: Artifact
    encoder: Encoder
    backend: Backend
    kind: Kind
    device: Device
    batcher: Batcher

    @property
    def version(self) -> str:
        return self.artifact.manifest.version

    @cached_property
    def explaining(self) -> OnnxBackend:
        """What explains its scores: loaded by the first call, not before. Raises ArtifactError."""
        return backends.load_explaining(self.artifact)

    def describe(self) -> dict[str, Any]:
        manifest = self.artifact.manifest
        told = {"model", "version", "created", "metrics", "schema_fingerprint", "data_hash", "code_version"}
        return {**manifest.model_dump(include=told), "backend": self.kind, "device": self.device}


@dataclass(frozen=True, kw_only=True)
class Loader:
    """How an artifact becomes a model. Its runs go through the `runner`, each of at most `max_candidates`.

    The store keeps `keep_behaviours` clicks of a user: a model that reads more would be served another history than it
    was trained on.
    """

    root: Path
    runner: Runner
    max_candidates: int
    keep_behaviours: int

    def load(self, arm: Arm, version: str, *, loaded: Iterable[Model] = ()) -> Model:
        """That version of the arm's model, verified: hashes, schema, golden rows, finite scores. Takes seconds.

        Every load reads the whole folder. If one of the `loaded` models was made of the very same files, it is that
        model; if one has the same schema, its lookup tables are shared. A schema may differ from the serving one in
        everything: whether requests bring what it reads cannot be known here. Raises ArtifactError.
        """
        started = time.perf_counter()
        path = artifact.resolve(self.root, arm.model, version).resolve()
        loaded = list(loaded)
        verified = artifact.read(path, known=[model.artifact for model in loaded])
        manifest = verified.manifest
        if (manifest.model, manifest.version) != (arm.model, path.name):
            found = f"holds {manifest.model} {manifest.version}, not {arm.model} {path.name}"
            raise ArtifactError(f"{path}/manifest.json: {found}; export it again")
        length = verified.schema.history_length
        if length > self.keep_behaviours:
            reads = f"it reads the last {length} clicks of a user and the store keeps {self.keep_behaviours}"
            raise ArtifactError(f"{path}: {reads}; set keep_behaviours to at least {length}")
        for model in loaded:
            same = model.artifact.path == path and model.artifact.manifest == manifest
            if same and (model.kind, model.device) == (arm.backend, arm.device):
                return model
        model = self._made(verified, arm)
        took = round(time.perf_counter() - started, 3)
        told = {"arm": arm.name, "model": arm.model, "version": manifest.version, "seconds": took}
        log.info("model loaded", extra=told)
        return model

    def _made(self, verified: Artifact, arm: Arm) -> Model:
        backend = backends.load(verified, arm.backend, arm.device)
        try:
            artifact.check_scores(verified, backend.run(verified.golden.arrays))
            request = verified.encoder.encode(verified.golden.requests[0])
            cost = Cost.measured(backend, request, max_candidates=self.max_candidates)  # at every size: it warms too
        except BackendError as err:
            backend.close()
            told = f"its graph does not run on its own golden rows: {err}"
            raise ArtifactError(f"{verified.path}: {told}") from err
        except BaseException:
            backend.close()
            raise
        return Model(
            artifact=verified,
            encoder=verified.encoder,
            backend=backend,
            kind=arm.backend,
            device=arm.device,
            batcher=Batcher(backend, cost, self.runner),
        )


class Catalog:
    """Every arm's model by the arm's name, in `models`: one assignment there is a swap.

    `keep_versions` models that an arm had before stay loaded, to go back to at once. What no arm has any more is
    closed when the last of its requests is answered. All but `read` is for the event loop's thread.
    """

    def __init__(self, loader: Loader, arms: Sequence[Arm], *, keep_versions: int) -> None:
        self.models: dict[str, Model] = {}
        self.arms = {arm.name: arm for arm in arms}
        self._loader = loader
        self._keep = keep_versions
        self._previous: dict[str, list[Model]] = {arm.name: [] for arm in arms}  # the latest first
        self._retiring: dict[asyncio.Task[None], Model] = {}

    @classmethod
    def load(
        cls,
        loader: Loader,
        arms: Sequence[Arm],
        *,
        keep_versions: int = 2,
        versions: Mapping[str, Sequence[str]] | None = None,
    ) -> Self:
        """Takes seconds. `versions` are those that serve already elsewhere, by arm: the serving one, then those before.

        Raises ArtifactError if any arm's artifact is missing, damaged, or scores as it should not.
        """
        catalog = cls(loader, arms, keep_versions=keep_versions)
        for arm in arms:
            serving, *previous = (versions or {}).get(arm.name) or [arm.version]
            catalog.models[arm.name] = catalog.read(arm.name, serving)
            for version in previous[:keep_versions]:
                try:
                    catalog._previous[arm.name].append(catalog.read(arm.name, version))
                except ArtifactError as err:
                    log.warning("no previous version", extra={"arm": arm.name, "version": version, "reason": str(err)})
        return catalog

    @property
    def root(self) -> Path:
        return self._loader.root

    def read(self, arm: str, version: str) -> Model:
        """That version for the arm, loaded and verified, or the one that is loaded already. Raises ArtifactError."""
        return self._loader.load(self.arms[arm], version, loaded=self._loaded())

    def versions(self) -> dict[str, list[str]]:
        """Of every arm the serving one, then those before, the latest first."""
        return {arm: [m.version for m in (model, *self._previous[arm])] for arm, model in self.models.items()}

    def describe(self, arm: str) -> dict[str, Any]:
        """What it serves, and the versions that it can go back to, the latest first."""
        previous = [model.version for model in self._previous[arm]]
        return {"arm": arm, **self.models[arm].describe(), "previous": previous}

    def previous(self, arm: str) -> Model | None:
        """What the arm served before, still loaded."""
        return self._previous[arm][0] if self._previous[arm] else None

    def flip(self, arm: str, model: Model) -> None:
        """From now on new requests of the arm get this model; those under way end with theirs."""
        old = self.models[arm]
        if model is old:
            return
        self.models[arm] = model
        kept = [old, *(other for other in self._previous[arm] if other is not model)]
        self._previous[arm] = kept[: self._keep]
        self.release(*kept[self._keep :])

    def roll_back(self, arm: str) -> None:
        """To the previous model. The one that served is not kept: a step back twice leads two versions back."""
        old, (model, *rest) = self.models[arm], self._previous[arm]
        self.models[arm] = model
        self._previous[arm] = rest
        self.release(old)

    def release(self, *models: Model) -> None:
        """Closes those that no arm has, once none of their requests is under way."""
        used = {id(model) for model in self._loaded()} | {id(model) for model in self._retiring.values()}
        for model in models:
            if id(model) not in used:
                task = asyncio.get_running_loop().create_task(_retire(model))
                self._retiring[task] = model
                task.add_done_callback(self._retiring.pop)

    async def settled(self) -> None:
        """Returns when every model that was released so far is closed."""
        if self._retiring:
            await asyncio.wait(list(self._retiring))

    async def aclose(self) -> None:
        """For when no request is under way and the runner has ended."""
        late = list(self._retiring.items())
        for task, _ in late:
            task.cancel()
        await asyncio.gather(*(task for task, _ in late), return_exceptions=True)
        for model in {id(m): m for m in (*self._loaded(), *(m for t, m in late if t.cancelled()))}.values():
            model.backend.close()

    def _loaded(self) -> list[Model]:
        return [*self.models.values(), *(model for models in self._previous.values() for model in models)]


async def _retire(model: Model) -> None:
    await model.batcher.drain()
    model.backend.close()
    log.info("model closed", extra={"model": model.artifact.manifest.model, "version": model.version})
