"""Raw files to prepared data: a log is split, the schema fitted on its training part, every row encoded once to disk.

    DIR/schema.json         the fitted schema
    DIR/dataset.json        what was prepared: counts, click rates, the hash of the raw files
    DIR/data.txt            what was read, and what looks odd in it; data.json has the same figures, data.png the click
                            rate over time
    DIR/golden.json         a few raw requests (as `artifact.golden.request_to_json` writes them) for the artifact
    DIR/{train,valid,test}/ <input>.npy (ids int32, numbers float32), label.npy, group.npy (the user's number, -1 for
                            none), request.npy (rows of one request are alike in all but the candidate), start.npy and
                            end.npy (the row's history in DIR/events), ts.npy (the row's own time, float64),
                            <truth>.npy where known, weight.npy where rows have one
    DIR/events/             hist.<field>.npy and ts.npy: every click, by user, then time, then item id
    DIR/raw/                test.parquet, behaviours.parquet (clicks before the test part), users.parquet, items.parquet

Rows stand in time order, rows of one time in the order of the file.
"""

import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from models.artifact.golden import request_to_json
from models.features.column_encoding import EncodingError
from models.features.field import event_fields
from models.features.schema import Schema
from models.features.values import SchemaError
from training.data import data_report
from training.data.encode import fit, write_events, write_parts
from training.data.golden import golden_requests
from training.data.history import Windows, clicks_of, in_blocks
from training.data.past import Past
from training.data.time_order import complete
from training.datasets import (
    amazon,
    avazu,
    criteo,
    eleme,
    frappe,
    ipinyou,
    lastfm,
    movielens,
    movielens_tag,
    simulated,
    table_files,
    tabular,
)
from training.datasets import options as choices
from training.errors import UserError
from training.log import PARTS, PAST_ITEM, ROW, Log, write_parquet
from training.progress import say

REPORT = ("data.json", "data.txt", "data.png")
CONTENTS = ("schema.json", "dataset.json", "golden.json", *REPORT, *PARTS, "events", "raw")
DATASETS: Mapping[str, Callable[..., Log]] = {
    "movielens-1m": movielens.load,
    "movielens-tag": movielens_tag.load,
    "frappe": frappe.load,
    "lastfm": lastfm.load,
    "criteo": criteo.load,
    "avazu": avazu.load,
    "ipinyou": ipinyou.load,
    "amazon": amazon.load,
    "eleme": eleme.load,
    "simulated": simulated.load,
}


def prepare(
    dataset: str | None, source: Path, out: Path, schema_yaml: Path | None = None, settings: Sequence[str] = ()
) -> dict[str, Any]:
    """Prepare a known data set or, with `schema_yaml`, any CSV or Parquet file; returns what dataset.json holds.

    `settings` are `key=value`, for the data set's options. `out` appears whole or not at all; an earlier prepared
    folder of that name is replaced, and what a killed call for it left is removed. Memory does not grow with the rows,
    but with the different values and the clicks of known users. Raises UserError.
    """
    began = time.perf_counter()
    out = out.resolve()
    _check_target(out, source, schema_yaml)
    say(f"reading {source}")
    log, options = _load(dataset, source, schema_yaml, settings)
    for note in log.notes:
        say(f"note: {note}")
    with _draft(out) as draft:
        rows = complete(log, draft / "spill")
        counts = {part: _counts(rows, part) for part in PARTS}
        sizes = {part: mine["rows"] for part, mine in counts.items()}
        past = Past(rows, log.spec) if PAST_ITEM in rows.collect_schema().names() else None
        clicks = clicks_of(_past(rows, log), log.history)
        num_events = clicks.height if past is None else past.num_events
        try:
            say(f"fitting the schema on {sizes['train']:,} training rows")
            schema = fit(log.spec, rows)
            (draft / "schema.json").write_text(schema.to_json())
            windows = Windows(clicks) if past is None else past.windows()
            write_parts(draft, rows, schema, windows, sizes, *log.truth)
            if schema.history_length:
                events = in_blocks(clicks) if past is None else past.blocks()
                write_events(draft / "events", events, num_events, schema)
        except (SchemaError, EncodingError) as err:
            raise UserError(f"{source}: {err}") from err
        _write_raw(draft / "raw", rows, clicks, log, past)
        requests = [request_to_json(request) for request in golden_requests(rows, clicks, log.spec, past)]
        (draft / "golden.json").write_text(json.dumps(requests, allow_nan=False))
        about = _about(log, options, schema, counts) | {
            "num_events": num_events if schema.history_length else 0,
            **_different(rows),
        }
        (draft / "dataset.json").write_text(json.dumps(about, indent=2, allow_nan=False))
        data_report.write(draft, data_report.report(log, rows, schema))
        shutil.rmtree(draft / "spill")
    took = time.perf_counter() - began
    num = sum(sizes.values())
    say(f"wrote {out}: {num:,} rows in {took:.1f} s ({num / took:,.0f} rows/s)")
    return about


