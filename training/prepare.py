"""Raw files to prepared data: a log is split, the schema fitted on its training part, every row encoded once to disk.

    DIR/schema.json         the fitted schema
    DIR/dataset.json        what was prepared: counts, click rates, the hash of the raw files
    DIR/golden.json         a few raw requests (as `models.artifact.request_to_json` writes them) for the artifact
    DIR/{train,valid,test}/ <input>.npy (ids int32, numbers float32), label.npy, group.npy (the user's number, -1 for
                            none), request.npy (rows of one request are alike in all but the candidate), start.npy and
                            end.npy (the row's history in DIR/events), <truth>.npy where known
    DIR/events/             hist.<field>.npy: every click, by user, then time, then item id
    DIR/raw/                test.parquet, behaviours.parquet (clicks before the test part), users.parquet, items.parquet

Rows stand in time order, rows of one time in the order of the file.
"""

import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars as pl
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0

from models.encoding import Arrays, Encoder, EncodingError
from models.requests import request_to_json
from models.schema import Column, Columns, Group, Schema, SchemaError, SchemaSpec
from training.datasets import frappe, movielens, simulated, tabular
from training.errors import UserError
from training.golden import golden_requests
from training.history import clicks_of, windows
from training.log import PARTS, Log, complete, write_parquet
from training.progress import bar, say

DATASETS: Mapping[str, Callable[[Path], Log]] = {
    "movielens-1m": movielens.load,
    "frappe": frappe.load,
    "simulated": simulated.load,
}
BLOCK = 100_000  # rows encoded at once: about 100 MB of Python values


def prepare(dataset: str | None, source: Path, out: Path, schema_yaml: Path | None = None) -> dict[str, Any]:
    """Prepare a known data set or, with `schema_yaml`, any CSV or Parquet file; returns what dataset.json holds.

    `out` appears whole or not at all; an earlier prepared folder of that name is replaced. Raises UserError.
    """
    began = time.perf_counter()
    out = out.resolve()
    _check_target(out)
    say(f"reading {source}")
    log = _load(dataset, source, schema_yaml)
    for note in log.notes:
        say(f"note: {note}")
    rows = complete(log)
    clicks = clicks_of(rows)
    with _draft(out) as draft:
        try:
            schema = _fit(log.spec, rows.filter(pl.col("part") == "train"))
            (draft / "schema.json").write_text(schema.to_json())
            for part in PARTS:
                _write_part(draft / part, rows.filter(pl.col("part") == part), clicks, schema, log.truth)
            if schema.history_length:
                _write_events(draft / "events", clicks, schema)
        except (SchemaError, EncodingError) as err:
            raise UserError(f"{source}: {err}") from err
        _write_raw(draft / "raw", rows, clicks, log)
        requests = [request_to_json(request) for request in golden_requests(rows, clicks, log.spec)]
        (draft / "golden.json").write_text(json.dumps(requests, allow_nan=False))
        about = _about(log, rows, clicks, schema)
        (draft / "dataset.json").write_text(json.dumps(about, indent=2, allow_nan=False))
    took = time.perf_counter() - began
    say(f"wrote {out}: {rows.height:,} rows in {took:.1f} s ({rows.height / took:,.0f} rows/s)")
    return about


def columns(rows: pl.DataFrame, spec: SchemaSpec | Schema, *groups: Group) -> Columns:
    """The raw columns of the fields of some groups, as the schema and the encoder take them."""
    fields = [f.name for f in spec.fields if f.group in groups and f.kind not in ("time", "sequence")]
    return {name: _column(rows[name]) for name in fields}


def _column(series: pl.Series) -> Column:
    # A column of integers with a gap would become doubles in numpy, and lose ids above 2^53.
    return series.to_numpy() if series.dtype.is_float() else series.to_list()


def _load(dataset: str | None, source: Path, schema_yaml: Path | None) -> Log:
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if schema_yaml is not None and dataset is not None:
        raise UserError(f"expected a known data set or --schema FILE.yaml, got both {dataset} and {schema_yaml}")
    if schema_yaml is not None:
        return tabular.load(source, schema_yaml)
    if dataset is None or dataset not in DATASETS:
        known = ", ".join(DATASETS)
        raise UserError(f"expected a known data set ({known}) or --schema FILE.yaml, got {dataset or 'neither'}")
    return DATASETS[dataset](source)


def _fit(spec: SchemaSpec, rows: pl.DataFrame) -> Schema:
    say(f"fitting the schema on {rows.height:,} training rows")
    return spec.fit(columns(rows, spec, "user", "context", "item"))


