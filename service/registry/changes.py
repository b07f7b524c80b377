"""Operators' changes of what should serve: each is checked here, then written to the store by compare-and-set."""

import asyncio
from collections.abc import Set as AbstractSet

from models.artifact.folder import CURRENT
from service.errors import Problem, artifact_refused, busy_changing, no_such_version, not_found, shown, version_mismatch
from service.experiments.assignment import Experiment
from service.registry import control
from service.registry.control import Edit
from service.registry.follower import ControlFollower, Warmer
from service.registry.registry import ModelRegistry
from service.scoring.loaded_model import LoadedModel
from service.store.control_store import ControlDocument, ControlStore

MAX_TRIES = 100  # of a change that others always come before

Versions = AbstractSet[int] | None
"""Control versions one of which a change expects; None for any."""


class Changes:
    """Every method returns when this worker serves what was asked for; the others follow within a second.

    Each raises StoreUnavailable, with the change possibly made, where the store does not answer, and Problem: 412 where
    the document is of none of the `expected` versions, 409 where it is of another experiment file.
    """

    def __init__(
        self,
        *,
        store: ControlStore,
        follower: ControlFollower,
        experiment: Experiment,
        registry: ModelRegistry,
        warmer: Warmer,
    ) -> None:
        self._store = store
        self._follower = follower
        self._experiment = experiment
        self._fingerprint = control.fingerprint(experiment)
        self._registry = registry
        self._warmer = warmer

    async def set_shares(self, edit: Edit, *, changed_by: str, expected: Versions = None) -> None:
        """Raises Problem: 422 for shares that do not fit together."""
        self._follower.adopt(await self._write(edit, changed_by=changed_by, expected=expected))

    async def load(self, arm: str, version: str = CURRENT, *, changed_by: str, expected: Versions = None) -> None:
        """The arm gets that version of its model, which is verified and warmed here first.

        Raises Problem: 404 for an arm that does not exist, 422 for such a version, 409 for one that must not serve.
        """
        self._check_arm(arm)
        _check_version(await self._read(), expected)  # before seconds of work that would be for nothing
        await self._serve(arm, await self._warmer.prepare(arm, version), None, changed_by=changed_by, expected=expected)

    async def roll_back(self, arm: str, *, changed_by: str, expected: Versions = None) -> None:
        """The arm gets the version back that it served before. What served is given up: a load brings it back.

        Raises Problem: 404 for an arm that does not exist, 422 where there is no version before, 409 where that one is
        no longer loaded and must not serve.
        """
        self._check_arm(arm)
        document = await self._read()
        _check_version(document, expected)
        _, *previous = document.state.models[arm]
        if not previous:
            raise no_such_version(f"{arm} has no previous version")
        edit = control.roll_back(arm, previous[0])
        if self._registry.loaded(arm, previous[0]) is not None:
            self._follower.adopt(await self._write(edit, changed_by=changed_by, expected=expected))
        else:
            model = await self._warmer.prepare(arm, previous[0])
            await self._serve(arm, model, edit, changed_by=changed_by, expected=expected)

    async def _serve(
        self, arm: str, model: LoadedModel, edit: Edit | None, *, changed_by: str, expected: Versions
    ) -> None:
        """Writes the change for a model that is warm, and flips to it here. `edit` is by default a load's."""
        edit = edit or control.set_version(arm, model.version)
        try:
            self._check_files(arm, model)
            document = await self._write(edit, changed_by=changed_by, expected=expected)
        except BaseException:
            self._registry.release(model)
            raise
        self._follower.adopt(document, {arm: model})

    def _check_files(self, arm: str, model: LoadedModel) -> None:
        """A version is one artifact for ever: the other workers would see nothing to load."""
        serving = self._registry.models[arm]
        if model.version == serving.version and model is not serving:
            reason = "its files are not those that serve under this version; export it as another one"
            raise artifact_refused(f"{model.artifact.path}: {reason}")

    async def _write(self, edit: Edit, *, changed_by: str, expected: Versions) -> ControlDocument:
        """The document with the change in it: a new version, or the one there is where nothing changes."""
        for _ in range(MAX_TRIES):
            before = await self._read()
            _check_version(before, expected)
            after = control.change(before, edit, changed_by=changed_by)
            if after is None or await self._store.replace(after, expected=before):
                return after or before
            await asyncio.sleep(0)
        raise busy_changing(f"{MAX_TRIES} other changes came before this one; try again")

    async def _read(self) -> ControlDocument:
        stored = await self._store.read()
        if stored is None:  # it lost its data
            await self._follower.poll()
            stored = await self._store.read() or self._follower.document
        if stored.fingerprint != self._fingerprint:
            details = f"version {stored.version} of the control document is of another experiment file"
            raise Problem(409, f"{details} than this worker's, which follows it no more", reason="other_experiment")
        return stored

    def _check_arm(self, arm: str) -> None:
        if arm not in self._registry.arms:
            raise not_found(f"there is no arm {shown(arm)}; there are {', '.join(self._registry.arms)}")


def check_experiment(name: str, experiment: Experiment) -> None:
    """Raises Problem: 404."""
    if name != experiment.name:
        raise not_found(f"there is no experiment {shown(name)}; {experiment.name} runs")


def _check_version(document: ControlDocument, expected: Versions) -> None:
    if expected is not None and document.version not in expected:
        raise version_mismatch(document.version)
