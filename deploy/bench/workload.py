"""The benchmarks' workload: users, ads and clicks, requests over them, and a model whose logits differ between ads.

    PYTHONPATH=CHECKOUT python deploy/bench/workload.py --out FOLDER [--model mian] [--weights FILE] [--sizes 100,1000]

exports it with the code of CHECKOUT, this one or an older one, into FOLDER:

- `artifacts/<model>/<version>`, what a service of that checkout serves;
- `graph.onnx`, the same from encoded tensors to logits in one graph: where the artifact makes item rows by a graph of
  its own, item.onnx, the two composed;
- for every number N of candidates `inputs-N.npz`, the encoded tensors of each request, and `logits-N.npy` [R, N], what
  the model itself says of them, offline;
- `weights.safetensors`, and `facts.json` on what was exported.

An untrained model's logits differ by 1e-7, and any answer equals them to 1e-6. So the weights are drawn wide enough for
every field to matter. With `--weights` they are those of another export, where they fit.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import numpy as np
import older_layout  # noqa: F401 - for older checkouts, before the imports of models
import onnx
import onnx.compose
import polars as pl
import safetensors.torch
import torch
from inputs import save_inputs
from numpy.typing import NDArray
from torch import nn

from models import zoo
from models.artifact.calibration import Calibration
from models.features.arrays import Arrays
from models.features.encoder import Encoder
from models.features.field import FieldSpec
from models.features.history import Event
from models.features.request import Request
from models.features.schema import Schema, SchemaSpec
from models.features.values import Row
from models.layers.base import CTRModel
from training.export import export

HISTORY = 30  # T, and the clicks of every user
NUM_USERS = 2_000
NUM_ITEMS = 10_000
NUM_REQUESTS = 64
SIZES = (100, 1000)
MIN_SPREAD = 1.2  # of the logits
GAINS = tuple(n / 10 for n in range(14, 31))  # of the layers: their weights' deviation over Xavier's
NOW = 1_790_000_000.0  # in the past: a store refuses clicks ahead of its clock
ROOT = Path(__file__).parents[2]

# Eight fields of the user, six of the context, five of the item, one of those with several values.
USER_FIELDS = {"age": 10, "gender": 3, "city": 300, "job": 40, "income": 8, "system": 6, "member": 2}
CONTEXT_FIELDS = {"device": 5, "page": 50, "slot": 6, "network": 4}
ITEM_FIELDS = {"brand": 500, "category": 60}
NUM_TAGS = 200
MAX_TAGS = 3
SPEC = SchemaSpec(
    user_key="user_id",
    item_key="item_id",
    history_length=HISTORY,
    fields=(
        *(FieldSpec(name=name, kind="categorical", group="user") for name in ("user_id", *USER_FIELDS)),
        *(FieldSpec(name=name, kind="categorical", group="context") for name in CONTEXT_FIELDS),
        FieldSpec(name="hour", kind="time", group="context", part="hour"),
        FieldSpec(name="weekday", kind="time", group="context", part="weekday"),
        *(FieldSpec(name=name, kind="categorical", group="item") for name in ("item_id", *ITEM_FIELDS)),
        FieldSpec(name="tags", kind="multi", group="item", max_values=MAX_TAGS),
        FieldSpec(name="price", kind="numeric", group="item"),
        *(FieldSpec(name=name, kind="sequence", group="behaviour", of=name) for name in ("item_id", *ITEM_FIELDS)),
    ),
)


@dataclass(frozen=True, kw_only=True)
class World:
    """Raw features by id, and each user's clicks, oldest first."""

    users: dict[str, Row]
    items: dict[str, Row]
    clicks: dict[str, list[tuple[str, float]]]


