"""Control follower: makes this worker serve what the control document in the store says, within a second."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from service.cancellation import cancel
from service.errors import Refusal
from service.experiments.assignment import Experiment, ExperimentError, Running
from service.observability.metrics import Metrics
from service.registry import control
from service.registry.local_copy import LocalCopy
from service.registry.registry import ModelRegistry
from service.scoring.loaded_model import LoadedModel
from service.store.control_store import ControlDocument, ControlStore
from service.store.feature_store import StoreUnavailable

log = logging.getLogger(__name__)

POLL_S = 0.3
WRITE_S = 5.0  # for the local copy, when the service stops
RETRY_S = 30.0  # a version that was refused is tried again: its files may have been copied here meanwhile


class Warmer(Protocol):
    async def prepare(self, arm: str, version: str) -> LoadedModel:
        """The version, verified and warm. Raises Refusal for one that must not serve."""


@dataclass(frozen=True, kw_only=True)
class RefusedVersion:
    """A model version that this worker could not serve."""

    version: str
    detail: str
    retry_at: float  # monotonic


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """What a worker found when it started: the document to begin with, and the one that the store holds.

    They differ where the store cannot be reached, lost its data, or holds the document of other arms.
    """

    document: ControlDocument | None
    stored: ControlDocument | None


async def find_start(store: ControlStore, local_copy: LocalCopy | None, experiment: Experiment) -> StartingPoint:
    """The store's document if it is of this experiment's arms, else the local copy if that is, else none."""
    try:
        stored = await store.read()
    except StoreUnavailable as err:
        log.warning("starting without the control document", extra={"reason": str(err)})
        stored = None
    fingerprint = control.fingerprint(experiment)
    if stored is not None and stored.fingerprint == fingerprint:
        _log_differences(stored, experiment)
        return StartingPoint(document=stored, stored=stored)
    copy = None if local_copy is None or stored is not None else await asyncio.to_thread(local_copy.read)
    if copy is not None and copy.fingerprint == fingerprint:
        log.warning("serving from the local copy", extra={"version": copy.version, "changed_by": copy.changed_by})
        _log_differences(copy, experiment)
        return StartingPoint(document=copy, stored=stored)
    return StartingPoint(document=None, stored=stored)


def _log_differences(document: ControlDocument, experiment: Experiment) -> None:
    """An operator who has edited the file's shares hears that they are not what counts."""
    state = document.state
    in_file = {arm.name: arm.share for arm in experiment.served}
    decided = {**state.shares, **state.shadow}
    if (in_file, sorted(experiment.killed)) != (decided, state.killed):
        details = {"version": document.version, "shares": decided, "killed": state.killed, "shares_in_file": in_file}
        log.warning("the control document wins over the experiment file", extra=details)


