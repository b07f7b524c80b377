"""The models that serve: one for each arm, replaced while requests are answered, and those before them."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from models.artifact.errors import ArtifactError
from service.experiments.assignment import Arm
from service.registry.loader import Loader
from service.scoring.loaded_model import LoadedModel

log = logging.getLogger(__name__)


class Catalog:
    """Every arm's model by the arm's name, in `models`: one assignment there is a swap.

    `keep_versions` models that an arm had before stay loaded, to go back to at once. What no arm has any more is
    closed when the last of its requests is answered. All but `read` is for the event loop's thread.
    """

    def __init__(self, loader: Loader, arms: Sequence[Arm], *, keep_versions: int) -> None:
        self.models: dict[str, LoadedModel] = {}
        self.arms = {arm.name: arm for arm in arms}
        self._loader = loader
        self._keep = keep_versions
        self._previous: dict[str, list[LoadedModel]] = {arm.name: [] for arm in arms}  # the latest first
        self._retiring: dict[asyncio.Task[None], LoadedModel] = {}

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

    def read(self, arm: str, version: str) -> LoadedModel:
        """That version for the arm, loaded and verified, or the one that is loaded already. Raises ArtifactError."""
        return self._loader.load(self.arms[arm], version, loaded=self._loaded())

    def versions(self) -> dict[str, list[str]]:
        """Of every arm the serving one, then those before, the latest first."""
        return {arm: [m.version for m in (model, *self._previous[arm])] for arm, model in self.models.items()}

    def describe(self, arm: str) -> dict[str, Any]:
        """What it serves, and the versions that it can go back to, the latest first."""
        previous = [model.version for model in self._previous[arm]]
        return {"arm": arm, **self.models[arm].describe(), "previous": previous}

    def get(self, arm: str) -> LoadedModel:
        return self.models[arm]

    def previous(self, arm: str) -> LoadedModel | None:
        """What the arm served before, still loaded."""
        return self._previous[arm][0] if self._previous[arm] else None

    def flip(self, arm: str, model: LoadedModel) -> None:
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

    def release(self, *models: LoadedModel) -> None:
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
            model.close()

    def _loaded(self) -> list[LoadedModel]:
        return [*self.models.values(), *(model for models in self._previous.values() for model in models)]


async def _retire(model: LoadedModel) -> None:
    await model.served.drain()
    model.close()
    log.info("model closed", extra={"model": model.artifact.manifest.model, "version": model.version})
