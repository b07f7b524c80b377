"""Any CSV or Parquet files, described by a YAML file (every key: docs/own_data.md):

    label: clicked                  # 0 or 1, or true and false
    user: user_id                   # optional; where a user field reads this column, that field is the user's id
    item: ad_id                     # optional, likewise
    timestamp: at                   # optional: a number (see training/datasets/times.py), ISO 8601, or a Parquet time
    timezone: Asia/Shanghai         # optional: of times that name no zone; UTC without it
    history_length: 20              # optional; needs user, item and timestamp
    split: {by: time, valid: 0.1, test: 0.1}
    # or   {by: hash, valid: 0.1, test: 0.1, seed: 1, of: user_id}    rows of one `of` stay together (optional)
    # or   {by: column, column: fold, train: a, valid: b, test: c}
    # or   {by: files, train: a.parquet, valid: b.parquet, test: c.parquet}    --source is then their folder
    # weight: importance            # optional: how many rows a row stands for, in the loss, metrics and calibration
    # negative_rate: 0.1            # optional: the share of the rows without a click that were kept in the log
    delimiter: ","                  # of CSV files, between columns; also tab
    separator: "|"                  # between the values of a multi field that is text
    fields:                         # a field reads the column of its name, or the one that `column:` names
      - {name: user_id, kind: categorical, group: user}
      - {name: hour, kind: time, group: context, part: hour}
      - {name: ad_id, kind: categorical, group: item}
      - {name: price, kind: numeric, group: item, column: "price, EUR"}
      - {name: ad_id, kind: sequence, group: behaviour, of: ad_id}

Nothing in it is retyped: 1.10, on and 007 are what is written. Without a timestamp a row's number stands in for its
time.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from training.datasets import times
from training.datasets.checked_table import PART, TYPES, Role, Table, Use
from training.datasets.description import ByColumn, ByFiles, ByHash, ByTime, Description, described
from training.errors import UserError
from training.log import PARTS, PAST_ITEM, PAST_TS, ROW, Log, cuts_in_time, past_name

_OF, _FOLD, _DROPPED = " of", " fold", " dropped"  # columns for a while, as ROW is


def load(source: Path, schema_yaml: Path) -> Log:
    """Read the source (split by files: the three sources in it) as the YAML describes it."""
    description = described(schema_yaml)
    split, reading = description.split, description.base_reading()
    parts = {part: str(getattr(split, part)) for part in PARTS} if isinstance(split, ByFiles) else None
    log = Table(source, reading, parts)
    tables = {
        name: Table(schema_yaml.parent / form.path, form.reading(reading)) for name, form in description.tables.items()
    }
    _check_columns(description, log, tables)
    uses = _uses(description, tables)
    rows, notes = log.columns(uses), list(log.notes)
    for name, table in tables.items():
        rows, about = _joined(rows, name, table, description)
        notes += about
    rows = rows.with_columns(pl.lit(None, dtype=pl.String).alias(key) for key in ("user", "item") if key not in uses)
    if description.timestamp is None:
        rows = rows.with_columns(pl.col(ROW).cast(pl.Float64).alias("ts"))
    else:
        notes.append(_range(rows))
    dropped: dict[str, int] = {}
    if description.history is not None:
        rows, dropped = _with_history(rows, description, log)
        if description.history.times is None:
            notes.append("history: without times, the k-th newest item of a row stands k seconds before it")
    return Log(
        name=schema_yaml.stem,
        source=source,
        spec=description.spec,
        rows=rows.with_columns(_part(rows, split, log).alias("part")).drop(ROW, PART, _OF, _FOLD, strict=False),
        files=(*log.paths, *(path for table in tables.values() for path in table.paths), schema_yaml),
        notes=tuple(notes),
        dropped=dropped,
        negative_rate=description.negative_rate,
        unread=tuple(sorted(set(log.names) - {use.column for use in uses.values()})),
    )


def _uses(description: Description, tables: Mapping[str, Table]) -> dict[str, Use]:
    """What is read of the log itself, by the name it has in the rows."""
    uses = {"label": Use(column=description.label, role="label")}
    if description.timestamp is not None:
        uses["ts"] = Use(column=description.timestamp, role="time")
    if description.weight is not None:
        uses["weight"] = Use(column=description.weight, role="weight")
    for name, column in (("user", description.user), ("item", description.item)):
        if column is not None:
            uses[name] = Use(column=column, role="text")
    uses |= {field.name: field.use for field in description.read_fields if description.table_of(field, tables) is None}
    uses |= {f" key of {name}": Use(column=description.key_of(name), role="text") for name in tables}
    uses |= _uses_of_history(description)
    if isinstance(description.split, ByHash) and description.split.of is not None:
        uses[_OF] = Use(column=description.split.of, role="text")
    if isinstance(description.split, ByColumn):
        uses[_FOLD] = Use(column=description.split.column, role="text")
    return uses


def _uses_of_history(description: Description) -> dict[str, Use]:
    form = description.history
    if form is None:
        return {}
    uses = {PAST_ITEM: Use(column=form.items, role="list", separator=form.separator)}
    if form.times is not None:
        uses[PAST_TS] = Use(column=form.times, role="times", separator=form.separator)
    numbers = {f.name for f in description.fields if f.use.role == "number"}
    for field, column in form.features.items():
        role: Role = "numbers" if field in numbers else "texts"
        uses[past_name(field)] = Use(column=column, role=role, separator=form.separator)
    return uses


def _check_columns(description: Description, log: Table, tables: Mapping[str, Table]) -> None:
    """Raises UserError where it is not plain which column a field is, or where a history in the log is not taken."""
    for field in description.read_fields:
        places = [name for name, table in tables.items() if field.column_name in table.names]
        if field.table is None and field.column_name in log.names:
            places.append("the log")
        if field.table is None and len(places) > 1:
            raise UserError(
                f"{log.source}: field {field.name}: column {field.column_name} stands in {' and in '.join(places)};"
                " say which by `table:`, or leave it out of one"
            )
    known = {field.column_name for field in description.read_fields} | {description.item, description.user}
    for field in description.fields:
        column = field.column_name
        is_past = description.history is None and field.kind == "sequence"
        if is_past and column in log.names and column not in known:
            raise UserError(
                f"{log.source}: column {column} holds a history, which sequence field {field.name} does not read: write"
                f" `history: {{items: {column}}}` to take it as each row's history, or name the field {field.of}"
                " to have one made of the log's clicks"
            )


def _joined(rows: pl.LazyFrame, name: str, table: Table, description: Description) -> tuple[pl.LazyFrame, list[str]]:
    """The rows with the fields that a table holds, by its key."""
    form = description.tables[name]
    fields = [f for f in description.read_fields if description.table_of(f, {name: table}) == name]
    key = f" key of {name}"
    uses = {key: Use(column=form.key or description.key_of(name), role="text"), **{f.name: f.use for f in fields}}
    held = table.columns(uses).drop(ROW).collect(engine="streaming")
    repeated = held[key].filter(held[key].is_duplicated()).drop_nulls()
    if repeated.len():
        raise UserError(f"{table.source}, column {uses[key].column}: expected each key once, got {repeated[0]} again")
    held = held.filter(pl.col(key).is_not_null())
    counts = rows.select(
        num=pl.len(), missing=(pl.col(key).is_null() | ~pl.col(key).is_in(held[key].implode())).sum()
    ).collect(engine="streaming")
    num, missing = counts.row(0)
    if num == missing:
        example = rows.select(pl.col(key).drop_nulls().first()).collect(engine="streaming").item()
        raise UserError(
            f"{table.source}: no row of the log has its {description.key_of(name)} in column {uses[key].column}; the"
            f" log has {example!r}, the table {held[key].first()!r}"
        )
    notes = list(table.notes)
    if missing:
        notes.append(f"{missing:,} of {num:,} rows have no {name} in {table.source}: their fields are absent")
    return rows.join(held.lazy(), on=key, how="left", maintain_order="left").drop(key), notes


def _with_history(rows: pl.LazyFrame, description: Description, log: Table) -> tuple[pl.LazyFrame, dict[str, int]]:
    """Each row's past as the law of history has it: strictly earlier than the row, by time and then item id."""
    form = description.history
    assert form is not None
    uses = _uses_of_history(description)
    for name, use in uses.items():
        length = pl.col(name).list.len()
        unequal = length != pl.col(PAST_ITEM).list.len()
        if name not in (PAST_ITEM, PAST_TS):  # nothing at all: absent at every past item
            unequal &= length > 0
        row = rows.select(pl.when(unequal).then(ROW).min()).collect(engine="streaming").item()
        if row is not None:
            raise log.fail(row, use.column, f"as many values as there are in column {form.items}")
    types = {**{name: TYPES[use.role] for name, use in uses.items()}, PAST_TS: TYPES["times"]}
    struct = pl.Struct({**types, _DROPPED: pl.Int64})

    def in_order(series: pl.Series) -> pl.Series:
        return pl.Series([_past(row, tuple(types), description.history_length) for row in series], dtype=struct)

    past = pl.struct("ts", *uses).map_batches(in_order, return_dtype=struct, is_elementwise=True)
    rows = rows.with_columns(past.alias(_DROPPED)).with_columns(
        *(pl.col(_DROPPED).struct.field(name) for name in types), pl.col(_DROPPED).struct.field(_DROPPED)
    )
    num = rows.select(pl.col(_DROPPED).sum()).collect(engine="streaming").item()
    return rows.drop(_DROPPED), {"past items that were not earlier than their row": int(num)}


