"""A small prepared data set, drawn from a law in which history, user and item all matter."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.features.encoder import Encoder
from models.features.field import FieldSpec
from models.features.schema import SchemaSpec
from training.evaluation import run_report

ITEMS, USERS, GENRES, LENGTH = 40, 60, 4, 5


def write_prepared(folder: Path, *, num_rows: int = 2000, seed: int = 0) -> Path:
    """The layout `python -m training prepare` writes, for `num_rows` rows split 60/20/20 in order."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(USERS, size=num_rows), rng.integers(ITEMS, size=num_rows)
    price, ts = rng.gamma(2.0, 10.0, size=num_rows), np.float64(1.7e9) + 900.0 * np.arange(num_rows, dtype=np.float64)
    taste = rng.integers(GENRES, size=USERS)
    true_ctr = 1 / (1 + np.exp(-(2.5 * (item % GENRES == taste[user]) - 1.5 - 0.02 * price)))
    label = (rng.random(num_rows) < true_ctr).astype(np.float32)

    columns: dict[str, Any] = {
        "user_id": [f"u{u}" for u in user],
        "item_id": [f"i{i}" for i in item],
        "genre": [f"g{i % GENRES}" for i in item],
        "price": price,
    }
    fields = (
        FieldSpec(name="user_id", kind="categorical", group="user"),
        FieldSpec(name="hour", kind="time", group="context", part="hour"),
        FieldSpec(name="item_id", kind="categorical", group="item"),
        FieldSpec(name="genre", kind="categorical", group="item"),
        FieldSpec(name="price", kind="numeric", group="item", clip=False),  # tests tell rows apart by it
        FieldSpec(name="item_id", kind="sequence", group="behaviour", of="item_id"),
        FieldSpec(name="genre", kind="sequence", group="behaviour", of="genre"),
    )
    cuts = {"train": (0, num_rows * 6 // 10), "valid": (num_rows * 6 // 10, num_rows * 8 // 10)}
    cuts["test"] = (cuts["valid"][1], num_rows)
    spec = SchemaSpec(user_key="user_id", item_key="item_id", history_length=LENGTH, fields=fields)
    schema = spec.fit({name: column[: cuts["train"][1]] for name, column in columns.items()})
    encoder = Encoder(schema)
    clicks = np.flatnonzero(label)
    clicks = clicks[np.lexsort((ts[clicks], user[clicks]))]
    events = encoder.encode_events(
        {name: [columns[name][row] for row in clicks] for name in ("item_id", "genre")}, ts[clicks]
    )
    ends = [
        int(np.sum((user[clicks] < user[row]) | ((user[clicks] == user[row]) & (clicks < row))))
        for row in range(num_rows)
    ]
    starts = [int(np.sum(user[clicks] < user[row])) for row in range(num_rows)]

    rows = {
        **encoder.encode_requests(columns, ts),
        **encoder.encode_items(columns, num_rows),
        "label": label,
        "group": user,
        "request": np.arange(num_rows),
        "start": np.array(starts),
        "end": np.array(ends),
        "ts": ts,
        "true_ctr": true_ctr,
    }
    for part, (first, last) in cuts.items():
        (folder / part).mkdir(parents=True)
        for name, array in rows.items():
            small = (
                array.astype(np.int32)
                if name.split(".")[0] in ("user", "ctx", "item") and array.dtype == np.int64
                else array
            )
            np.save(folder / part / f"{name}.npy", small[first:last])
    (folder / "events").mkdir()
    for name, array in events.items():
        np.save(folder / "events" / f"{name}.npy", array if name == "ts" else array.astype(np.int32))
    (folder / "schema.json").write_text(schema.to_json())
    (folder / "dataset.json").write_text(json.dumps({"name": "tiny", "data_hash": f"seed {seed}"}))
    return folder


@contextmanager
def without_pictures() -> Iterator[None]:
    """Runs that are trained and not drawn: two pictures take as long as a few steps of training."""
    with pytest.MonkeyPatch.context() as patch:
        for plot in ("plot_curves", "plot_reliability"):
            patch.setattr(run_report, plot, lambda *_: None)
        yield


# A program that is killed just before its n-th file takes its name: in the middle of a checkpoint, or of a cell.
KILLED = """
import os, signal, sys
from pathlib import Path
from training.__main__ import main
left, rename = int(sys.argv[1]), Path.replace
def replace(path, target):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, target)
Path.replace = replace
main(sys.argv[2:])
"""