def make_world(*, num_users: int = NUM_USERS, num_items: int = NUM_ITEMS) -> World:
    """The same one every time for the same numbers."""
    draw = np.random.default_rng(2026)

    def values(sizes: dict[str, int]) -> Row:
        return {name: f"{name}{draw.integers(size)}" for name, size in sizes.items()}

    def tags() -> list[str]:
        return [f"tag{n}" for n in draw.choice(NUM_TAGS, size=draw.integers(1, MAX_TAGS + 1), replace=False)]

    users = {f"u{n}": values(USER_FIELDS) for n in range(num_users)}
    items: dict[str, Row] = {
        f"i{n}": {**values(ITEM_FIELDS), "tags": tags(), "price": round(float(draw.lognormal(2, 1)), 2)}
        for n in range(num_items)
    }
    clicked = draw.integers(num_items, size=(num_users, HISTORY)).tolist()
    hours_ago = range(HISTORY, 0, -1)
    clicks = {
        user: [(f"i{n}", NOW - 3600 * hours) for n, hours in zip(numbers, hours_ago, strict=True)]
        for user, numbers in zip(users, clicked, strict=True)
    }
    return World(users=users, items=items, clicks=clicks)


def fit(world: World) -> Schema:
    columns: dict[str, list[Any]] = {
        "user_id": list(world.users),
        **{name: [row[name] for row in world.users.values()] for name in USER_FIELDS},
        **{name: [f"{name}{n}" for n in range(size)] for name, size in CONTEXT_FIELDS.items()},
        "item_id": list(world.items),
        **{name: [row[name] for row in world.items.values()] for name in (*ITEM_FIELDS, "tags", "price")},
    }
    return SPEC.fit(columns)


def requests(world: World, num: int, num_candidates: int) -> list[Request]:
    """As a service assembles them: users with all their clicks, ads drawn evenly. The same ones every time."""
    draw = np.random.default_rng([num, num_candidates])
    users, items = list(world.users), list(world.items)
    drawn = []
    for n in draw.integers(len(users), size=num).tolist():
        user = users[n]
        ads = [items[i] for i in draw.choice(len(items), size=num_candidates, replace=False).tolist()]
        item_fields = (*ITEM_FIELDS, "tags", "price")
        drawn.append(
            Request(
                user={"user_id": user, **world.users[user]},
                context={name: f"{name}{draw.integers(size)}" for name, size in CONTEXT_FIELDS.items()},
                ts=NOW,
                behaviours=[Event(item=i, ts=ts, features=world.items[i]) for i, ts in world.clicks[user]],
                items={"item_id": ads, **{f: [world.items[i][f] for i in ads] for f in item_fields}},
                num_items=num_candidates,
            )
        )
    return drawn


def body(request: Request, *, columnar: bool) -> bytes:
    """The request as /predict takes it: ids, context and time; the store has the rest."""
    ids = list(request.items["item_id"])
    document = {
        "ts": request.ts,
        "user": {"id": request.user["user_id"]},
        "context": request.context,
        "candidates": {"id": ids} if columnar else [{"id": i} for i in ids],
        "timeout_ms": 60_000,  # no request of a closed loop is late
    }
    return json.dumps(document, separators=(",", ":")).encode()


def build(
    name: str, schema: Schema, sample: Sequence[Arrays], *, seed: int = 2026, weights: Path | None = None
) -> tuple[CTRModel, bool]:
    """A model in which every field matters, and whether it has the weights in the file.

    Without them, the first of GAINS is taken that gives the sample's logits a deviation of MIN_SPREAD, or the last.
    """
    for gain in GAINS:
        torch.manual_seed(seed)
        model = zoo.build(name, {}, schema).eval()
        draw_weights(model, gain)
        if weights is None and spread(model, sample) >= MIN_SPREAD:
            break
    if weights is None:
        return model, False
    try:
        model.load_state_dict(safetensors.torch.load_file(weights))
    except RuntimeError:  # another checkout's parameters have other names or shapes
        return build(name, schema, sample, seed=seed)
    return model, True


@torch.no_grad()
def draw_weights(model: CTRModel, gain: float) -> None:
    """Embeddings of unit variance and layers that keep it: as initialised, a model's logits are all the same."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding | nn.ParameterDict):  # of categories, and the directions of numbers
                parameter.normal_()
            elif parameter.dim() > 1:
                nn.init.xavier_normal_(parameter, gain=gain)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0


def spread(model: CTRModel, requests: Sequence[Arrays]) -> float:
    """The standard deviation of the requests' logits."""
    return float(np.concatenate([logits(model, arrays) for arrays in requests]).std())


