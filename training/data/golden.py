"""A few raw requests that travel with the model: read back, they must encode and score as they did in training."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from models.features.field import FieldSpec, Group, event_fields
from models.features.history import Event
from models.features.request import Request
from models.features.schema import SchemaSpec
from models.features.values import Row, Value
from training.data.history import Windows
from training.data.past import Past
from training.log import ROW

NUM_REQUESTS = 32
UNKNOWN = "never seen in training \N{SNOWMAN}"


def golden_requests(
    rows: pl.LazyFrame, clicks: pl.DataFrame, spec: SchemaSpec, past: Past | None = None
) -> list[Request]:
    """Requests of the validation and test parts, spread over time, with one to four candidates each.

    `past` is where the log brings its histories, which are then not those of the clicks. Four awkward ones stand at the
    end: no history, a user nobody knows, unknown values, and missing values.
    """
    later = rows.filter(pl.col("part") != "train")
    num = later.select(pl.len()).collect(engine="streaming").item()
    numbers = np.unique(np.linspace(0, num - 1, NUM_REQUESTS - 4).astype(np.int64)).tolist()
    chosen = later.with_row_index(ROW).filter(pl.col(ROW).is_in(numbers)).collect(engine="streaming")
    starts, ends = (Windows(clicks) if past is None else past.windows())(chosen)
    clicks = clicks if past is None else past.events(chosen)
    requests = []
    for number, row in enumerate(chosen.iter_rows(named=True)):
        # One click more than a model sees, so that dropping the oldest is exercised too.
        first = max(starts[number], ends[number] - spec.history_length - 1)
        seen = clicks[int(first) : int(ends[number])] if spec.history_length else clicks[:0]
        shown = chosen[[(number + step) % chosen.height for step in range(number % 4 + 1)]]
        requests.append(_request(row, seen, shown, spec))
    return [*requests, *_awkward(max(requests, key=lambda r: (len(r.behaviours), r.num_items)), spec)]


def _request(row: dict[str, Any], past: pl.DataFrame, shown: pl.DataFrame, spec: SchemaSpec) -> Request:
    candidates = [_raw(candidate, spec, "item") for candidate in shown.iter_rows(named=True)]
    return Request(
        user=_raw(row, spec, "user"),
        context=_raw(row, spec, "context"),
        ts=row["ts"],
        behaviours=[_event(click, spec) for click in past.iter_rows(named=True)],
        items={f.name: [candidate[f.name] for candidate in candidates] for f in _fields(spec, "item")},
        num_items=len(candidates),
    )


def _event(click: dict[str, Any], spec: SchemaSpec) -> Event:
    item = {name: value for name, value in _raw(click, spec, "item").items() if name != spec.item_key}
    features = {f.name: _value(click[f.name]) for f in event_fields(spec.fields)}
    return Event(item=click["item"], ts=click["ts"], features=item | features)


def _raw(row: dict[str, Any], spec: SchemaSpec, group: Group) -> dict[str, Value]:
    return {f.name: _value(row[f.name]) for f in _fields(spec, group)}


def _value(value: Value) -> Value:
    return None if isinstance(value, float) and math.isnan(value) else value


def _awkward(usual: Request, spec: SchemaSpec) -> list[Request]:
    nobody = {} if spec.user_key is None else {spec.user_key: UNKNOWN}
    return [
        replace(usual, behaviours=()),
        replace(usual, user=nobody, behaviours=()),
        _changed(usual, spec, _unknown),
        _changed(usual, spec, lambda _: None),
    ]


def _changed(usual: Request, spec: SchemaSpec, value: Callable[[FieldSpec], Value]) -> Request:
    """The request with `value(field)` in the place of every raw value; its past is of items of that kind too."""

    def row(group: Group) -> Row:
        return {f.name: value(f) for f in _fields(spec, group)}

    features = {name: v for name, v in row("item").items() if name != spec.item_key}
    features |= {f.name: value(f) for f in event_fields(spec.fields)}
    return replace(
        usual,
        user=row("user"),
        context=row("context"),
        behaviours=[replace(event, features=features) for event in usual.behaviours],
        items={name: [v] * usual.num_items for name, v in row("item").items()},
    )


def _unknown(field: FieldSpec) -> Value:
    if field.kind == "numeric" or field.discretise is not None:
        return 1e9
    return [UNKNOWN] if field.kind == "multi" else UNKNOWN


def _fields(spec: SchemaSpec, group: Group) -> list[FieldSpec]:
    return [f for f in spec.fields if f.group == group and f.kind != "time"]