class ControlFollower:
    """Follows one store. `document` is what this worker serves, but for the models that it still loads or refuses.

    Shares and kills count at once, and so does a model that is loaded already. Another one is loaded, verified and
    warmed in the background first; one that is refused leaves the old one serving, and `describe` says so.
    """

    def __init__(
        self,
        *,
        store: ControlStore,
        experiment: Experiment,
        running: Running,
        registry: ModelRegistry,
        warmer: Warmer,
        metrics: Metrics,
        local_copy: LocalCopy | None = None,
        poll_s: float = POLL_S,
    ) -> None:
        self._store = store
        self._experiment = experiment
        self._fingerprint = control.fingerprint(experiment)
        self._running = running
        self._registry = registry
        self._warmer = warmer
        self._metrics = metrics
        self._local_copy = local_copy
        self._poll_s = poll_s
        self._jitter = random.Random()
        self._document: ControlDocument | None = None
        self._joined = False
        self._refused: dict[str, RefusedVersion] = {}
        self._loading: asyncio.Task[None] | None = None
        self._writing: asyncio.Task[None] | None = None
        self._copied: ControlDocument | None = None
        self._store_failure: str | None = None
        self._other_version: int | None = None

    @property
    def document(self) -> ControlDocument:
        assert self._document is not None, "it follows once it has joined"
        return self._document

    async def join(self, start: StartingPoint) -> None:
        """Begins with what was found at the start, and writes it where the store has nothing to follow.

        Returns when what the store says is served here, as far as it can be.
        """
        version = 1 if start.stored is None else start.stored.version + 1
        models = self._registry.versions()
        self.adopt(start.document or control.begin(self._experiment, models, version=version))
        await self.poll()
        await self.settled()

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Polls while it is open. A load under way ends with it; a write of the local copy is waited for."""
        polling = asyncio.create_task(self._poll_for_ever())
        try:
            yield
        finally:
            await cancel(polling)  # first: it begins what follows
            if self._loading is not None:
                await cancel(self._loading)
            if self._writing is not None:
                await asyncio.wait([self._writing], timeout=WRITE_S)
                await cancel(self._writing)

    async def _poll_for_ever(self) -> None:
        while True:
            # With jitter, or workers that were started together would ask together for ever.
            await asyncio.sleep(self._poll_s * self._jitter.uniform(0.8, 1.2))
            try:
                await self.poll()
            except Exception:  # whatever it was, a worker that follows no more would never hear of a kill
                log.exception("control poll failed")

    async def poll(self) -> None:
        """Looks once what the store says, and follows. A store without an answer that can be used changes nothing."""
        self._retry_refused()
        try:
            if await self._store.revision() != self.document.revision:
                await self._follow(await self._store.read())
            else:
                self._other_version = None
        except (StoreUnavailable, ExperimentError) as err:
            if self._store_failure is None:
                log.warning("control store unavailable", extra={"reason": str(err), "version": self.document.version})
            self._store_failure = str(err)
        else:
            if self._store_failure is not None:
                log.info("control store back", extra={"version": self.document.version})
            self._store_failure = None
            self._joined = True

    async def _follow(self, stored: ControlDocument | None) -> None:
        mine = self.document
        if stored is not None and stored.fingerprint != self._fingerprint:
            if self._joined:
                self._note_other(stored)
                return
            # Whoever starts with another experiment file begins anew: an operator has decided that.
            log.warning("the experiment file begins a new control document", extra={"replaced": stored.version})
            mine = control.renumbered(mine, above=stored.version)
        elif stored is not None and control.supersedes(stored, mine):
            self.adopt(stored)
            return
        # From here on the store has less than this worker knows: it is new, or lost data.
        if await self._store.replace(mine, expected=stored):
            log.info("control document written", extra={"version": mine.version, "changed_by": mine.changed_by})
            self.adopt(mine)
        elif (now := await self._store.read()) is not None and now.fingerprint == self._fingerprint:
            self.adopt(now)  # another worker was first

    def adopt(self, document: ControlDocument, warmed: Mapping[str, LoadedModel] | None = None) -> None:
        """Serves what the document says from now on, with models by arm that are warm already. Takes no time.

        A document that the one followed here supersedes is passed over, and so are its models.
        """
        warmed = warmed or {}
        if self._document is None or control.supersedes(document, self._document):
            self._running.replace(*control.running(document, self._experiment))
            self._document = document
            self._other_version = None
            self._refused.clear()  # an operator may have mended what was wrong
            self._metrics.control_version.set(document.version)
            state = document.state
            details = {"version": document.version, "changed_by": document.changed_by, "killed": state.killed}
            log.info("control document followed", extra={**details, "shares": state.shares, "shadow": state.shadow})
        for arm in self._registry.models:
            target = self.target(arm)
            candidates = (warmed.get(arm), self._registry.loaded(arm, target))
            model = next((model for model in candidates if model is not None and model.version == target), None)
            if model is not None:
                self._flip(arm, model)
        for model in warmed.values():
            self._registry.release(model)  # which keeps those that serve
        self._start_loading()
        self._start_writing()

    def target(self, arm: str) -> str:
        """The version that the arm should serve."""
        return self.document.state.models[arm][0]

    async def settled(self) -> None:
        """Returns when nothing is being loaded for the document, nor written to the local copy."""
        while tasks := [task for task in (self._loading, self._writing) if task is not None and not task.done()]:
            await asyncio.wait(tasks)

    def describe(self) -> dict[str, Any]:
        """What /readyz says of it: the version followed here, what serves, and what is amiss."""
        described: dict[str, Any] = {
            "version": self.document.version,
            "changed_by": self.document.changed_by,
            "changed_at": self.document.changed_at,
            "models": {arm: self._describe_versions(arm) for arm in self._registry.models},
        }
        if self._store_failure is not None:
            described["store"] = self._store_failure
        if self._other_version is not None:
            described["not_followed"] = f"version {self._other_version} in the store is of another experiment file"
        return described

    def describe_arm(self, arm: str) -> dict[str, Any]:
        """What /models says of it."""
        return {
            **self._registry.describe(arm),
            **self._describe_versions(arm),
            "control_version": self.document.version,
        }

    def describe_experiment(self) -> dict[str, Any]:
        """What /experiments says of it."""
        document = self.document
        made = {"version": document.version, "changed_by": document.changed_by, "changed_at": document.changed_at}
        return {**self._running.now.describe(), **made}

    def _describe_versions(self, arm: str) -> dict[str, str]:
        serving, target = self._registry.models[arm].version, self.target(arm)
        described = {"version": serving}
        if target != serving:
            refusal = self._refused.get(arm)
            described["target"] = target
            described |= {"loading": "under way"} if refusal is None else {"refused": refusal.detail}
        return described

    def _flip(self, arm: str, model: LoadedModel) -> None:
        before = self._registry.models[arm]
        self._registry.flip(arm, model, previous=self.document.state.models[arm][1:])
        self._refused.pop(arm, None)
        if model is before:
            return
        name = model.artifact.manifest.model
        # The new one's series comes before the old one's goes.
        self._metrics.model_serves(arm=arm, model=name, version=model.version)
        if model.version != before.version:
            self._metrics.model_stops(arm=arm, model=name, version=before.version)
        log.info("model swapped", extra={"arm": arm, "model": name, "version": model.version, "was": before.version})

    def _start_loading(self) -> None:
        if self._missing() is not None and (self._loading is None or self._loading.done()):
            self._loading = asyncio.create_task(self._load_missing())

    def _missing(self) -> tuple[str, str] | None:
        """An arm, and the version that it should serve and does not; not one that was refused here."""
        for arm, model in self._registry.models.items():
            target, refusal = self.target(arm), self._refused.get(arm)
            if model.version != target and (refusal is None or refusal.version != target):
                return arm, target
        return None

    async def _load_missing(self) -> None:
        """Until nothing is missing: the document may change meanwhile, which this never holds up."""
        while (missing := self._missing()) is not None:
            arm, version = missing
            try:
                model = await self._warmer.prepare(arm, version)
            except Refusal as problem:
                self._refuse(arm, version, problem.detail)
            except Exception as err:  # the old model serves on, and an operator is told
                log.exception("model not loaded", extra={"arm": arm, "version": version})
                self._refuse(arm, version, f"it could not be loaded: {err!r}")
            else:
                if self.target(arm) == version:
                    self._flip(arm, model)
                self._registry.release(model)  # which keeps one that serves

    def _refuse(self, arm: str, version: str, detail: str) -> None:
        log.error("control document not followed", extra={"arm": arm, "version": version, "reason": detail})
        self._refused[arm] = RefusedVersion(version=version, detail=detail, retry_at=time.monotonic() + RETRY_S)

    def _retry_refused(self) -> None:
        now = time.monotonic()
        for arm in [arm for arm, refusal in self._refused.items() if now >= refusal.retry_at]:
            del self._refused[arm]
        self._start_loading()

    def _note_other(self, stored: ControlDocument) -> None:
        if self._other_version != stored.version:
            details = {"version": stored.version, "serving": self.document.version, "changed_by": stored.changed_by}
            log.error("control document of another experiment file", extra=details)
        self._other_version = stored.version

    def _start_writing(self) -> None:
        if self._local_copy is not None and (self._writing is None or self._writing.done()):
            self._writing = asyncio.create_task(self._write(self._local_copy))

    async def _write(self, local_copy: LocalCopy) -> None:
        """On a thread: a disk that hangs must not hold up a request."""
        while self._copied is not self.document:
            document = self.document
            await asyncio.to_thread(local_copy.write, document)
            self._copied = document
