"""What can be changed while the service runs: first prepared, which may refuse, then made in one step."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from models.artifact.folder import CURRENT
from service.errors import FieldError, InvalidValue, NoSuchVersion, NotFound, pointer, shown
from service.experiments.assignment import ExperimentError, Running
from service.observability.metrics import Metrics
from service.registry.registry import Catalog
from service.registry.warmup import Swap
from service.scoring.loaded_model import LoadedModel

log = logging.getLogger(__name__)

Share = float


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """The arm gets that version of its model."""

    arm: str
    version: str = CURRENT


class Rollback(msgspec.Struct, frozen=True, kw_only=True, tag="rollback"):
    """The arm gets the version back that it served before, and where one is named only that one."""

    arm: str
    version: str | None = None


class Reshare(msgspec.Struct, frozen=True, kw_only=True, tag="reshare"):
    """The experiment gets other shares; who is not named keeps its own."""

    experiment: str
    shares: dict[str, Share] = {}
    shadow: dict[str, Share] = {}


Change = Load | Rollback | Reshare


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What serves: of every arm its version and those before, the latest first, and the shares, now and until when."""

    versions: dict[str, list[str]]
    shares: dict[str, Share]
    shadow: dict[str, Share]
    before: list[tuple[float, dict[str, Share]]] = []


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A change that nothing can stop any more. One of the two is to be called; neither takes time."""

    change: Change  # in words that mean the same in every process
    commit: Callable[[], None]
    discard: Callable[[], None] = lambda: None


class Changes:
    """The changes of this process. They are prepared one at a time: whoever calls sees to it."""

    def __init__(self, *, running: Running, catalog: Catalog, swap: Swap, metrics: Metrics) -> None:
        self._running = running
        self._catalog = catalog
        self._swap = swap
        self._metrics = metrics

    def state(self) -> State:
        now = self._running.now
        return State(
            versions=self._catalog.versions(),
            shares={arm.name: arm.share for arm in now.arms},
            shadow={arm.name: arm.share for arm in now.shadow},
            before=[(until, {arm.name: arm.share for arm in ran.arms}) for until, ran in self._running.past],
        )

    async def prepare(self, change: Change) -> Prepared:
        """Raises Problem: 404 for an arm or experiment that is none, 422 or 409 with the reason for what cannot be."""
        match change:
            case Load():
                self._check_arm(change.arm)
                model = await self._swap.prepare(change.arm, change.version)
                return self._flip(change.arm, model)
            case Rollback():
                return self._rollback(change)
            case Reshare():
                return self._reshare(change)

    async def catch_up(self, state: State) -> None:
        """Makes what serves elsewhere serve here. Raises Problem where an artifact is gone meanwhile."""
        for arm, (serving, *_) in state.versions.items():
            if self._catalog.models[arm].version != serving:
                (await self.prepare(Load(arm=arm, version=serving))).commit()
        own = self._running.now
        before = [(until, own.with_shares(shares=shares, shadow={})) for until, shares in state.before]
        self._running.take_over(own.with_shares(shares=state.shares, shadow=state.shadow), before)

    def _flip(self, arm: str, model: LoadedModel) -> Prepared:
        def commit() -> None:
            before = self._catalog.models[arm]
            self._catalog.flip(arm, model)
            self._tell(arm, before)

        load = Load(arm=arm, version=model.version)
        return Prepared(change=load, commit=commit, discard=lambda: self._catalog.release(model))

    def _rollback(self, change: Rollback) -> Prepared:
        self._check_arm(change.arm)
        previous = self._catalog.previous(change.arm)
        if previous is None:
            raise NoSuchVersion(f"{change.arm} has no previous version that is still loaded")
        if change.version not in (None, previous.version):  # a process that started later may lack one
            told = f"one process would go back to {previous.version}, not to {change.version}: load one of them"
            raise NoSuchVersion(f"{change.arm}: {told}")

        def commit() -> None:
            before = self._catalog.models[change.arm]
            self._catalog.roll_back(change.arm)
            self._tell(change.arm, before)

        return Prepared(change=Rollback(arm=change.arm, version=previous.version), commit=commit)

    def _tell(self, arm: str, before: LoadedModel) -> None:
        """Logs and metrics of a swap: the new one's series comes before the old one's goes."""
        now = self._catalog.models[arm]
        if now is before:
            return
        model = now.artifact.manifest.model
        self._metrics.model_serves(arm=arm, model=model, version=now.version)
        if now.version != before.version:
            self._metrics.model_stops(arm=arm, model=model, version=before.version)
        log.info("model swapped", extra={"arm": arm, "model": model, "version": now.version, "was": before.version})

    def _reshare(self, change: Reshare) -> Prepared:
        now = self._running.now
        if change.experiment != now.name:
            raise NotFound(f"there is no experiment {shown(change.experiment)}; {now.name} runs")
        for part, names, given in (
            ("shares", {arm.name for arm in now.arms}, change.shares),
            ("shadow", {arm.name for arm in now.shadow}, change.shadow),
        ):
            _check_names(part, names, given)
        try:
            after = now.with_shares(shares=change.shares, shadow=change.shadow)
        except ExperimentError as err:
            raise InvalidValue([FieldError(pointer="", expected="shares that fit together", got=str(err))]) from None

        def commit() -> None:
            self._running.change(after)
            state = self.state()
            log.info("shares changed", extra={"experiment": now.name, "shares": state.shares, "shadow": state.shadow})

        return Prepared(change=change, commit=commit)

    def _check_arm(self, arm: str) -> None:
        if arm not in self._catalog.arms:
            raise NotFound(f"there is no arm {shown(arm)}; there are {', '.join(self._catalog.arms)}")


def _check_names(part: str, names: set[str], given: Mapping[str, Share]) -> None:
    known = f"one of {', '.join(sorted(names))}" if names else "nothing: there are none"
    errors = [
        FieldError(pointer=pointer(part, name), expected=known, got=shown(name)) for name in given if name not in names
    ]
    if errors:
        raise InvalidValue(errors)