def _past(row: dict[str, Any], names: tuple[str, ...], limit: int) -> dict[str, Any]:
    num = len(row[PAST_ITEM])
    past_times = row.get(PAST_TS) or [row["ts"] - (num - place) for place in range(num)]
    places = sorted(range(num), key=lambda place: (past_times[place], row[PAST_ITEM][place]))
    earlier = [place for place in places if past_times[place] < row["ts"]]
    newest = earlier[max(len(earlier) - limit, 0) :]
    values = {name: past_times if name == PAST_TS else row[name] or [None] * num for name in names}
    return {**{name: [held[place] for place in newest] for name, held in values.items()}, _DROPPED: num - len(earlier)}


def _range(rows: pl.LazyFrame) -> str:
    first, last = rows.select(pl.col("ts").min(), pl.col("ts").max().alias("last")).collect(engine="streaming").row(0)
    return f"times run from {times.spoken(first)} to {times.spoken(last)}"


def _part(rows: pl.LazyFrame, split: ByTime | ByHash | ByColumn | ByFiles, log: Table) -> pl.Expr:
    match split:
        case ByTime():
            return _by_time(rows, split, log)
        case ByHash():
            return _by_hash(split)
        case ByColumn():
            return _by_column(rows, split, log)
    return pl.col(PART)


