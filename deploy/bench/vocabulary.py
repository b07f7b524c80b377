"""What loading a model with a large vocabulary does to a process that serves: for how long it stops everything else.

    python deploy/bench/vocabulary.py [--users 1000000] [--ads 250000] [--turns 3]

Makes an artifact of logistic regression, whose size is in its schema, and reads it on a thread, as a swap does, while
another asks for its turn each half millisecond, as an event loop does for every request. Without any reading, how long
that waits says how still the machine is. Markdown on stdout: medians over the turns.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch

from models import zoo
from models.artifact import folder as artifact
from models.artifact.calibration import Calibration
from models.features.encoder import Encoder
from models.features.field import FieldSpec
from models.features.request import Request
from models.features.schema import Schema, SchemaSpec
from service.runtime import backends
from training.export import export

T = TypeVar("T")

TICK_S = 0.0005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--ads", type=int, default=250_000)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        path = _artifact(options.users, options.ads, Path(folder))
        content = (path / "schema.json").read_bytes()
        schema = Schema.from_json(content)
        parts: dict[str, Callable[[], object]] = {
            "nothing, for a second": lambda: time.sleep(1),  # waits without Python's lock: what the machine alone does
            "the schema": lambda: Schema.from_json(content),
            "the encoder": lambda: Encoder(schema),
            "the graph": lambda: backends.load(read, "onnx", "cpu"),
            "all, from the folder": lambda: backends.load(artifact.read(path), "onnx", "cpu"),
        }
        read = artifact.read(path)
        print(f"{len(content) / 1e6:.1f} MB of schema, {options.users + options.ads:,} values\n")
        print("| read | seconds | longest stop, ms |\n|---|---|---|")
        for name, part in parts.items():
            turns = [_stopped(part) for _ in range(options.turns)]
            took_s, stop_s = (statistics.median(column) for column in zip(*turns, strict=True))
            print(f"| {name} | {took_s:.2f} | {1000 * stop_s:.0f} |", flush=True)


def _stopped(work: Callable[[], T]) -> tuple[float, float]:
    """Seconds that it took on a thread of its own, and the longest that this one waited for its turn meanwhile."""
    kept: list[T] = []  # what is thrown away is thrown away after the clock
    thread = threading.Thread(target=lambda: kept.append(work()))
    longest, began = 0.0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        asked = time.perf_counter()
        time.sleep(TICK_S)  # gives the lock away and wants it back, which is what is measured
        longest = max(longest, time.perf_counter() - asked - TICK_S)
    return time.perf_counter() - began, longest


def _artifact(users: int, ads: int, root: Path) -> Path:
    spec = SchemaSpec(
        user_key="user_id",
        item_key="item_id",
        fields=(
            FieldSpec(name="user_id", kind="categorical", group="user"),
            FieldSpec(name="item_id", kind="categorical", group="item"),
        ),
    )
    names = {"user_id": [f"user-{n}" for n in range(users)], "item_id": [f"{n}" for n in range(ads)]}
    schema = spec.fit(names)
    torch.manual_seed(2026)
    asked = Request(
        user={"user_id": "user-0"},
        context={},
        ts=1_800_000_000.0,
        behaviours=[],
        items={"item_id": ["0", "1"]},
        num_items=2,
    )
    model = zoo.build("lr", {}, schema).eval()
    calibration = Calibration()
    return export(
        "lr",
        {},
        model,
        schema,
        calibration=calibration,
        metrics={},
        golden_requests=[asked],
        data_hash="made",
        out=root,
    )


if __name__ == "__main__":
    main()