@torch.no_grad()
def logits(model: CTRModel, arrays: Arrays) -> NDArray[np.float32]:
    """What the model itself says, offline."""
    found: NDArray[np.float32] = model({name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()
    return found


def export_model(name: str, model: CTRModel, world: World, schema: Schema, artifacts: Path) -> Path:
    return export(
        name,
        {},
        model,
        schema,
        calibration=Calibration(),
        metrics={},
        golden_requests=requests(world, 8, 4),
        data_hash="generated",
        out=artifacts,
    )


def export_workload(
    out: Path,
    *,
    model: str = "mian",
    sizes: Sequence[int] = SIZES,
    weights: Path | None = None,
    versions: int = 1,
    world: World | None = None,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    world = world or make_world()
    schema = fit(world)
    encoder = Encoder(schema)
    sample = [encoder.encode(request) for request in requests(world, 8, 50)]
    for number in range(1, versions):
        other, _ = build(model, schema, sample, seed=2026 + number)
        export_model(model, other, world, schema, out / "artifacts")
    built, has_weights = build(model, schema, sample, weights=weights)
    folder = export_model(model, built, world, schema, out / "artifacts")
    graph = composed_graph(folder)
    onnx.save(graph, str(out / "graph.onnx"))
    safetensors.torch.save_file(built.state_dict(), out / "weights.safetensors")
    spreads = {}
    for size in sizes:
        arrays = [encoder.encode(request) for request in requests(world, NUM_REQUESTS, size)]
        expected = np.stack([logits(built, one) for one in arrays])
        np.save(out / f"logits-{size}.npy", expected)
        save_inputs([graph_inputs(graph, schema, one) for one in arrays], out / f"inputs-{size}.npz")
        spreads[size] = float(expected.std())
    facts = {"model": model, "has_weights": has_weights, "logit_spread": spreads, **graph_facts(graph)}
    (out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def composed_graph(folder: Path) -> onnx.ModelProto:
    """An artifact's graph from encoded tensors to logits, with item.onnx, if it has one, composed into it."""
    model = onnx.load(str(folder / "model.onnx"))
    if not (folder / "item.onnx").exists():
        return model
    item = onnx.compose.add_prefix(
        onnx.load(str(folder / "item.onnx")), "item/", rename_inputs=False, rename_outputs=False
    )
    return onnx.compose.merge_models(item, model, io_map=[("items", "items")])


def graph_inputs(graph: onnx.ModelProto, schema: Schema, arrays: Arrays) -> Arrays:
    """What the graph takes, of the encoder's arrays of one request or, where it takes packed ones, of those packed."""
    names = [i.name for i in graph.graph.input]
    if not set(names) <= arrays.keys():
        from models.features.packing import PackedLayout

        arrays = PackedLayout(schema).pack(arrays)
    return {name: arrays[name] for name in names}


def graph_facts(graph: onnx.ModelProto) -> dict[str, int]:
    return {"inputs": len(graph.graph.input), "nodes": len(graph.graph.node)}


def load_store(world: World, folder: Path, redis_url: str, *, checkout: Path = ROOT) -> None:
    """Fill a store with everything known of users and ads, by that checkout's own commands."""
    tables = {
        "users": pl.DataFrame([{"user": user, **row} for user, row in world.users.items()]),
        "items": pl.DataFrame([{"item": item, **row} for item, row in world.items.items()]),
        "behaviours": pl.DataFrame(
            [{"user": user, "item": item, "ts": ts} for user, clicks in world.clicks.items() for item, ts in clicks]
        ),
    }
    for name, frame in tables.items():
        frame.write_parquet(folder / f"{name}.parquet")
        kind = ["load-behaviours"] if name == "behaviours" else ["load-features", name]
        command = [sys.executable, "-m", "service", *kind, str(folder / f"{name}.parquet")]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "CLICKSERVE_REDIS_URL": redis_url}
        subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=DEVNULL, stderr=DEVNULL)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="mian")
    parser.add_argument("--versions", type=int, default=1, help="of the artifact, of which the last is the current one")
    parser.add_argument("--weights", type=Path, help="weights.safetensors of another export")
    parser.add_argument("--sizes", type=lambda text: [int(n) for n in text.split(",")], default=list(SIZES))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    export_workload(
        options.out, model=options.model, sizes=options.sizes, weights=options.weights, versions=options.versions
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