def _load(
    dataset: str | None, source: Path, schema_yaml: Path | None, settings: Sequence[str]
) -> tuple[Log, dict[str, Any]]:
    if not (source.exists() or (schema_yaml is not None and table_files.exists(source))):
        raise UserError(f"{source}: no such file or folder")
    if schema_yaml is not None and dataset is not None:
        raise UserError(f"expected a known data set or --schema FILE.yaml, got both {dataset} and {schema_yaml}")
    if schema_yaml is not None:
        if settings:
            raise UserError(f"--set {settings[0]}: all there is to choose stands in {schema_yaml}")
        return tabular.load(source, schema_yaml), {}
    if dataset is None or dataset not in DATASETS:
        known = ", ".join(DATASETS)
        raise UserError(f"expected a known data set ({known}) or --schema FILE.yaml, got {dataset or 'neither'}")
    options = choices.parse(dataset, DATASETS[dataset], settings)
    if options is None:
        return DATASETS[dataset](source), {}
    return DATASETS[dataset](source, options), asdict(options)


def _counts(rows: pl.LazyFrame, part: str) -> dict[str, int]:
    mine = rows.filter(pl.col("part") == part).select(
        pl.len().alias("rows"), clicks=pl.col("label").cast(pl.Int64).sum()
    )
    return {name: int(number) for name, number in mine.collect(engine="streaming").row(0, named=True).items()}


def _past(rows: pl.LazyFrame, log: Log) -> pl.LazyFrame:
    """The columns that a past click is made of: what a model sees of it, or just when it was."""
    item = [f.name for f in log.spec.fields if f.group == "item"] if log.spec.history_length else []
    columns = set(rows.collect_schema().names())  # a log that brings its histories may have fields of past events only
    events = [f.name for f in event_fields(log.spec.fields) if f.name in columns]
    return rows.select("group", "user", "item", "ts", "label", *item, *events)


def _write_raw(folder: Path, rows: pl.LazyFrame, clicks: pl.DataFrame, log: Log, past: Past | None) -> None:
    """What the service is fed when the test part is replayed.

    Of a user or an item the newest features before that: where they change, later ones would tell what was to come. Of
    one that was never seen before the first.
    """
    folder.mkdir()
    test = rows.filter(pl.col("part") == "test")
    context = [f.name for f in log.spec.fields if f.group == "context" and f.kind != "time"]
    event_names = [f.name for f in event_fields(log.spec.fields)]
    columns = rows.collect_schema().names()
    extra = dict.fromkeys((*context, *(name for name in event_names if name in columns), *log.truth))
    write_parquet(test.select("request", "user", "item", "ts", "label", *extra), folder / "test.parquet")
    first = test.select(pl.col("ts").min()).collect(engine="streaming").item()
    events = clicks if past is None else _newest(rows.filter(pl.col("ts") < first), past)
    before = events.filter(pl.col("ts") < first).sort("ts", maintain_order=True)
    write_parquet(before.select("user", "item", "ts", *event_names), folder / "behaviours.parquet")
    numbered = rows.with_row_index(ROW)
    for key in ("user", "item"):
        key_column = log.spec.user_key if key == "user" else log.spec.item_key
        features = [f.name for f in log.spec.fields if f.group == key and f.name != key_column]
        chosen = _newest_rows(numbered.select(key, "ts", ROW), key, first)
        table = numbered.filter(pl.col(ROW).is_in(chosen.implode())).select(pl.col(key).alias("id"), *features)
        write_parquet(table, folder / f"{key}s.parquet")


