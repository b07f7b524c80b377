"""The YAML file that describes a table: what its columns mean, how they are written, how the rows are split."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from pydantic import Field as Setting

from models.features.field import FieldSpec, event_fields, history_sources
from models.features.schema import SchemaSpec
from models.features.values import NULL_VALUES
from training.datasets import times
from training.datasets.checked_table import Reading, Use
from training.errors import UserError
from training.log import RESERVED

Share = Annotated[float, Setting(gt=0, lt=1)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Shares(_Model):
    valid: Share = 0.1
    test: Share = 0.1

    @model_validator(mode="after")
    def _leave_something_to_train_on(self) -> Self:
        if self.valid + self.test >= 1:
            raise ValueError(f"valid and test leave no rows to train on, got {self.valid} and {self.test}")
        return self


class ByTime(_Shares):
    by: Literal["time"]


class ByHash(_Shares):
    by: Literal["hash"]
    seed: int = 0
    of: str | None = None


class ByColumn(_Model):
    by: Literal["column"]
    column: str
    train: str = "train"
    valid: str = "valid"
    test: str = "test"


class ByFiles(_Model):
    by: Literal["files"]
    train: str
    valid: str
    test: str


class FieldForm(FieldSpec):
    """A field, and where it is read."""

    column: str | None = Setting(default=None, description="the column's name, where it is not the field's")
    table: str | None = Setting(default=None, description="the name of the table that holds the column")
    separator: str | None = Setting(default=None, min_length=1, description="multi: another one between values")
    spelling: Literal["auto", "text"] = Setting(default="auto", description="text: numbers stay as they are written")

    @property
    def column_name(self) -> str:
        return self.column or self.name

    @property
    def use(self) -> Use:
        role: Literal["text", "list", "number"] = "text"
        if self.kind == "numeric" or self.discretise is not None:
            role = "number"
        elif self.kind == "multi":
            role = "list"
        return Use(column=self.column_name, role=role, separator=self.separator, is_as_written=self.spelling == "text")

    @property
    def spec(self) -> FieldSpec:
        return FieldSpec(**self.model_dump(exclude={"column", "table", "separator", "spelling"}))


class _Marks(_Model):
    """How a CSV file parts its columns."""

    delimiter: str | None = None
    quote: str | None = None

    @field_validator("delimiter")
    @classmethod
    def _one_sign(cls, delimiter: str | None) -> str | None:
        sign = {"tab": "\t", "\\t": "\t", "TAB": "\t"}.get(delimiter or "", delimiter)
        if sign is not None and (len(sign) != 1 or not sign.isascii() or sign in '"\r\n'):
            raise ValueError("a delimiter is one ASCII sign other than a quote, or tab")
        return sign

    @field_validator("quote")
    @classmethod
    def _one_quote(cls, quote: str | None) -> str | None:
        if quote is not None and quote != "none" and (len(quote) != 1 or not quote.isascii() or quote in "\r\n"):
            raise ValueError("a quote is one ASCII sign, or none")
        return quote

    def reading(self, base: Reading) -> Reading:
        delimiter = base.delimiter if self.delimiter is None else self.delimiter
        quote = base.quote if self.quote is None else None if self.quote == "none" else self.quote
        return replace(base, delimiter=delimiter, quote=quote)


class TableForm(_Marks):
    """A table of users, items or anything else, one row a key, whose columns are added to the log's rows."""

    path: str
    key: str | None = Setting(default=None, description="its column; default: the log's name for it")
    on: str | None = Setting(default=None, description="the log's column; default: users by user, items by item")


class HistoryForm(_Model):
    """The columns that hold each row's past as lists of one length; without times, oldest first."""

    items: str
    times: str | None = None
    features: Mapping[str, str] = Setting(default={}, description="by field: the column of its values at past items")
    separator: str | None = Setting(default=None, min_length=1)


class HasColumns(Protocol):
    @property
    def names(self) -> Collection[str]: ...


