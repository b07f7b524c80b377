"""From Parquet files into the store: past clicks, and the raw features of users and items."""

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from models.features.values import Row, canonical
from service.ids import MAX_AHEAD_S, MAX_ID_LENGTH, YEAR_10000
from service.store.codec import Click, pack_row
from service.store.feature_store import FeatureStore

T = TypeVar("T")

_BATCH = 1000
_YEAR_1990 = 631_152_000  # before it a number is a date such as 20240101, or a row's number
_LABELS = ("click", "clicked", "clk", "is_click", "target")  # what others call a label
_ROW = " row"  # the column that numbers a file's rows, for messages: no file's own column has this name


class LoadError(ValueError):
    """A file that cannot be loaded: what was expected, what came, where."""


async def load_behaviours(path: Path, store: FeatureStore, now: Callable[[], float] = time.time) -> int:
    """Append a file's clicks to their users' pasts; returns how many were new.

    Columns `user`, `item`, `ts` (Unix seconds, or a Parquet time, which is UTC where it names no zone); if there is a
    `type` (click or impression) or a `label` (1 or 0), only its clicks count. As of events, clicks more than 300 s
    ahead of now are not taken, and are counted on stderr. Without an `event_id` a click is known by its user, item,
    time and how many such stand before it, so loading a file again changes nothing. Further columns are the item's
    features at that time; the others are taken as stored now.
    """
    frame = _read(path)
    for name in ("user", "item", "ts"):
        if name not in frame.columns:
            raise LoadError(f"{path}: no column {name}; there are {', '.join(frame.columns)}")
    frame = _of_clicks(path, _timed(path, frame.with_row_index(_ROW)))
    frame = _of_the_past(path, frame, now() + MAX_AHEAD_S)
    # One user's clicks together and oldest first: few scripts to run, and each adds at the end.
    clicks = _clicks(path, frame.sort("user", "ts"))
    new = 0
    for batch in _batches(clicks, total=frame.height, what="clicks"):
        new += sum(await store.append(batch))
    return new


def _timed(path: Path, frame: Any) -> Any:
    """The clicks with `ts` in Unix seconds."""
    import polars as pl

    dtype = frame.schema["ts"]
    if isinstance(dtype, pl.Datetime | pl.Date):
        return frame.with_columns(pl.col("ts").cast(pl.Datetime("us")).dt.epoch("us").cast(pl.Float64) / 1e6)
    if dtype == pl.Float32:
        raise LoadError(f"{path}: column ts: expected Unix seconds, got Float32, which holds them to two minutes only")
    if not dtype.is_numeric():
        raise LoadError(f"{path}: column ts: expected Unix seconds or a Parquet time, got {dtype}")
    return frame


def _of_clicks(path: Path, frame: Any) -> Any:
    import polars as pl

    if "type" in frame.columns:
        types = set(frame["type"].cast(pl.String).unique())
        if not types <= {"click", "impression"}:
            odd = min(str(other) for other in types - {"click", "impression"})
            raise LoadError(f"{path}: column type: expected click or impression, got {odd}; call a feature otherwise")
        frame = frame.filter(pl.col("type").cast(pl.String) == "click").drop("type")
    other = next((name for name in _LABELS if name in frame.columns and _is_label(frame[name])), None)
    if other is not None:
        raise LoadError(
            f"{path}: column {other} holds 0 and 1 alone: call it label, so that only clicks count, or leave it out"
        )
    if "label" not in frame.columns:
        return frame
    if not _is_label(frame["label"]):
        strange = next((v for v in frame["label"].to_list() if v not in (0, 1)), None)
        raise LoadError(
            f"{path}: column label: expected 0 or 1 in every row, got {strange!r}; call a feature otherwise"
        )
    return frame.filter(pl.col("label").cast(pl.Int8) == 1).drop("label")


def _is_label(column: Any) -> bool:
    import polars as pl

    if not (column.dtype.is_numeric() or column.dtype == pl.Boolean):
        return False
    return bool(column.cast(pl.Float64).is_in([0.0, 1.0]).fill_null(value=False).all())


