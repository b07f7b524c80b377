"""What a model eats: the fields, their kinds and groups, their vocabularies, and one fingerprint of it all."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic import Field as Setting

PAD = 0  # absent, or a position that holds nothing: the zero vector, never trained
OOV = 1  # present, but not seen (often enough) in training
FIRST = 2  # the id of a vocabulary's first value

Kind = Literal["categorical", "numeric", "multi", "time", "sequence"]
Group = Literal["user", "context", "item", "behaviour"]
Part = Literal["hour", "weekday", "day", "month"]

Value = str | int | float | bool | None | Sequence[str | int | float | bool | None]
Row = Mapping[str, Value]
"""The raw values of one user, context or candidate, by field name; an absent key and None mean the same."""
Column = Sequence[Value] | NDArray[Any]
Columns = Mapping[str, Column]
"""Raw values of many rows: one column per field name, all of one length."""

PREFIX: Mapping[Group, str] = {"user": "user", "context": "ctx", "behaviour": "hist", "item": "item"}
PARTS: Mapping[Part, int] = {"hour": 24, "weekday": 7, "day": 31, "month": 12}


class SchemaError(ValueError):
    """A schema that contradicts itself, or columns it cannot be fitted on."""


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
    of: str | None = Setting(default=None, description="sequence: the item or time field whose values it repeats")

    @model_validator(mode="after")
    def _options_fit_the_kind(self) -> Self:
        if (self.part is not None) != (self.kind == "time"):
            raise ValueError(f"field {self.name}: 'part' ({', '.join(PARTS)}) goes with kind time, and only there")
        if (self.of is not None) != (self.kind == "sequence"):
            raise ValueError(f"field {self.name}: 'of' (an item or time field) goes with kind sequence, and only there")
        if self.max_values is not None and self.kind != "multi":
            raise ValueError(f"field {self.name}: 'max_values' is for kind multi, got kind {self.kind}")
        if (self.kind == "sequence") != (self.group == "behaviour"):
            raise ValueError(f"field {self.name}: kind sequence and group behaviour go together")
        if self.kind == "time" and self.group != "context":
            raise ValueError(f"field {self.name}: a time field belongs to the context, got group {self.group}")
        return self


class Field(FieldSpec):
    """One field after fitting on the training part."""

    vocabulary: tuple[str, ...] | None = Setting(default=None, description="categorical, multi: values in id order")
    shift: float | None = Setting(default=None, allow_inf_nan=False)
    scale: float | None = Setting(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _is_fitted(self) -> Self:
        if (self.kind in ("categorical", "multi")) != (self.vocabulary is not None):
            raise ValueError(f"field {self.name}: kinds categorical and multi need a vocabulary, others have none")
        if self.vocabulary is not None and ("" in self.vocabulary or len(set(self.vocabulary)) < len(self.vocabulary)):
            raise ValueError(f"field {self.name}: the values of a vocabulary are different, and none is empty")
        if self.kind == "multi" and self.max_values is None:
            raise ValueError(f"field {self.name}: kind multi needs max_values")
        if self.kind == "numeric" and (self.shift is None or self.scale is None):
            raise ValueError(f"field {self.name}: kind numeric needs shift and scale")
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
    """One array a model is fed: U requests' rows, C candidates' rows, fixed numbers otherwise."""

    name: str
    dtype: Literal["int64", "float32", "bool"]
    dims: tuple[str | int, ...]


class SchemaSpec(BaseModel):
    """The fields as declared. `user_key` and `item_key` name the fields that hold the user's and the candidate's id."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_key: str | None = None
    item_key: str | None = None
    history_length: int = Setting(default=0, ge=0, le=1000, description="T: past clicks a model sees; 0 for none")
    fields: tuple[FieldSpec, ...]

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        _check(self.fields, self.user_key, self.item_key, self.history_length)
        return self

    def fit(self, columns: Columns) -> "Schema":
        """Learn vocabularies and numeric statistics from the training part's raw columns.

        Pass the training part only: whatever is seen here counts as known. Raises SchemaError for a missing column.
        """
        fitted = tuple(_fit(spec, columns) for spec in self.fields)
        return Schema(user_key=self.user_key, item_key=self.item_key, history_length=self.history_length, fields=fitted)


