"""Any CSV or Parquet file, described by a YAML file:

    label: clicked                  # 0 or 1
    user: user_id                   # optional; as the name of a user field it is that field's value too
    item: ad_id                     # optional, likewise
    timestamp: at                   # optional: Unix seconds, a Parquet time, or ISO 8601 (UTC where no zone is given)
    history_length: 20              # optional; needs user, item and timestamp
    split: {by: time, valid: 0.1, test: 0.1}
    # or   {by: hash, valid: 0.1, test: 0.1, seed: 1, of: user_id}    rows of one `of` stay together (optional)
    # or   {by: column, column: fold, train: a, valid: b, test: c}
    # or   {by: files, train: a.parquet, valid: b.parquet, test: c.parquet}    --source is then their folder
    delimiter: ","                  # of a CSV file, between columns
    separator: "|"                  # between the values of a multi field that is text
    fields:                         # a field's name is its column's
      - {name: user_id, kind: categorical, group: user}
      - {name: price, kind: numeric, group: item}
      - {name: ad_id, kind: sequence, group: behaviour, of: ad_id}

Without a timestamp a row's number stands in for its time.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Literal, Self

import polars as pl
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic import Field as Setting

from models.features.field import FieldSpec
from models.features.schema import SchemaSpec
from training.datasets.checked_table import Table
from training.errors import UserError
from training.log import PARTS, RESERVED, Log, split_by_time

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


class Description(_Model):
    """The YAML file."""

    label: str
    user: str | None = None
    item: str | None = None
    timestamp: str | None = None
    history_length: int = 0
    split: Annotated[ByTime | ByHash | ByColumn | ByFiles, Setting(discriminator="by")]
    delimiter: str = Setting(default=",", pattern=r'^[^\x80-\U0010ffff"\r\n]$')
    separator: str = Setting(default="|", min_length=1)
    fields: tuple[FieldSpec, ...]

    @property
    def spec(self) -> SchemaSpec:
        """The fields as declared; the user's and the item's column are keys where they are fields, too."""
        named = {(f.group, f.name) for f in self.fields}
        return SchemaSpec(
            user_key=self.user if ("user", self.user) in named else None,
            item_key=self.item if ("item", self.item) in named else None,
            history_length=self.history_length,
            fields=self.fields,
        )

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        spec = self.spec
        for field in self.fields:
            if field.name in RESERVED and field.name not in (spec.user_key, spec.item_key):
                raise ValueError(f"field {field.name}: this name has a meaning of its own; rename the column")
            if field.name == self.label and field.kind != "time":
                raise ValueError(f"field {field.name}: the label is what a model is to predict, it may not see it")
        if self.history_length and None in (self.user, self.item, self.timestamp):
            raise ValueError("a history needs the columns of user, item and timestamp")
        if self.timestamp is None and (self.split.by == "time" or any(f.kind == "time" for f in self.fields)):
            raise ValueError("a split by time and fields of kind time need the column of the timestamp")
        return self


def load(source: Path, schema_yaml: Path) -> Log:
    """Read the file (split by files: the three files) as the YAML describes it."""
    described = _describe(schema_yaml)
    split = described.split
    if isinstance(split, ByFiles):
        files = [source / name for name in (split.train, split.valid, split.test)]
        rows = pl.concat(
            _rows(Table(file, described.delimiter), described).with_columns(part=pl.lit(part))
            for part, file in zip(PARTS, files, strict=True)
        )
    else:
        files = [source]
        table = Table(source, described.delimiter)
        rows = _rows(table, described)
    if described.timestamp is None:
        rows = rows.with_columns(pl.int_range(pl.len()).cast(pl.Float64).alias("ts"))
    if isinstance(split, ByTime):
        rows = rows.sort("ts", maintain_order=True)
        rows = rows.with_columns(split_by_time(rows["ts"].to_numpy(), valid=split.valid, test=split.test))
    elif isinstance(split, ByHash):
        rows = rows.with_columns(_by_hash(table, split, rows.height))
    elif isinstance(split, ByColumn):
        rows = rows.with_columns(_by_column(table, split))
    return Log(name=schema_yaml.stem, source=source, spec=described.spec, rows=rows.lazy(), files=(*files, schema_yaml))


def _describe(path: Path) -> Description:
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
        return Description.model_validate(values)
    except OSError as err:
        raise UserError(f"{path}: unreadable ({err.strerror})") from err
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as err:
        raise UserError(f"{path}: expected YAML, {' '.join(str(err).split())}") from err
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        where = ", at " + ".".join(map(str, first["loc"])) if first["loc"] else ""
        got = "" if isinstance(first["input"], dict) else f", got {first['input']!r:.60}"
        raise UserError(f"{path}{where}: {first['msg'].removeprefix('Value error, ')}{got}") from err


def _rows(table: Table, described: Description) -> pl.DataFrame:
    nobody = pl.lit(None, dtype=pl.String)
    spec = described.spec
    columns = {"label": table.labels(described.label)}
    if described.timestamp is not None:
        columns["ts"] = table.seconds(described.timestamp)
    for name, column in (("user", described.user), ("item", described.item)):
        if column is not None:
            columns[name] = table.text(column)
    for field in described.fields:
        if field.kind in ("time", "sequence") or field.name in (spec.user_key, spec.item_key):
            continue
        if field.kind == "numeric" or field.discretise is not None:
            columns[field.name] = table.numbers(field.name)
        elif field.kind == "multi":
            columns[field.name] = table.lists(field.name, described.separator)
        else:
            columns[field.name] = table.text(field.name)
    absent = {name: nobody for name in ("user", "item") if name not in columns}
    return pl.DataFrame(columns).with_columns(**absent)


def _by_hash(table: Table, split: ByHash, num_rows: int) -> pl.Series:
    """Each row's part by a hash of its `of` value (else its number): the same in every run and version."""
    values = map(str, range(num_rows)) if split.of is None else (v or "" for v in table.text(split.of).to_list())
    points = [
        int.from_bytes(hashlib.blake2b(f"{split.seed}:{v}".encode(), digest_size=8).digest()) / 2**64 for v in values
    ]
    names = ["test" if p < split.test else "valid" if p < split.test + split.valid else "train" for p in points]
    return pl.Series("part", names)


def _by_column(table: Table, split: ByColumn) -> pl.Series:
    parts = {split.train: "train", split.valid: "valid", split.test: "test"}
    column = table.text(split.column)
    strange = column.filter(column.is_null() | ~column.is_in(list(parts)))
    if strange.len():
        expected = f"{', '.join(map(repr, parts))}"
        raise UserError(f"{table.file}, column {split.column}: expected one of {expected}, got {strange[0]!r}")
    return column.replace_strict(parts).alias("part")
