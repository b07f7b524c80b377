"""What a control document means for an experiment: how one begins, which changes it can take, who may follow it."""

import hashlib
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping

import msgspec

from service.errors import Conflict, FieldError, InvalidValue, pointer, shown
from service.experiments.assignment import LOOK_BACK_S, SUM_TOLERANCE, Experiment, ExperimentError
from service.store.control_store import ControlDocument, ControlState, PastShares

MAX_PREVIOUS = 10  # versions of an arm to roll back to
MAX_PAST = 100  # changes of shares of the last day
FILE = "experiment file"  # who made the first version of a document

Edit = Callable[[ControlState], ControlState]
"""A change of the state. Raises Refusal for one that cannot be."""


def fingerprint(experiment: Experiment) -> str:
    """Of all that a document relies on: the name, the salt and the arms, but not their shares, which it replaces.

    Neither what runs an arm: one host may have a GPU and another none.
    """
    arms = [[(arm.name, arm.model, arm.version) for arm in part] for part in (experiment.arms, experiment.shadow)]
    return hashlib.sha256(msgspec.json.encode([experiment.name, experiment.salt, arms])).hexdigest()[:16]


def begin(experiment: Experiment, models: Mapping[str, list[str]], *, version: int) -> ControlDocument:
    """The document of an experiment that runs as its file says, with the model versions that were loaded for it."""
    state = ControlState(
        shares={arm.name: arm.share for arm in experiment.arms},
        shadow={arm.name: arm.share for arm in experiment.shadow},
        killed=list(experiment.killed),
        models={arm: list(versions) for arm, versions in models.items()},
    )
    return ControlDocument(
        version=version,
        revision=_revision(),
        experiment=experiment.name,
        fingerprint=fingerprint(experiment),
        state=state,
        past=[],
        changed_by=FILE,
        changed_at=time.time(),
    )


def change(document: ControlDocument, edit: Edit, *, changed_by: str) -> ControlDocument | None:
    """The next version of a document; None where the edit changes nothing."""
    before, after = document.state, edit(document.state)
    if after == before:
        return None
    now = max(time.time(), document.changed_at)  # another host's clock may be ahead, and later versions are later
    past = [shares for shares in document.past if shares.until > now - LOOK_BACK_S]
    if (after.shares, after.killed) != (before.shares, before.killed):
        past.append(PastShares(until=now, shares=before.shares, killed=before.killed))
    return msgspec.structs.replace(
        document,
        version=document.version + 1,
        revision=_revision(),
        state=after,
        past=past[-MAX_PAST:],
        changed_by=changed_by,
        changed_at=now,
    )


def renumbered(document: ControlDocument, *, above: int) -> ControlDocument:
    """The same decision with a version above that one; as it is where it has one already."""
    if document.version > above:
        return document
    return msgspec.structs.replace(document, version=above + 1, revision=_revision())


def running(document: ControlDocument, experiment: Experiment) -> tuple[Experiment, list[tuple[float, Experiment]]]:
    """The experiment as the document has it, now and before; each of the past ones with the time it ended.

    Raises ExperimentError for a document that means nothing for these arms.
    """
    state = document.state
    if unnamed := [arm.name for arm in experiment.served if not state.models.get(arm.name)]:
        raise ExperimentError(f"control document: models has no version of {', '.join(unnamed)}")
    now = experiment.with_shares(shares=state.shares, shadow=state.shadow, killed=state.killed)
    shadows = {arm.name for arm in experiment.shadow}
    return now, [
        # Shadow arms count no events.
        (past.until, experiment.with_shares(shares=past.shares, shadow={}, killed=set(past.killed) - shadows))
        for past in document.past
    ]


def supersedes(document: ControlDocument, other: ControlDocument) -> bool:
    """Whether a document that the store holds takes the place of another that it held.

    A lower version is in a store that lost its latest data, or was emptied and begun anew: the later decision counts.
    """
    if document.revision == other.revision:
        return False
    if document.version < other.version:
        return document.changed_at > other.changed_at
    return True


def set_shares(
    experiment: Experiment,
    *,
    shares: Mapping[str, float],
    shadow: Mapping[str, float],
    kill: Iterable[str],
    unkill: Iterable[str],
) -> Edit:
    """Other shares, and arms killed and brought back; an arm that is not named stays as it is."""
    kill, unkill = list(kill), list(unkill)
    arms, shadows = [arm.name for arm in experiment.arms], [arm.name for arm in experiment.shadow]
    errors = [
        FieldError(pointer=pointer(part, at), expected=_one_of(names), got=shown(name))
        for part, names, entries in (
            ("shares", arms, [(name, name) for name in shares]),
            ("shadow", shadows, [(name, name) for name in shadow]),
            ("kill", [*arms, *shadows], list(enumerate(kill))),
            ("unkill", [*arms, *shadows], list(enumerate(unkill))),
        )
        for at, name in entries
        if name not in names
    ]
    errors += [
        FieldError(pointer=pointer("unkill", position), expected="an arm that /kill does not name", got=shown(name))
        for position, name in enumerate(unkill)
        if name in kill
    ]
    if errors:
        raise InvalidValue(errors)

    def edit(state: ControlState) -> ControlState:
        after = msgspec.structs.replace(
            state,
            shares={**state.shares, **shares},
            shadow={**state.shadow, **shadow},
            killed=sorted(set(state.killed) - set(unkill) | set(kill)),
        )
        total = math.fsum(after.shares.values())
        if abs(total - 100) > SUM_TOLERANCE:
            listed = ", ".join(f"{name} {share:g}" for name, share in after.shares.items())
            expected = "shares in percent that sum to 100"
            raise InvalidValue(
                [FieldError(pointer="/shares", expected=expected, got=f"a sum of {total:.10g} ({listed})")]
            )
        try:
            experiment.with_shares(shares=after.shares, shadow=after.shadow, killed=after.killed)
        except ExperimentError as err:
            raise InvalidValue(
                [FieldError(pointer="/kill", expected="an arm left that answers", got=str(err))]
            ) from None
        return after

    return edit


def set_version(arm: str, version: str) -> Edit:
    """The arm gets that version of its model; the one it had is the first to roll back to."""

    def edit(state: ControlState) -> ControlState:
        serving = state.models[arm]
        if serving[0] == version:
            return state
        previous = [other for other in serving if other != version]
        return _with_models(state, arm, [version, *previous[:MAX_PREVIOUS]])

    return edit


def roll_back(arm: str, version: str) -> Edit:
    """The arm goes back to the version before, which the caller names: another one may have come between."""

    def edit(state: ControlState) -> ControlState:
        previous = state.models[arm][1:]
        if previous[:1] != [version]:
            now = f"{previous[0]} by now" if previous else "none by now"
            raise Conflict(f"{arm}: the version before is not {version} but {now}; try again")
        return _with_models(state, arm, previous)

    return edit


def _with_models(state: ControlState, arm: str, versions: list[str]) -> ControlState:
    return msgspec.structs.replace(state, models={**state.models, arm: versions})


def _one_of(names: list[str]) -> str:
    return f"one of {', '.join(sorted(names))}" if names else "nothing: there are none"


def _revision() -> str:
    return secrets.token_hex(8)
