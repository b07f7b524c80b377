"""Model registry: the model of each arm, replaced while requests are answered, and those it had before."""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from models.artifact import folder as artifact
from models.artifact.errors import ArtifactError
from service.cancellation import cancel
from service.experiments.assignment import Arm
from service.registry.loader import ModelLoader
from service.scoring.loaded_model import LoadedModel

log = logging.getLogger(__name__)


class ModelRegistry:
    """Every arm's model by the arm's name, in `models`: one assignment there is a swap.

    `keep_versions` models that an arm had before stay loaded, to go back to at once. A model that no arm has any more
    is closed when the last of its requests is answered. All but `read` is for the event loop's thread.
    """

    def __init__(self, loader: ModelLoader, arms: Sequence[Arm], *, keep_versions: int) -> None:
        self.models: dict[str, LoadedModel] = {}
        self.arms = {arm.name: arm for arm in arms}
        self._loader = loader
        self._keep = keep_versions
        self._previous: dict[str, list[LoadedModel]] = {arm.name: [] for arm in arms}  # the latest first
        self._retiring: dict[asyncio.Task[None], LoadedModel] = {}

    @classmethod
    def load(
        cls,
        loader: ModelLoader,
        arms: Sequence[Arm],
        *,
        keep_versions: int = 2,
        versions: Mapping[str, Sequence[str]] | None = None,
    ) -> Self:
        """Takes seconds. `versions` are those of a control document, by arm: the serving one, then the previous.

        Where the serving one is missing or refused, the first that can serve does: a previous one, or the arm's own
        version. Raises ArtifactError, with what was wrong with the first of them, if an arm has none.
        """
        registry = cls(loader, arms, keep_versions=keep_versions)
        for arm in arms:
            serving, *previous = (versions or {}).get(arm.name) or [arm.version]
            model = registry._load_first(arm.name, dict.fromkeys([serving, *previous, arm.version]))
            registry.models[arm.name] = model
            registry._warn_if_exported(arm, model)
            for version in [version for version in previous if version != model.version][:keep_versions]:
                try:
                    registry._previous[arm.name].append(registry.read(arm.name, version))
                except ArtifactError as err:
                    log.warning("no previous version", extra={"arm": arm.name, "version": version, "reason": str(err)})
        return registry

    def _warn_if_exported(self, arm: Arm, serving: LoadedModel) -> None:
        """An operator who exports and restarts hears that this is no decision."""
        try:
            version = artifact.resolve(self.root, arm.model, arm.version).name
        except ArtifactError:
            return
        if version != serving.version:
            details = {"arm": arm.name, "serving": serving.version, "in_file": arm.version, "exported": version}
            log.warning("the control document wins over the exported version", extra=details)

    def _load_first(self, arm: str, versions: Iterable[str]) -> LoadedModel:
        refusal: ArtifactError | None = None
        for version in versions:
            try:
                return self.read(arm, version)
            except ArtifactError as err:
                details = {"arm": arm, "version": version, "reason": str(err)}
                log.error("artifact refused", extra=details)  # noqa: TRY400 - the reason says it all
                refusal = refusal or err
        assert refusal is not None, "an arm has a version"
        raise refusal

    @property
    def root(self) -> Path:
        return self._loader.root

    def read(self, arm: str, version: str) -> LoadedModel:
        """That version for the arm, loaded and verified, or the one that is loaded already. Raises ArtifactError."""
        return self._loader.load(self.arms[arm], version, loaded=self.loaded_models())

    def get(self, arm: str) -> LoadedModel:
        return self.models[arm]

    def previous(self, arm: str) -> LoadedModel | None:
        """What the arm served before, still loaded."""
        return self._previous[arm][0] if self._previous[arm] else None

    def loaded(self, arm: str, version: str) -> LoadedModel | None:
        """That version of the arm's model, if the arm has it still."""
        candidates = (self.models[arm], *self._previous[arm])
        return next((model for model in candidates if model.version == version), None)

    def versions(self) -> dict[str, list[str]]:
        """Of every arm the serving one, then those before, the latest first."""
        return {arm: [m.version for m in (model, *self._previous[arm])] for arm, model in self.models.items()}

    def describe(self, arm: str) -> dict[str, Any]:
        """What it serves, and the versions that stay loaded to go back to, the latest first."""
        previous = [model.version for model in self._previous[arm]]
        return {"arm": arm, **self.models[arm].describe(), "previous": previous}

    def flip(self, arm: str, model: LoadedModel, *, previous: Sequence[str] | None = None) -> None:
        """From now on new requests of the arm get this model; those under way end with theirs.

        Of the versions that the arm had, those that `previous` lists stay loaded, as far as `keep_versions` allows;
        without it all of them.
        """
        before = [self.models[arm], *self._previous[arm]]
        self.models[arm] = model
        others = [other for other in before if other is not model]
        if previous is not None:
            by_version = {other.version: other for other in reversed(others)}
            others = [by_version[version] for version in previous if version in by_version]
        self._previous[arm] = others[: self._keep]
        self.release(*before)

    def release(self, *models: LoadedModel) -> None:
        """Closes those that no arm has, once none of their requests is under way."""
        used = {id(model) for model in self.loaded_models()} | {id(model) for model in self._retiring.values()}
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
        await cancel(*(task for task, _ in late))
        for model in {id(m): m for m in (*self.loaded_models(), *(m for t, m in late if t.cancelled()))}.values():
            model.close()

    def loaded_models(self) -> list[LoadedModel]:
        """Those that serve, and those before them that are kept."""
        return [*self.models.values(), *(model for models in self._previous.values() for model in models)]


async def _retire(model: LoadedModel) -> None:
    await model.served.drain()
    model.close()
    log.info("model closed", extra={"model": model.name, "version": model.version})