class Schema(BaseModel):
    """The fitted fields: everything needed to turn raw values into a model's inputs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_key: str | None
    item_key: str | None
    history_length: int = Setting(ge=0, le=1000)
    fields: tuple[Field, ...]

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        _check(self.fields, self.user_key, self.item_key, self.history_length)
        return self

    def group(self, group: Group) -> tuple[Field, ...]:
        """The fields of one group, in declared order."""
        return tuple(f for f in self.fields if f.group == group)

    def field(self, name: str) -> Field:
        """The user, context or item field of that name; a sequence field goes by what it is `of`."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Field]:
        return {f.name: f for f in self.fields if f.kind != "sequence"}

    @cached_property
    def fingerprint(self) -> str:
        """Two schemas of one fingerprint encode every row alike."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """The arrays the encoder makes, in the order user, context, behaviour, item: request-constant first."""
        inputs = [self._input(f, "U") for f in (*self.group("user"), *self.group("context"))]
        if self.group("behaviour"):
            inputs += [self._input(f, "U") for f in self.group("behaviour")]
            inputs.append(Input(name="hist_mask", dtype="bool", dims=("U", self.history_length)))
        inputs += [self._input(f, "C") for f in self.group("item")]
        inputs.append(Input(name="user_index", dtype="int64", dims=("C",)))
        return tuple(inputs)

    def _input(self, field: Field, rows: str) -> Input:
        dims: tuple[str | int, ...] = (rows,)
        source = field
        if field.kind == "sequence":
            assert field.of is not None
            dims, source = (rows, self.history_length), self.field(field.of)
        if source.kind == "multi":
            assert source.max_values is not None
            dims = (*dims, source.max_values)
        dtype: Literal["int64", "float32"] = "float32" if source.kind == "numeric" else "int64"
        return Input(name=input_name(field), dtype=dtype, dims=dims)

    def to_json(self) -> str:
        """One canonical text: the same schema gives the same bytes."""
        return self.model_dump_json(exclude_defaults=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Schema":
        try:
            return cls.model_validate_json(text)
        except ValidationError as err:
            first = err.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "top level"
            raise SchemaError(f"not a fitted schema: at {where}: {first['msg']}") from err


def input_name(field: FieldSpec) -> str:
    """The name of the array that holds a field: `user.age`, `ctx.hour`, `hist.movie_id`, `item.price`."""
    return f"{PREFIX[field.group]}.{field.name}"


def canonical(value: Value) -> str | None:
    """The one spelling of a raw categorical value; None where it is absent.

    42, 42.0 and "42" are the same value, as JSON clients and CSV files do not agree on types; so are True, 1 and "1".
    Text is taken as it is, space and Unicode form included ("42.0" is not 42). The empty string and NaN are absent.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool | int | np.integer | np.bool_):
        return str(int(value))
    if isinstance(value, float | np.floating):
        if math.isnan(value):
            return None
        return str(int(value)) if float(value).is_integer() else repr(float(value))
    raise TypeError(f"expected a string or a number, got {type(value).__name__}")


def _check(fields: Sequence[FieldSpec], user_key: str | None, item_key: str | None, history_length: int) -> None:
    if not fields:
        raise ValueError("a schema needs at least one field")
    (_, name), count = Counter((f.group == "behaviour", f.name) for f in fields).most_common(1)[0]
    if count > 1:
        raise ValueError(f"field names must differ, {name} is declared more than once")
    for key, group in ((user_key, "user"), (item_key, "item")):
        kinds = {f.name: f.kind for f in fields if f.group == group}
        if key is not None and kinds.get(key) != "categorical":
            raise ValueError(f"{group}_key names a categorical {group} field, got {key!r}")
    sources = {f.name for f in fields if (f.group == "item" and f.kind in ("categorical", "multi")) or f.kind == "time"}
    sequences = [f for f in fields if f.kind == "sequence"]
    for field in sequences:
        if field.of not in sources:
            raise ValueError(f"sequence {field.name} is of {field.of!r}, which is no categorical, multi or time field")
    if bool(sequences) != (history_length > 0):
        raise ValueError(f"history_length {history_length} and {len(sequences)} sequence fields do not go together")


def _fit(spec: FieldSpec, columns: Columns) -> Field:
    declared = spec.model_dump()
    if spec.kind in ("time", "sequence"):
        return Field(**declared)
    if spec.name not in columns:
        raise SchemaError(f"field {spec.name}: no such column; there are {', '.join(sorted(columns))}")
    column = columns[spec.name]
    if spec.kind == "numeric":
        return Field(**{**declared, **_statistics(spec, column)})
    values = _listed(column)
    if spec.kind == "categorical":
        return Field(**{**declared, "vocabulary": _vocabulary(spec, values)})
    rows = [row if row is not None else () for row in values]
    if any(isinstance(row, str) or not isinstance(row, Iterable) for row in rows):
        raise SchemaError(f"field {spec.name}: kind multi wants a list of values in every row")
    vocabulary = _vocabulary(spec, list(chain.from_iterable(rows)))
    most = max((len(row) for row in rows), default=1)
    return Field(**{**declared, "vocabulary": vocabulary, "max_values": spec.max_values or max(most, 1)})


def _listed(column: Column) -> list[Any]:
    return column.tolist() if isinstance(column, np.ndarray) else list(column)


def _vocabulary(spec: FieldSpec, values: Sequence[Any]) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    try:
        for value, count in Counter(values).items():
            spelling = canonical(value)
            if spelling is not None:
                counts[spelling] += count
    except TypeError as err:
        raise SchemaError(f"field {spec.name}: kind {spec.kind} wants strings or numbers ({err})") from err
    kept = [(value, count) for value, count in counts.items() if count >= spec.min_count]
    return tuple(value for value, _ in sorted(kept, key=lambda item: (-item[1], item[0])))


def _statistics(spec: FieldSpec, column: Column) -> dict[str, float]:
    listed = _listed(column)
    wrong = next((v for v in listed if isinstance(v, str | bool)), None)  # numpy would take "3.5" and True for numbers
    try:
        values = np.array([math.nan if v is None else v for v in listed], dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as err:
        raise SchemaError(f"field {spec.name}: kind numeric wants numbers ({err})") from err
    if wrong is not None:
        raise SchemaError(f"field {spec.name}: kind numeric wants numbers, got {wrong!r:.80}")
    values = values[~np.isnan(values)]
    if values.size == 0:
        raise SchemaError(f"field {spec.name}: no number in the training part")
    if not np.isfinite(values).all():
        raise SchemaError(f"field {spec.name}: infinite values in the training part")
    low, high = float(values.min()), float(values.max())
    if low == high:  # asked first: the mean of equal numbers may round to another
        return {"shift": low, "scale": 1.0}
    with np.errstate(over="ignore", invalid="ignore"):
        shift, scale = (values.mean(), values.std()) if spec.normalise == "standard" else (low, high - low)
    if not (np.isfinite(shift) and np.isfinite(scale) and scale > 0):
        raise SchemaError(f"field {spec.name}: numbers from {low:g} to {high:g} have no mean and spread in a double")
    return {"shift": float(shift), "scale": float(scale)}
