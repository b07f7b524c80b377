"""From Parquet files into the store: past clicks, and the raw features of users and items."""

import hashlib
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from models.features.values import Row, canonical
from service.ids import MAX_ID_LENGTH, YEAR_10000
from service.store.codec import Click, pack_row
from service.store.feature_store import FeatureStore

T = TypeVar("T")

_BATCH = 1000
_ROW = " row"  # the column that numbers a file's rows, for messages: no file's own column has this name


class LoadError(ValueError):
    """A file that cannot be loaded: what was expected, what came, where."""


async def load_behaviours(path: Path, store: FeatureStore) -> int:
    """Append a file's clicks to their users' pasts; returns how many were new.

    Columns `user`, `item`, `ts` (Unix seconds); if there is a `type` (click or impression), only its clicks count.
    Without an `event_id` a click is known by its user, item, time and how many such stand before it, so loading a file
    again changes nothing. Further columns are the item's features at that time; the others are taken as stored now.
    """
    frame = _read(path)
    for name in ("user", "item", "ts"):
        if name not in frame.columns:
            raise LoadError(f"{path}: no column {name}; there are {', '.join(frame.columns)}")
    if not frame.schema["ts"].is_numeric():
        raise LoadError(f"{path}: column ts: expected Unix seconds, got {frame.schema['ts']}")
    if "type" in frame.columns:
        frame = _of_clicks(path, frame)
    # One user's clicks together and oldest first: few scripts to run, and each adds at the end.
    clicks = _clicks(path, frame.with_row_index(_ROW).sort("user", "ts"))
    new = 0
    for batch in _batches(clicks, total=frame.height, what="clicks"):
        new += sum(await store.append(batch))
    return new


def _of_clicks(path: Path, frame: Any) -> Any:
    import polars as pl

    types = set(frame["type"].cast(pl.String).unique())
    if not types <= {"click", "impression"}:
        odd = min(str(other) for other in types - {"click", "impression"})
        raise LoadError(f"{path}: column type: expected click or impression, got {odd}; call a feature otherwise")
    return frame.filter(pl.col("type").cast(pl.String) == "click").drop("type")


async def load_features(kind: Literal["users", "items"], path: Path, store: FeatureStore) -> int:
    """Put a file's rows as users' or items' features; returns how many.

    The id is the column `user` or `item`, or else the first; every other column is a feature.
    """
    frame = _read(path)
    name = kind.removesuffix("s")
    key = name if name in frame.columns else frame.columns[0]
    put = store.put_users if kind == "users" else store.put_items
    rows = _rows(path, frame, key)
    for batch in _batches(rows, total=frame.height, what=kind):
        await put(dict(batch))
    return int(frame.height)


def _read(path: Path) -> Any:
    import polars as pl

    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as err:
        raise LoadError(f"{path}: not a readable Parquet file: {str(err).splitlines()[0]}") from err
    if not frame.columns:
        raise LoadError(f"{path}: no columns")
    for name, dtype in frame.schema.items():
        inner = dtype.inner if isinstance(dtype, pl.List) else dtype
        if not (inner.is_integer() or inner.is_float() or inner in (pl.String, pl.Boolean, pl.Categorical, pl.Null)):
            raise LoadError(f"{path}: column {name}: expected strings, numbers, booleans or lists of them, got {dtype}")
    return frame


def _clicks(path: Path, frame: Any) -> Iterator[Click]:
    features = [name for name in frame.columns if name not in (_ROW, "user", "item", "ts", "event_id")]
    same: dict[tuple[str, float], int] = {}
    last_user = None
    for row in frame.iter_rows(named=True):
        user, item = _id(path, row, "user"), _id(path, row, "item")
        ts = row["ts"]
        if ts is None or not 0 <= ts < YEAR_10000:
            raise LoadError(f"{path}: row {row[_ROW]}: ts: expected Unix seconds, got {ts}")
        ts = float(ts)
        if user != last_user:
            same, last_user = {}, user
        if "event_id" in row:
            event_id = _id(path, row, "event_id")
        else:
            occurrence = same[item, ts] = same.get((item, ts), -1) + 1
            event_id = _derived_id(user, item, ts, occurrence)
        yield Click(event_id=event_id, user=user, item=item, ts=ts, features=_features(path, row, features))


def _derived_id(user: str, item: str, ts: float, occurrence: int) -> str:
    return hashlib.blake2b(repr((user, item, ts, occurrence)).encode(), digest_size=16).hexdigest()


def _rows(path: Path, frame: Any, key: str) -> Iterator[tuple[str, Row]]:
    features = [name for name in frame.columns if name != key]
    for row in frame.with_row_index(_ROW).iter_rows(named=True):
        yield _id(path, row, key), _features(path, row, features)


def _id(path: Path, row: dict[str, Any], column: str) -> str:
    try:
        spelled = canonical(row[column])
    except TypeError:
        spelled = None
    if spelled is None or not 0 < len(spelled) <= MAX_ID_LENGTH:
        told = repr(row[column])
        told = told if len(told) <= MAX_ID_LENGTH else f"{len(spelled or told)} characters"
        raise LoadError(
            f"{path}: row {row[_ROW]}: column {column}: expected an id of 1 to {MAX_ID_LENGTH} characters, got {told}"
        )
    return spelled


def _features(path: Path, row: dict[str, Any], names: Iterable[str]) -> Row:
    features = {name: row[name] for name in names if row[name] is not None}
    try:
        pack_row(features)
    except ValueError as err:
        raise LoadError(f"{path}: row {row[_ROW]}: {err}") from err
    return features


def _batches(rows: Iterator[T], *, total: int, what: str) -> Iterator[list[T]]:
    """Groups of rows, each told on stderr when it is done."""
    done = 0
    started = time.monotonic()
    while batch := list(islice(rows, _BATCH)):
        yield batch
        done += len(batch)
        rate = done / max(time.monotonic() - started, 1e-9)
        end = "\r" if sys.stderr.isatty() and done < total else "\n"
        if end == "\r" or done == total or done * 10 // total > (done - len(batch)) * 10 // total:
            print(f"{done} of {total} {what}, {rate:.0f} a second", end=end, file=sys.stderr, flush=True)