class Description(_Marks):
    """The YAML file."""

    label: str
    user: str | None = None
    item: str | None = None
    timestamp: str | None = None
    timestamp_format: str | None = None
    timezone: str | None = None
    history_length: int = 0
    history: HistoryForm | None = None
    weight: str | None = None
    negative_rate: float = Setting(default=1.0, gt=0, le=1)
    split: Annotated[ByTime | ByHash | ByColumn | ByFiles, Setting(discriminator="by")]
    separator: str = Setting(default="|", min_length=1)
    null_values: tuple[str, ...] = NULL_VALUES
    tables: Mapping[str, TableForm] = {}
    fields: tuple[FieldForm, ...]

    @property
    def spec(self) -> SchemaSpec:
        """The fields as declared; the fields that read the user's and the item's column are keys."""
        return SchemaSpec(
            user_key=self._key("user", self.user),
            item_key=self._key("item", self.item),
            history_length=self.history_length,
            fields=tuple(self._spec_of(field) for field in self.fields),
        )

    def _spec_of(self, field: FieldForm) -> FieldSpec:
        """With the file's null values: the encoder takes them for absent wherever a value comes from."""
        if field.kind in ("time", "sequence"):
            return field.spec
        return field.spec.model_copy(update={"null_values": self.null_values})

    @property
    def read_fields(self) -> tuple[FieldForm, ...]:
        """The fields that have a column of their own."""
        others = {self._key("user", self.user), self._key("item", self.item)}
        if self.history is not None:
            others |= {f.name for f in self.fields if f.group == "behaviour" and f.name in self.history.features}
        return tuple(f for f in self.fields if f.kind not in ("time", "sequence") and f.name not in others)

    def base_reading(self) -> Reading:
        base = Reading(
            separator=self.separator,
            null_values=self.null_values,
            timezone=self.timezone,
            timestamp_format=self.timestamp_format,
        )
        return self.reading(base)

    def table_of(self, field: FieldForm, tables: Mapping[str, HasColumns]) -> str | None:
        """The name of the table that a field is read from; None for the log."""
        if field.table is not None:
            return field.table
        return next((name for name, table in tables.items() if field.column_name in table.names), None)

    def key_of(self, table: str) -> str:
        """The log's column that holds a table's key."""
        on = self.tables[table].on or {"users": self.user, "items": self.item}.get(table)
        assert on is not None
        return on

    def _key(self, group: Literal["user", "item"], column: str | None) -> str | None:
        if column is None:
            return None
        words = (f for f in self.fields if f.group == group and f.kind == "categorical")
        return next((f.name for f in words if f.column_name == column), None)

    @field_validator("timezone")
    @classmethod
    def _is_a_timezone(cls, timezone: str | None) -> str | None:
        if timezone is not None and not times.is_timezone(timezone):
            raise ValueError("expected the name of a time zone, such as Asia/Shanghai or UTC")
        return timezone

    @field_validator("timestamp_format")
    @classmethod
    def _is_a_form(cls, form: str | None) -> str | None:
        if form is not None and form not in times.NUMBER_FORMS and "%" not in form:
            raise ValueError(f"expected {', '.join(times.NUMBER_FORMS)} or a form such as %d.%m.%Y %H:%M")
        return form

    @model_validator(mode="after")
    def _fields_are_what_they_may_be(self) -> Self:
        item_fields = {field.name for field in self.fields if field.group == "item"}
        for field in self.fields:
            if field.kind == "sequence" and field.of == self.item and field.of not in item_fields:
                missing = f"{{name: {field.of}, kind: categorical, group: item}}"
                raise ValueError(f"field {field.name}: a sequence of {field.of} needs the field {missing} too")
        spec = self.spec
        for field in self.fields:
            if "null_values" in field.model_fields_set:
                raise ValueError(f"field {field.name}: null_values stands beside fields, for all of them")
            if field.name in RESERVED and field.name not in (spec.user_key, spec.item_key):
                raise ValueError(f"field {field.name}: this name has a meaning of its own; use another with `column:`")
            if field.column_name == self.label and field.kind not in ("time", "sequence"):
                raise ValueError(f"field {field.name}: the label is what a model is to predict, it may not see it")
            if field.column_name == self.weight and field.kind not in ("time", "sequence"):
                raise ValueError(f"field {field.name}: a row's weight is not known when it is scored, drop the field")
            if field.table is not None and field.table not in self.tables:
                raise ValueError(f"field {field.name}: there is no table {field.table} under `tables:`")
        return self

    def _check_history(self, history: HistoryForm) -> None:
        past = {f.name: f for f in (*(f for f in self.fields if f.group == "item"), *history_sources(self.fields))}
        for name in history.features:
            if name not in past or past[name].kind == "time":
                raise ValueError(f"history: {name} is no item field and no field that a sequence is of")
            if past[name].kind == "multi":
                raise ValueError(f"history: {name} is of kind multi, and a list of past values cannot hold lists")
        for field in event_fields(self.fields):
            if field.name not in history.features:
                raise ValueError(f"history: features names no column of {field.name}, which no item has")

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        if self.history_length and None in (self.user, self.item, self.timestamp):
            raise ValueError("a history needs the columns of user, item and timestamp")
        if self.timestamp is None and (self.split.by == "time" or any(f.kind == "time" for f in self.fields)):
            raise ValueError("a split by time and fields of kind time need the column of the timestamp")
        if self.history:
            self._check_history(self.history)
        if self.history and not self.history_length:
            raise ValueError("history: history_length says how many past items a model sees, and is missing")
        for name, table in self.tables.items():
            if (table.on or {"users": self.user, "items": self.item}.get(name)) is None:
                raise ValueError(f"table {name}: `on:` names the log's column that holds its key")
        return self


def described(path: Path) -> Description:
    """Raises UserError, which says where in the file what is wrong."""
    try:
        # Nothing is retyped: 1.10, on, 007 and NULL stay what is written, and become numbers where numbers go.
        values = yaml.load(path.read_text("utf-8"), Loader=yaml.BaseLoader)  # noqa: S506 - it makes text only
        return Description.model_validate(_without_empty(values))
    except OSError as err:
        raise UserError(f"{path}: unreadable ({err.strerror})") from err
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as err:
        raise UserError(f"{path}: expected YAML, {' '.join(str(err).split())}") from err
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        where = ", at " + ".".join(map(str, first["loc"])) if first["loc"] else ""
        got = "" if isinstance(first["input"], dict) else f", got {first['input']!r:.60}"
        raise UserError(f"{path}{where}: {first['msg'].removeprefix('Value error, ')}{got}") from err


def _without_empty(values: Any) -> Any:
    """A key that is written with nothing, `null` or `~` behind it is left out, as YAML means it."""
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if value not in ("", "null", "~")}
