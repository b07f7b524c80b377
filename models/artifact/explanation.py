"""What a model attended to, in words: which tensor, what its axes are, and how far to trust it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator

from models.features.field import Group
from models.features.schema import Schema


class Axis(BaseModel):
    """One axis of a tensor. Its labels are known when the model is exported, or each request brings them:

    `along` request: the request itself; candidate: the candidates; behaviour: the T places of the history, newest last,
    of which an explanation keeps those that hold a click; event: the same and then one more, the candidate itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    along: Literal["request", "candidate", "behaviour", "event"] | None = None
    labels: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _has_labels_once(self) -> "Axis":
        if (self.along is None) == (self.labels is None):
            raise ValueError(f"axis {self.name}: its labels are fixed, or along something of the request")
        return self


FLAT: tuple[Group, ...] = ("user", "context", "item")  # all groups but the history
REQUEST = Axis(name="request", along="request")
CANDIDATE = Axis(name="candidate", along="candidate")
BEHAVIOUR = Axis(name="behaviour", along="behaviour")
ATTENDED = Axis(name="attended_behaviour", along="behaviour")
EVENT = Axis(name="event", along="event")
ATTENDED_EVENT = Axis(name="attended_event", along="event")


def numbered(name: str, count: int) -> Axis:
    """An axis of layers, heads or the like, counted from 1."""
    return Axis(name=name, labels=tuple(str(n + 1) for n in range(count)))


def of_fields(schema: Schema, groups: Iterable[Group] = FLAT, *, name: str = "field") -> Axis:
    """The fields of these groups, in the order in which models take them."""
    return Axis(name=name, labels=tuple(field.name for group in groups for field in schema.group(group)))


def of_pairs(schema: Schema, first: Iterable[int], second: Iterable[int]) -> Axis:
    """Pairs of flat fields, each given by its place among them."""
    names = [field.name for group in FLAT for field in schema.group(group)]
    return Axis(name="pair", labels=tuple(f"{names[i]} x {names[j]}" for i, j in zip(first, second, strict=True)))


class Explanation(BaseModel):
    """A tensor that a model shows under `name` (see `models.layers.intermediates`): its axes and what it means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    axes: tuple[Axis, ...]
    meaning: str

    def dims(self, *, history_length: int) -> tuple[str | int, ...]:
        """The tensor's dimensions as its axes promise them: "U" requests, "C" candidates, or fixed."""
        along: Mapping[str | None, str | int] = {
            "request": "U",
            "candidate": "C",
            "behaviour": history_length,
            "event": history_length + 1,
        }
        return tuple(along[axis.along] if axis.labels is None else len(axis.labels) for axis in self.axes)

    def shape(self, *, requests: int, candidates: int, history_length: int) -> tuple[int, ...]:
        """The same where so many requests with so many candidates are scored at once."""
        sizes = {"U": requests, "C": candidates}
        dims = self.dims(history_length=history_length)
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in dims)


LOGIT = Explanation(
    name="logit",
    axes=(CANDIDATE,),
    meaning="The model's own score: calibration, then a sigmoid, make the answered probability of it.",
)
LOOKS = "How each field (a row, which sums to 1) attends to the fields: where it looks, which is not what it adds."
BIAS = Explanation(name="bias", axes=(), meaning="What is added to every logit, whatever the candidate.")


def worded(
    explanation: Explanation,
    values: NDArray[Any],
    *,
    request: str,
    candidates: Sequence[str],
    behaviours: Sequence[str],
) -> dict[str, Any]:
    """One request's tensor as an answer holds it: meaning, axes with a label for every place, and the values.

    `behaviours` are the clicks that the model saw, oldest first. The history is filled from its end, so whatever stands
    before them is padding, and is left out.
    """
    default_labels: Mapping[str | None, Sequence[str]] = {
        "request": [request],
        "candidate": candidates,
        "behaviour": behaviours,
        "event": [*behaviours, "the candidate"],
    }
    axes = []
    for position, axis in enumerate(explanation.axes):
        labels = default_labels[axis.along] if axis.labels is None else axis.labels
        if axis.along in ("behaviour", "event"):
            values = values.take(range(values.shape[position] - len(labels), values.shape[position]), axis=position)
        axes.append({"name": axis.name, "labels": list(labels)})
    return {"meaning": explanation.meaning, "axes": axes, "values": rounded(values)}


def rounded(values: NDArray[Any]) -> NDArray[np.float64]:
    """With seven significant digits, all that a float32 has: as doubles they would be written with seventeen."""
    exact = values.astype(np.float64)
    digits = np.floor(np.log10(np.abs(exact), out=np.zeros_like(exact), where=exact != 0))
    scale = 10.0 ** (6 - digits)
    return np.round(exact * scale) / scale