def _of_the_past(path: Path, frame: Any, latest: float) -> Any:
    import polars as pl

    is_ahead = (pl.col("ts") > latest) & (pl.col("ts") < YEAR_10000)  # what is later still is refused with its row
    ahead = frame.filter(is_ahead)
    if ahead.height == 0:
        return frame
    row, ts = ahead.select(_ROW, "ts").row(0)
    text = datetime.fromtimestamp(ts, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    what = (
        f"{ahead.height} of {frame.height} clicks are more than {MAX_AHEAD_S:g} s ahead of now, the first in row {row}"
    )
    if ahead.height == frame.height:
        raise LoadError(f"{path}: {what} ({text}); are these local times? write them as UTC or with their zone")
    print(f"{path}: {what} ({text}): not loaded; are these local times?", file=sys.stderr)
    return frame.filter(~is_ahead.fill_null(value=False))


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
    """The rows of a file, or of all Parquet files in a folder or of a pattern, told by what they hold."""
    import polars as pl

    try:
        frame = pl.read_parquet(_parts(path), hive_partitioning=False, glob=not path.is_file())
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as err:
        raise LoadError(f"{path}: not a readable Parquet file: {str(err).splitlines()[0]}") from err
    if not frame.columns:
        raise LoadError(f"{path}: no columns")
    frame = frame.with_columns(id_text for name in frame.columns if (id_text := _spelled(frame[name])) is not None)
    for name, dtype in frame.schema.items():
        inner = dtype.inner if isinstance(dtype, pl.List) else dtype
        is_time = name == "ts" and isinstance(dtype, pl.Datetime | pl.Date)
        is_value = inner.is_integer() or inner.is_float() or inner in (pl.String, pl.Boolean, pl.Categorical, pl.Null)
        if not (is_value or is_time):
            raise LoadError(f"{path}: column {name}: expected strings, numbers, booleans or lists of them, got {dtype}")
    return frame


def _parts(path: Path) -> Path | list[Path]:
    """The files of a folder, but for those whose name begins with `_` or `.`, as engines write beside their parts."""
    if not path.is_dir():
        return path
    found = [p for p in path.rglob("*") if p.is_file() and not any(n[0] in "_." for n in p.relative_to(path).parts)]
    return sorted(found) or path


def _spelled(column: Any) -> Any | None:
    """A column in the types that JSON has, as training spells it; None where it has them already."""
    import polars as pl

    dtype = column.dtype
    if dtype == pl.Float32 and column.name != "ts":  # 0.1 is stored as 0.1, not as 0.10000000149011612
        return column.cast(pl.String).cast(pl.Float64)
    if not dtype.is_decimal():
        return None
    # What warehouses export whole numbers as. Beyond 64 bits only text holds them, which is the same id.
    if dtype.scale == 0 or bool((column.cast(pl.Float64) == column.cast(pl.Float64).round()).all()):
        digits = column.cast(pl.String).str.replace(r"\.0*$", "")
        integers = digits.cast(pl.Int64, strict=False)
        return integers if integers.null_count() == column.null_count() else digits
    return column.cast(pl.Float64)


def _clicks(path: Path, frame: Any) -> Iterator[Click]:
    features = [name for name in frame.columns if name not in (_ROW, "user", "item", "ts", "event_id")]
    same: dict[tuple[str, float], int] = {}
    last_user = None
    for row in frame.iter_rows(named=True):
        user, item = _id(path, row, "user"), _id(path, row, "item")
        ts = row["ts"]
        if ts is None or not _YEAR_1990 <= ts < YEAR_10000:
            raise LoadError(f"{path}: row {row[_ROW]}: ts: expected Unix seconds from 1990 on, got {ts}")
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
        id_text = canonical(row[column])
    except TypeError:
        id_text = None
    if id_text is None or not 0 < len(id_text) <= MAX_ID_LENGTH:
        text = repr(row[column])
        text = text if len(text) <= MAX_ID_LENGTH else f"{len(id_text or text)} characters"
        raise LoadError(
            f"{path}: row {row[_ROW]}: column {column}: expected an id of 1 to {MAX_ID_LENGTH} characters, got {text}"
        )
    return id_text


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