def _newest_rows(rows: pl.LazyFrame, key: str, first: float) -> pl.Series:
    """By user or item the number of its newest row before `first`, else of its oldest. In no order."""
    # An aggregate over a filtered group would hold the group's rows, and a join of the numbers all columns of the log.
    before = pl.when(pl.col("ts") < first).then(ROW).max()
    groups = rows.filter(pl.col(key).is_not_null()).group_by(key).agg(before=before, oldest=pl.col(ROW).min())
    return groups.select(pl.coalesce("before", "oldest")).collect(engine="streaming").to_series()


def _newest(rows: pl.LazyFrame, past: Past) -> pl.DataFrame:
    """The past events of each user's last row."""
    numbered = rows.filter(pl.col("user").is_not_null()).with_row_index(ROW)
    last = numbered.group_by("user").agg(pl.col(ROW).max()).select(ROW)
    return past.events(numbered.join(last, on=ROW, how="semi").sort(ROW).collect(engine="streaming"))


def _about(
    log: Log, options: dict[str, Any], schema: Schema, counts: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    return {
        "name": log.name,
        "source": str(log.source),
        "options": options,
        "data_hash": _hash(log.files, options),
        "schema_fingerprint": schema.fingerprint,
        "num_rows": {part: mine["rows"] for part, mine in counts.items()},
        "click_rate": {part: round(mine["clicks"] / mine["rows"], 6) for part, mine in counts.items()},
        "history_length": schema.history_length,
        "negative_rate": log.negative_rate,
        "notes": list(log.notes),
    }


def _different(rows: pl.LazyFrame) -> dict[str, int]:
    # One after the other, as the values of both together take twice the memory.
    num = {key: rows.select(pl.col(key).drop_nulls().n_unique()) for key in ("user", "item")}
    return {f"num_{key}s": int(one.collect(engine="streaming").item()) for key, one in num.items()}


def _hash(files: tuple[Path, ...], options: dict[str, Any]) -> str:
    """Of the raw bytes and of what was chosen: the same rows come of the same hash."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if options:
        digest.update(json.dumps(options, sort_keys=True).encode())
    return digest.hexdigest()


def _check_target(out: Path, *inputs: Path | None) -> None:
    if out.exists() and not (out / "dataset.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: expected a new, an empty or a prepared folder, found something else there")
    strange = sorted({path.name for path in out.iterdir()} - set(CONTENTS)) if out.exists() else []
    if strange:
        raise UserError(
            f"{out}: expected a prepared folder and nothing else in it, as it is replaced; found {strange[0]}"
        )
    for path in inputs:
        if path is not None and path.resolve().is_relative_to(out):
            raise UserError(f"{path}: lies in {out}, which is replaced; name another folder")


@contextmanager
def _draft(out: Path) -> Iterator[Path]:
    """A folder that takes the name `out` when the block ends well, and vanishes when it does not."""
    # Not by process id: in another container another job has the same one, or a killed one had it.
    token = secrets.token_hex(4)
    draft, old = (out.with_name(f".{out.name}.{state}-{token}") for state in ("writing", "old"))
    _clear(out)
    try:
        draft.mkdir(parents=True)
    except OSError as err:
        raise UserError(f"{out}: expected a folder that can be made ({err.strerror})") from err
    try:
        with _locked(draft) as lock:
            with suppress(OSError):  # a file system without locks: then `_clear` leaves all as it is
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield draft
            if out.exists():
                out.rename(old)
            draft.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _clear(out: Path) -> None:
    """Removes what killed processes left beside `out`, which may be as large as the data; nothing of a living one.

    A prepared folder that was on its way to be replaced gets its name back.
    """
    for draft in out.parent.glob(f".{glob.escape(out.name)}.writing-*"):
        with suppress(OSError), _locked(draft) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error: its process lives
            old = out.with_name(f".{out.name}.old-{draft.name.rpartition('-')[2]}")
            if old.exists() and not out.exists():
                old.rename(out)
            shutil.rmtree(draft, ignore_errors=True)
    for old in out.parent.glob(f".{glob.escape(out.name)}.old-*"):
        if not out.with_name(f".{out.name}.writing-{old.name.rpartition('-')[2]}").exists():
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """For a lock on the folder, which ends with the block or with the process, however that ends."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        yield lock
    finally:
        os.close(lock)