def _write_part(folder: Path, rows: pl.DataFrame, clicks: pl.DataFrame, schema: Schema, truth: tuple[str, ...]) -> None:
    folder.mkdir()
    encoder = Encoder(schema)
    files: dict[str, BinaryIO] = {}
    with ExitStack() as opened, bar(f"encoding {folder.name}", rows.height) as advance:
        for first in range(0, rows.height, BLOCK):
            block = rows.slice(first, BLOCK)
            arrays = encoder.encode_requests(columns(block, schema, "user", "context"), block["ts"].to_numpy())
            arrays |= encoder.encode_items(columns(block, schema, "item"), block.height)
            for name, array in _compact(arrays).items():
                if name not in files:
                    files[name] = opened.enter_context((folder / f"{name}.npy").open("wb"))
                    shape = (rows.height, *array.shape[1:])
                    header = {**header_data_from_array_1_0(array), "fortran_order": False, "shape": shape}
                    write_array_header_1_0(files[name], header)
                # Not through a memory map: on a full disk that ends the process with SIGBUS.
                files[name].write(array.tobytes())
            advance(block.height)
    np.save(folder / "label.npy", rows["label"].to_numpy().astype(np.float32))
    np.save(folder / "group.npy", rows["group"].to_numpy())
    np.save(folder / "request.npy", rows["request"].to_numpy().astype(np.int64))
    for name in truth:
        np.save(folder / f"{name}.npy", rows[name].to_numpy())
    if schema.history_length:
        starts, ends = windows(rows, clicks)
        np.save(folder / "start.npy", starts)
        np.save(folder / "end.npy", ends)


def _write_events(folder: Path, clicks: pl.DataFrame, schema: Schema) -> None:
    folder.mkdir()
    arrays = Encoder(schema).encode_events(columns(clicks, schema, "item"), clicks["ts"].to_numpy())
    for name, array in _compact(arrays).items():
        np.save(folder / f"{name}.npy", array)


def _compact(arrays: Arrays) -> Arrays:
    return {name: array.astype(np.int32) if array.dtype == np.int64 else array for name, array in arrays.items()}


def _write_raw(folder: Path, rows: pl.DataFrame, clicks: pl.DataFrame, log: Log) -> None:
    """What the service is fed when the test part is replayed."""
    folder.mkdir()
    test = rows.filter(pl.col("part") == "test")
    context = [f.name for f in log.spec.fields if f.group == "context" and f.kind != "time"]
    write_parquet(test.select("request", "user", "item", "ts", "label", *context, *log.truth), folder / "test.parquet")
    before = clicks.filter(pl.col("ts") < test["ts"][0]).sort("ts", maintain_order=True)
    write_parquet(before.select("user", "item", "ts"), folder / "behaviours.parquet")
    for key in ("user", "item"):
        own = log.spec.user_key if key == "user" else log.spec.item_key
        features = [f.name for f in log.spec.fields if f.group == key and f.name != own]
        newest = rows.filter(pl.col(key).is_not_null()).unique(key, keep="last", maintain_order=True)
        write_parquet(newest.select(pl.col(key).alias("id"), *features), folder / f"{key}s.parquet")


def _about(log: Log, rows: pl.DataFrame, clicks: pl.DataFrame, schema: Schema) -> dict[str, Any]:
    parts = {part: rows.filter(pl.col("part") == part) for part in PARTS}
    return {
        "name": log.name,
        "source": str(log.source),
        "data_hash": _hash(log.files),
        "schema_fingerprint": schema.fingerprint,
        "num_rows": {part: mine.height for part, mine in parts.items()},
        "click_rate": {part: round(int(mine["label"].sum()) / mine.height, 6) for part, mine in parts.items()},
        "num_users": rows["user"].drop_nulls().n_unique(),
        "num_items": rows["item"].drop_nulls().n_unique(),
        "num_events": clicks.height if schema.history_length else 0,
        "history_length": schema.history_length,
        "notes": list(log.notes),
    }


def _hash(files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _check_target(out: Path) -> None:
    if out.exists() and not (out / "dataset.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: expected a new, an empty or a prepared folder, found something else there")


@contextmanager
def _draft(out: Path) -> Iterator[Path]:
    """A folder that takes the name `out` when the block ends well, and vanishes when it does not."""
    # Not by process id: in another container another job has the same one, or a killed one had it.
    token = secrets.token_hex(4)
    draft, old = (out.with_name(f".{out.name}.{state}-{token}") for state in ("writing", "old"))
    try:
        draft.mkdir(parents=True)
    except OSError as err:
        raise UserError(f"{out}: expected a folder that can be made ({err.strerror})") from err
    try:
        yield draft
        if out.exists():
            out.rename(old)
        draft.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)
