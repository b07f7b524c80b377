"""One field of a schema: its kind, its group, what it learnt from the training part, and the arrays it becomes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic import Field as Setting

from models.features.values import Discretise, Transform

PAD = 0  # absent, or a position that holds nothing: the zero vector, never trained


OOV = 1  # present, but not seen (often enough) in training


FIRST = 2  # the id of a vocabulary's first value


Kind = Literal["categorical", "numeric", "multi", "time", "sequence"]


Group = Literal["user", "context", "item", "behaviour"]


Part = Literal["hour", "weekday", "day", "month"]


PREFIX: Mapping[Group, str] = {"user": "user", "context": "ctx", "behaviour": "hist", "item": "item"}


PARTS: Mapping[Part, int] = {"hour": 24, "weekday": 7, "day": 31, "month": 12}


class FieldSpec(BaseModel):
    """One field as a person declares it, before fitting."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Setting(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    kind: Kind
    group: Group
    min_count: int = Setting(default=1, ge=1, description="rarer values are treated as never seen (OOV)")
    max_values: int | None = Setting(default=None, ge=1, description="multi: values kept per row; default: most seen")
    part: Part | None = Setting(default=None, description="time: what of the request's clock (UTC) it holds")
    normalise: Literal["standard", "min_max"] = "standard"
    transform: Transform = Setting(default="none", description="numeric: what is done to a number before all else")
    clip: bool = Setting(default=True, description="numeric: whether numbers outside the training part's bulk are cut")
    of: str | None = Setting(default=None, description="sequence: the field whose values at each click it repeats")
    discretise: Discretise | None = Setting(default=None, description="categorical: numbers, by `buckets`")
    null_values: tuple[str, ...] = Setting(default=(), description="text and numbers that stand for no value")

    @model_validator(mode="after")
    def _options_fit_the_kind(self) -> Self:
        if (self.part is not None) != (self.kind == "time"):
            raise ValueError(f"field {self.name}: 'part' ({', '.join(PARTS)}) goes with kind time, and only there")
        if (self.of is not None) != (self.kind == "sequence"):
            raise ValueError(f"field {self.name}: 'of' (a field) goes with kind sequence, and only there")
        if self.max_values is not None and self.kind != "multi":
            raise ValueError(f"field {self.name}: 'max_values' is for kind multi, got kind {self.kind}")
        if self.discretise is not None and self.kind != "categorical":
            raise ValueError(f"field {self.name}: 'discretise' is for kind categorical, got kind {self.kind}")
        if self.kind != "numeric" and (self.transform != "none" or not self.clip):
            raise ValueError(f"field {self.name}: 'transform' and 'clip' are for kind numeric, got kind {self.kind}")
        if self.kind == "sequence" and self.group != "behaviour":
            raise ValueError(f"field {self.name}: kind sequence needs group behaviour, got group {self.group}")
        if self.kind == "time" and self.group != "context":
            raise ValueError(f"field {self.name}: a time field belongs to the context, got group {self.group}")
        return self


class Field(FieldSpec):
    """One field after fitting on the training part."""

    vocabulary: tuple[str, ...] | None = Setting(default=None, description="categorical, multi: values in id order")
    quantiles: tuple[float, ...] | None = Setting(default=None, description="numeric by quantile: the steps' ends")
    low: float | None = Setting(default=None, allow_inf_nan=False, description="numeric: smaller ones are taken for it")
    high: float | None = Setting(default=None, allow_inf_nan=False, description="numeric: larger ones are taken for it")
    shift: float | None = Setting(default=None, allow_inf_nan=False)
    scale: float | None = Setting(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _is_fitted(self) -> Self:
        if (self.kind in ("categorical", "multi")) != (self.vocabulary is not None):
            raise ValueError(f"field {self.name}: kinds categorical and multi need a vocabulary, others have none")
        _check_values(self.name, self.vocabulary or ())
        if self.kind == "multi" and self.max_values is None:
            raise ValueError(f"field {self.name}: kind multi needs max_values")
        if self.kind == "numeric" and (self.shift is None or self.scale is None):
            raise ValueError(f"field {self.name}: kind numeric needs shift and scale")
        if (self.low is None) != (self.high is None) or (self.low or 0) > (self.high or 0):
            raise ValueError(f"field {self.name}: low and high go together, low first, got {self.low} and {self.high}")
        if (self.transform == "quantile") != (self.quantiles is not None):
            raise ValueError(f"field {self.name}: transform quantile needs quantiles, others have none")
        if self.quantiles is not None and list(self.quantiles) != sorted(set(self.quantiles)):
            raise ValueError(f"field {self.name}: quantiles are different and in ascending order")
        return self

    @property
    def num_ids(self) -> int:
        """Rows of this field's embedding table, PAD and OOV included; 0 for a numeric or sequence field."""
        if self.kind == "time":
            assert self.part is not None
            return PARTS[self.part] + FIRST
        return len(self.vocabulary) + FIRST if self.vocabulary is not None else 0


@dataclass(frozen=True, kw_only=True)
class Input:
    """One array a model is fed: rows of "U" requests or "C" candidates, and then fixed numbers."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # a manifest lists them

    name: str
    dtype: Literal["int64", "float32", "bool"]
    dims: tuple[str | int, ...]

    def shape(self, *, users: int, candidates: int) -> tuple[int, ...]:
        sizes = {"U": users, "C": candidates}
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)


F = TypeVar("F", bound=FieldSpec)


def history_sources(fields: Sequence[F]) -> tuple[F, ...]:
    """By behaviour field, in declared order, the field whose values and embeddings it has: its `of`, or itself."""
    declared = {f.name: f for f in fields if f.kind != "sequence"}
    return tuple(declared[f.of or f.name] for f in fields if f.group == "behaviour")


def event_fields(fields: Sequence[F]) -> tuple[F, ...]:
    """The fields that a click must bring a value of, as its item has none: in the order of their sequences."""
    by_name = {f.name: f for f in history_sources(fields) if f.group != "item" and f.kind != "time"}
    return tuple(by_name.values())


def input_name(field: FieldSpec) -> str:
    """The name of the array that holds a field: `user.age`, `ctx.hour`, `hist.movie_id`, `item.price`."""
    return f"{PREFIX[field.group]}.{field.name}"


def _check_values(field: str, vocabulary: Iterable[Any]) -> None:
    # One set of a million values would stop every thread while it grows, and when it goes.
    sets: list[set[str]] = [set() for _ in range(256)]
    for value in vocabulary:
        if not isinstance(value, str):
            raise ValueError(f"field {field}: a vocabulary holds strings, got {value!r:.100}")  # noqa: TRY004 - pydantic's
        seen = sets[hash(value) % len(sets)]
        if not value or value in seen:
            raise ValueError(f"field {field}: the values of a vocabulary are different, and none is empty")
        seen.add(value)
    while sets:
        sets.pop()
