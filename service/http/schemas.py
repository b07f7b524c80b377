"""The JSON shapes of /predict and /explain: what comes in, what goes out, and how /docs shows them."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Annotated, Any, cast

import msgspec
from msgspec import Meta, Struct

from models.features.history import Event
from service.errors import FieldError, InvalidValue, pointer, shown
from service.ids import MAX_ID_LENGTH, Id, Time, canonical_id, is_id
from service.scoring.explainer import Explained
from service.scoring.pending_score import Scored
from service.scoring.request import Candidates, ScoringRequest

Features = dict[str, Any]  # what a value may be, the arm's schema says


class User(Struct, frozen=True, forbid_unknown_fields=True):
    id: Id | None = None
    features: Features | None = None


# An object or null, decoded only where its candidate is not cached (scoring/candidate_cache.py).
Unread = Annotated[msgspec.Raw, Meta(extra_json_schema=msgspec.json.schema(Features | None))]


class Candidate(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    id: Id
    features: Unread | msgspec.UnsetType = msgspec.UNSET


class Behaviour(Struct, frozen=True, forbid_unknown_fields=True):
    item: Id
    ts: Time
    features: Features | None = None
    context: Features | None = None


class PredictRequest(Struct, frozen=True, forbid_unknown_fields=True):
    """The candidates are a list of objects, or columns of one length of which `id` is one."""

    candidates: list[Candidate] | dict[str, list[Any]]
    request_id: Id | None = None
    ts: Time | None = None
    user: User | None = None
    context: Features | None = None
    behaviours: list[Behaviour] | None = None
    timeout_ms: Annotated[float, Meta(gt=0, le=60_000)] | None = None
    explain: bool | None = None


class Prediction(Struct, frozen=True):
    id: str | int
    ctr: float


class Columns(Struct, frozen=True):
    id: list[str | int]
    ctr: list[float]


class PredictAnswer(Struct, frozen=True):
    request_id: str | int
    experiment: str
    arm: str
    model: str
    version: str
    predictions: list[Prediction] | Columns
    degraded: Sequence[str]


class Axis(Struct, frozen=True):
    """One axis of `values`: a label for every place along it."""

    name: str
    labels: list[str]


class Explanation(Struct, frozen=True):
    """`values` are lists nested as deep as there are axes, the first axis outermost; without axes, a number."""

    meaning: str
    axes: list[Axis]
    values: list[Any] | float


class ExplainAnswer(PredictAnswer, frozen=True):
    explanations: dict[str, Explanation]


def scoring_request(request: PredictRequest, *, now: float, max_candidates: int) -> ScoringRequest:
    """The request without its HTTP form. Raises InvalidValue for candidates that are none, too many or ragged."""
    user = request.user or User()
    return ScoringRequest(
        user=None if user.id is None else canonical_id(user.id),
        user_features=user.features or {},
        context=request.context or {},
        ts=now if request.ts is None else request.ts,
        behaviours=None if request.behaviours is None else [_event(b) for b in request.behaviours],
        candidates=_candidates(request.candidates, max_candidates),
    )


def answer(request: PredictRequest, scored: Scored) -> bytes:
    """The answer in the candidates' own form, with their ids as they were sent."""
    return _ENCODER.encode(_answer(request, scored))


def explained(request: PredictRequest, explained: Explained) -> bytes:
    """The same, with the explanations, which are JSON already."""
    fields = msgspec.structs.asdict(_answer(request, explained.scored))
    return msgspec.json.encode({**fields, "explanations": explained.explanations})


_ENCODER = msgspec.json.Encoder()
_ID, _FEATURES = attrgetter("id"), attrgetter("features")


def _answer(request: PredictRequest, scored: Scored) -> PredictAnswer:
    ctr: list[float] = scored.ctr.tolist()
    sent = request.candidates
    predictions: list[Prediction] | Columns
    if isinstance(sent, dict):
        predictions = Columns(id=sent["id"], ctr=ctr)
    else:
        predictions = list(map(Prediction, map(_ID, sent), ctr))
    return PredictAnswer(
        request_id=scored.request_id,
        experiment=scored.experiment,
        arm=scored.arm,
        model=scored.model,
        version=scored.version,
        predictions=predictions,
        degraded=scored.degraded,
    )


def _candidates(sent: list[Candidate] | dict[str, list[Any]], limit: int) -> Candidates:
    ids = sent.get("id") if isinstance(sent, dict) else list(map(_ID, sent))
    if ids is None:
        raise InvalidValue([FieldError(pointer="/candidates/id", expected="a list of ids", got="nothing")])
    if not 0 < len(ids) <= limit:
        raise InvalidValue([FieldError(pointer="/candidates", expected=f"1 to {limit} candidates", got=str(len(ids)))])
    if isinstance(sent, dict):
        return Candidates(ids=_checked_ids(sent, len(ids)), features=None, columns=sent)
    return Candidates(ids=_all_spelled(ids), features=list(map(_FEATURES, sent)), columns=None)


def _all_spelled(ids: list[str | int]) -> list[str]:
    if set(map(type, ids)) == _STRINGS:  # nearly always, and a call for each costs what all else here does
        return cast("list[str]", ids)
    return list(map(canonical_id, ids))


_STRINGS = {str}


def _checked_ids(columns: dict[str, list[Any]], num_rows: int) -> list[str]:
    """The column of ids as everything behind the routes spells them. Raises InvalidValue for ragged or bad columns."""
    if "features" in columns:
        raise InvalidValue([_FEATURES_COLUMN])
    for name, column in columns.items():
        if len(column) != num_rows:
            at, values = pointer("candidates", name), f"{num_rows} values, as of id"
            raise InvalidValue([FieldError(pointer=at, expected=values, got=str(len(column)))])
    ids = columns["id"]
    if _are_good_strings(ids):
        return ids
    for row, value in enumerate(ids):
        if not is_id(value):
            at = pointer("candidates", "id", row)
            raise InvalidValue([FieldError(pointer=at, expected=_AN_ID, got=shown(value))])
    return _all_spelled(ids)


_AN_ID = f"a string of 1 to {MAX_ID_LENGTH} characters or an integer"
_FEATURES_COLUMN = FieldError(
    pointer="/candidates/features",
    expected='a column for each feature beside `id`, such as {"id": [...], "price": [...]}',
    got="a column `features`",
)


def _are_good_strings(ids: list[Any]) -> bool:
    """Told without a step of Python for each; ids of other types are looked at one by one."""
    if set(map(type, ids)) != _STRINGS:
        return False
    lengths = set(map(len, ids))
    return min(lengths) > 0 and max(lengths) <= MAX_ID_LENGTH


def _event(behaviour: Behaviour) -> Event:
    return Event(
        item=canonical_id(behaviour.item),
        ts=behaviour.ts,
        features=behaviour.features or {},
        context=behaviour.context or {},
    )
