"""What engine.py measures: an untrained MIAN over made users, ads and clicks, exported in both forms."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from models import zoo
from models.artifact import folder as artifact
from models.artifact.calibration import Calibration
from models.artifact.explanation import Explanation
from models.features.arrays import Arrays
from models.features.encoder import Encoder
from models.features.field import FieldSpec
from models.features.history import Event
from models.features.request import Request
from models.features.schema import Schema, SchemaSpec
from models.features.values import Row
from models.layers.base import CTRModel, Inputs, UserState
from training.export import export

HISTORY = 30  # T
CLICKS = 30  # of every user
NUM_USERS = 5_000
NUM_ITEMS = 10_000
NOW = 1_800_000_000.0
ROOT = Path(__file__).parents[2]

# Eight fields of the user, six of the context, five of the item, one of those with several values.
USER = {"age": 10, "gender": 3, "city": 300, "job": 40, "income": 8, "system": 6, "member": 2}
CONTEXT = {"device": 5, "page": 50, "slot": 6, "network": 4}
ITEM = {"brand": 500, "category": 60}
TAGS = 200
MOST_TAGS = 3
SPEC = SchemaSpec(
    user_key="user_id",
    item_key="item_id",
    history_length=HISTORY,
    fields=(
        *(FieldSpec(name=name, kind="categorical", group="user") for name in ("user_id", *USER)),
        *(FieldSpec(name=name, kind="categorical", group="context") for name in CONTEXT),
        FieldSpec(name="hour", kind="time", group="context", part="hour"),
        FieldSpec(name="weekday", kind="time", group="context", part="weekday"),
        *(FieldSpec(name=name, kind="categorical", group="item") for name in ("item_id", *ITEM)),
        FieldSpec(name="tags", kind="multi", group="item", max_values=MOST_TAGS),
        FieldSpec(name="price", kind="numeric", group="item"),
        *(FieldSpec(name=name, kind="sequence", group="behaviour", of=name) for name in ("item_id", *ITEM)),
    ),
)


@dataclass(frozen=True, kw_only=True)
class World:
    """Raw features by id, and each user's clicks, oldest first."""

    users: dict[str, Row]
    items: dict[str, Row]
    clicks: dict[str, list[tuple[str, float]]]


def make_world() -> World:
    """The same one every time."""
    draw = np.random.default_rng(2026)

    def values(sizes: dict[str, int]) -> Row:
        return {name: f"{name}{draw.integers(size)}" for name, size in sizes.items()}

    def tags() -> list[str]:
        return [f"tag{n}" for n in draw.choice(TAGS, size=draw.integers(1, MOST_TAGS + 1), replace=False)]

    users = {f"u{n}": values(USER) for n in range(NUM_USERS)}
    items: dict[str, Row] = {
        f"i{n}": {**values(ITEM), "tags": tags(), "price": round(float(draw.lognormal(2, 1)), 2)}
        for n in range(NUM_ITEMS)
    }
    clicked = draw.integers(NUM_ITEMS, size=(NUM_USERS, CLICKS)).tolist()
    hours = range(CLICKS, 0, -1)
    clicks = {
        user: [(f"i{n}", NOW - 3600 * ago) for n, ago in zip(past, hours, strict=True)]
        for user, past in zip(users, clicked, strict=True)
    }
    return World(users=users, items=items, clicks=clicks)


def fit(world: World) -> Schema:
    columns: dict[str, list[Any]] = {
        "user_id": list(world.users),
        **{name: [row[name] for row in world.users.values()] for name in USER},
        **{name: [f"{name}{n}" for n in range(size)] for name, size in CONTEXT.items()},
        "item_id": list(world.items),
        **{name: [row[name] for row in world.items.values()] for name in (*ITEM, "tags", "price")},
    }
    return SPEC.fit(columns)


def requests(world: World, num: int, num_candidates: int) -> list[Request]:
    """As the service would assemble them: users with all their clicks, items drawn evenly."""
    draw = np.random.default_rng([num, num_candidates])
    users, items = list(world.users), list(world.items)
    made = []
    for n in draw.integers(NUM_USERS, size=num).tolist():
        user = users[n]
        shown = [items[i] for i in draw.choice(NUM_ITEMS, size=num_candidates, replace=False).tolist()]
        made.append(
            Request(
                user={"user_id": user, **world.users[user]},
                context={name: f"{name}{draw.integers(size)}" for name, size in CONTEXT.items()},
                ts=NOW,
                behaviours=[Event(item=i, ts=ts, features=world.items[i]) for i, ts in world.clicks[user]],
                items={"item_id": shown, **{f: [world.items[i][f] for i in shown] for f in (*ITEM, "tags", "price")}},
                num_items=num_candidates,
            )
        )
    return made


def export_all(world: World, schema: Schema, artifacts: Path) -> None:
    """Two versions of `mian`, and `rows`, which has the second one's weights and gives its scores."""
    for seed in (2026, 2027):
        torch.manual_seed(seed)
        model = zoo.build("mian", {}, schema).eval()
        _export("mian", model, world, schema, artifacts)
    _export("rows", RowForm(model).eval(), world, schema, artifacts)
    request_form, row_form = (artifact.read(artifact.resolve(artifacts, n)).golden.logits for n in ("mian", "rows"))
    np.testing.assert_allclose(row_form, request_form, atol=1e-4)


def _export(name: str, model: CTRModel, world: World, schema: Schema, artifacts: Path) -> None:
    export(
        name,
        {},
        model,
        schema,
        calibration=Calibration(),
        metrics={},
        golden_requests=requests(world, 8, 4),
        data_hash="made",
        out=artifacts,
    )


class RowForm(CTRModel):
    """The model as a server runs it that scores rows: each candidate brings its own copy of the user.

    The copies are made inside the graph, where they cost next to nothing, so that everything around it is the same.
    """

    def __init__(self, model: CTRModel) -> None:
        super().__init__()
        self.model = model

    def encode_user(self, inputs: Inputs) -> UserState:
        return self.model.encode_user(_Rows(inputs))

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        return self.model.score(state, _Rows(inputs))

    def explanations(self) -> tuple[Explanation, ...]:
        return ()


class _Rows(Mapping[str, Tensor]):
    """A request's inputs, each repeated for every candidate when it is read."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def __getitem__(self, name: str) -> Tensor:
        index_C = self._inputs["user_index"]
        if name == "user_index":
            return torch.arange(index_C.shape[0])
        values = self._inputs[name]
        return values if name.startswith("item.") else values.index_select(0, index_C)

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)


def inputs(world: World, schema: Schema, num: int, num_candidates: int) -> list[Arrays]:
    """What a graph is fed for that many requests."""
    encoder = Encoder(schema)
    return [encoder.encode(request) for request in requests(world, num, num_candidates)]


def load(world: World, folder: Path, redis_url: str) -> None:
    """Everything that is known of users and items, into the store, by the service's own commands."""
    tables = {
        "users": pl.DataFrame([{"user": user, **row} for user, row in world.users.items()]),
        "items": pl.DataFrame([{"item": item, **row} for item, row in world.items.items()]),
        "behaviours": pl.DataFrame(
            [{"user": user, "item": item, "ts": ts} for user, past in world.clicks.items() for item, ts in past]
        ),
    }
    for name, frame in tables.items():
        frame.write_parquet(folder / f"{name}.parquet")
        kind = ["load-behaviours"] if name == "behaviours" else ["load-features", name]
        command = [sys.executable, "-m", "service", *kind, str(folder / f"{name}.parquet")]
        environment = {**os.environ, "CLICKSERVE_REDIS_URL": redis_url}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