def _by_time(rows: pl.LazyFrame, split: ByTime, log: Table) -> pl.Expr:
    ts = np.sort(rows.select("ts").collect(engine="streaming")["ts"].to_numpy())
    first_valid, first_test = cuts_in_time(ts, valid=split.valid, test=split.test)
    if not ts[0] < first_valid < first_test:
        raise UserError(f"{log.source}: {_crowd(ts, split)}")
    part = pl.when(pl.col("ts") < first_valid).then(pl.lit("train"))
    return part.when(pl.col("ts") < first_test).then(pl.lit("valid")).otherwise(pl.lit("test"))


def _crowd(ts: NDArray[np.float64], split: ByTime) -> str:
    different, counts = np.unique(ts, return_counts=True)
    most = int(counts.argmax())
    return (
        f"expected times that can be split {1 - split.valid - split.test:.0%}, {split.valid:.0%} and {split.test:.0%},"
        f" got {len(different):,} different ones in {len(ts):,} rows: {counts[most]:,} rows share"
        f" {times.spoken(different[most])}, and rows of one time stay in one part; choose larger shares, or split by"
        " hash or column"
    )


def _by_hash(split: ByHash) -> pl.Expr:
    """Each row's part by a hash of its `of` value (else its number): the same in every run and version."""

    def parts(values: pl.Series) -> pl.Series:
        return pl.Series([_hashed(value or "", split) for value in values], dtype=pl.String)

    value = pl.col(ROW).cast(pl.String) if split.of is None else pl.col(_OF)
    return value.map_batches(parts, return_dtype=pl.String, is_elementwise=True)


def _hashed(value: str, split: ByHash) -> str:
    digest = hashlib.blake2b(f"{split.seed}:{value}".encode(), digest_size=8).digest()
    point = int.from_bytes(digest) / 2**64
    return "test" if point < split.test else "valid" if point < split.test + split.valid else "train"


def _by_column(rows: pl.LazyFrame, split: ByColumn, log: Table) -> pl.Expr:
    parts = {split.train: "train", split.valid: "valid", split.test: "test"}
    values = rows.select(pl.col(_FOLD).unique()).collect(engine="streaming")[_FOLD].to_list()
    strange = sorted(value or "" for value in values if value not in parts)
    if strange:
        expected = ", ".join(map(repr, parts))
        raise UserError(
            f"{log.source}, column {split.column}: expected one of {expected}, got {strange[0] or 'nothing'!r}"
        )
    return pl.col(_FOLD).replace_strict(parts, return_dtype=pl.String)
