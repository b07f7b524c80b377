"""What a model eats: the fields, their kinds and groups, their vocabularies, and one fingerprint of it all."""

import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Self

import ijson
from ijson.common import ObjectBuilder
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic import Field as Setting

from models.features.field import Field, FieldSpec, Group, Input, _check_values, history_sources, input_name
from models.features.fitting import numbers_of, statistics_of, tally_of, vocabulary_of
from models.features.values import Columns, SchemaError, Tally, buckets


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
        return self.fit_tallies(
            {f.name: tally_of(f, columns) for f in self.fields if f.kind not in ("time", "sequence")}
        )

    def fit_tallies(self, tallies: Mapping[str, Tally]) -> "Schema":
        """What `fit` makes of the columns that were counted, whatever their order was."""
        fitted = tuple(_fit(spec, tallies.get(spec.name)) for spec in self.fields)
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
        """The field of that name that is no sequence; a sequence goes by what it is `of`."""
        return self._by_name[name]

    @cached_property
    def history_sources(self) -> tuple[Field, ...]:
        """By behaviour field, in declared order, the field whose values and embeddings it has."""
        return history_sources(self.fields)

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
            inputs.append(Input(name="hist_age", dtype="int64", dims=("U", self.history_length)))
        inputs += [self._input(f, "C") for f in self.group("item")]
        inputs.append(Input(name="user_index", dtype="int64", dims=("C",)))
        return tuple(inputs)

    def _input(self, field: Field, rows: str) -> Input:
        dims: tuple[str | int, ...] = (rows,)
        source = self.field(field.of or field.name)
        if field.group == "behaviour":
            dims = (rows, self.history_length)
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
        """Raises SchemaError, which says where what was wrong.

        A service goes on answering while another thread reads a million values: none of the steps here is one long
        call that keeps Python's lock, as those of pydantic and json are (deploy/bench/vocabulary.py).
        """
        content = _parsed(text.encode() if isinstance(text, str) else text)
        vocabularies = _taken_out(content)
        try:
            schema = cls.model_validate(content)
            fields = list(schema.fields)
            for place, values in vocabularies.items():
                _check_values(fields[place].name, values)
                fields[place] = fields[place].model_copy(update={"vocabulary": tuple(values)})
        except ValidationError as err:
            first = err.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "top level"
            raise SchemaError(f"not a fitted schema: at {where}: {first['msg']}") from err
        except ValueError as err:
            raise SchemaError(f"not a fitted schema: {err}") from err
        return schema.model_copy(update={"fields": tuple(fields)})


def _parsed(content: bytes) -> Any:
    builder = ObjectBuilder()
    try:
        for event, value in ijson.basic_parse(io.BytesIO(content), use_float=True):
            builder.event(event, value)
    except ijson.JSONError as err:
        raise SchemaError(f"not a fitted schema: no JSON: {' '.join(str(err).split())[:200]}") from err
    return builder.value


def _taken_out(content: Any) -> dict[int, list[Any]]:
    """The vocabularies by their field's place; what is left in theirs is an empty one."""
    found = {}
    fields = content.get("fields") if isinstance(content, dict) else None
    for place, field in enumerate(fields if isinstance(fields, list) else ()):
        if isinstance(field, dict) and isinstance(field.get("vocabulary"), list):
            found[place], field["vocabulary"] = field["vocabulary"], []
    return found


def _check(fields: Sequence[FieldSpec], user_key: str | None, item_key: str | None, history_length: int) -> None:
    if not fields:
        raise ValueError("a schema needs at least one field")
    # A sequence may bear the name of another field, but not of one in its own group: their arrays would share a name.
    (_, name), count = Counter(
        place for f in fields for place in {(f.kind == "sequence", f.name), (f.group == "behaviour", f.name)}
    ).most_common(1)[0]
    if count > 1:
        raise ValueError(f"field names must differ, {name} is declared more than once")
    for key, group in ((user_key, "user"), (item_key, "item")):
        kinds = {f.name: f.kind for f in fields if f.group == group}
        if key is not None and kinds.get(key) != "categorical":
            raise ValueError(f"{group}_key names a categorical {group} field, got {key!r}")
    sources = {f.name for f in fields if f.group != "behaviour" and f.name != user_key}
    for field in fields:
        if field.kind == "sequence" and field.of not in sources:
            raise ValueError(
                f"sequence {field.name} is of {field.of!r}, no context, item or user field, or the user's id"
            )
    num_behaviour = sum(f.group == "behaviour" for f in fields)
    if bool(num_behaviour) != (history_length > 0):
        raise ValueError(f"history_length {history_length} and {num_behaviour} sequence fields do not go together")


def _fit(spec: FieldSpec, tally: Tally | None) -> Field:
    declared = spec.model_dump()
    if spec.kind in ("time", "sequence"):
        return Field(**declared)
    if tally is None:
        raise SchemaError(f"field {spec.name}: nothing was counted of it")
    if spec.kind == "numeric":
        return Field(**{**declared, **statistics_of(spec, tally)})
    values = tally.values
    if spec.discretise is not None:
        values = buckets(spec.discretise, numbers_of(spec, values)).tolist()
    vocabulary = vocabulary_of(spec, values, tally.counts)
    if spec.kind == "categorical":
        return Field(**{**declared, "vocabulary": vocabulary})
    return Field(**{**declared, "vocabulary": vocabulary, "max_values": spec.max_values or max(tally.most_values, 1)})
