"""What clicks themselves had, sent as events: served from either store, it is what training made of the log."""

import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import polars as pl
import pytest
import torch

from models import zoo
from models.artifact.calibration import Calibration
from models.features.encoder import Encoder
from models.features.history import Event
from models.features.request import Request
from models.layers.base import CTRModel
from service.app import create_app
from service.ingest.bulk_load import load_behaviours
from service.settings import Settings
from service.store.feature_store import FeatureStore
from service.store.memory_store import MemoryStore
from tests.models.small import lively
from training.data.batches import PARTS, Prepared
from training.data.prepare import prepare
from training.export import export

DOCS = Path(__file__).parents[2] / "docs" / "own_data.md"
START, NUM = 1_700_000_000, 300
MODEL = "fm"  # which pools the history, and is exported in a moment
OF_CLICKS = ("coins", "gadgets", "device", "spent")


def offers() -> list[dict[str, Any]]:
    # `device` is what the offer is for: its clicks have devices of their own.
    return [{"item": f"o{n}", "price": None if n == 3 else 1.5 * n, "device": "any"} for n in range(8)]


def log_rows() -> list[dict[str, Any]]:
    """A third of each value is absent; spent is known of clicks alone."""
    chance = random.Random(5)
    rows = []
    for n in range(NUM):
        offer, clicked = chance.choice(offers()), chance.random() < 0.5
        row = {
            "clicked": int(clicked), "player": f"p{chance.randrange(9)}", "at": START + 60 * n,
            "offer": offer["item"], "price": offer["price"],
            "coins": chance.choice([None, chance.randrange(5000), 0.5]),
            "gadgets": chance.choice([None, [], chance.sample(["bow", "7", "map", "axe"], 2)]),
            "device": chance.choice([None, "tv", "phone", f"rare {n}"]),
            "spent": chance.choice([None, chance.random() * 9]) if clicked else None,
        }  # fmt: skip
        rows.append(row)
    return rows


def example() -> str:
    """The YAML file of the documentation."""
    examples: list[str] = re.findall(r"```yaml\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    return next(text for text in examples if "coins" in text)


class Made(NamedTuple):
    data: Prepared
    model: CTRModel
    artifacts: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The documentation's example prepared, and a model of it, which is not trained: its every weight matters."""
    folder = tmp_path_factory.mktemp("game")
    pl.DataFrame(log_rows(), infer_schema_length=NUM).write_parquet(folder / "log.parquet")
    (folder / "game.yaml").write_text(example())
    prepare(None, folder / "log.parquet", folder / "data", folder / "game.yaml")
    data = Prepared.open(folder / "data")
    model = lively(MODEL, data.schema).float()
    export(
        MODEL, {}, model, data.schema, calibration=Calibration(slope=1.0, intercept=0.0),
        metrics={"valid": {"click_rate": 0.5}}, golden_requests=data.golden_requests(), data_hash="x",
        out=folder / "artifacts",
    )  # fmt: skip
    return Made(data, model, folder / "artifacts")


def event_of(n: int, row: dict[str, Any]) -> dict[str, Any]:
    """A click as a client sends it: some of what it had as its context."""
    features = {name: row[name] for name in ("coins", "gadgets", "spent") if row[name] is not None}
    return {
        "event_id": n, "type": "click", "ts": row["at"], "user": row["player"], "item": row["offer"],
        "features": features, "context": {"device": row["device"]},
    }  # fmt: skip


@asynccontextmanager
async def served(artifacts: Path, redis_url: str | None) -> AsyncIterator[tuple[httpx.AsyncClient, FeatureStore]]:
    arms = [{"name": "one", "model": MODEL, "share": 100}]
    settings = Settings(
        artifacts_dir=artifacts, experiment={"experiment": "e", "salt": "s", "arms": arms}, redis_url=redis_url,
        timeout_ms=60_000, store_timeout_ms=5000, keep_behaviours_days=36_500,
    )  # fmt: skip
    app = create_app(settings)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://s") as client:
        service = app.state.api.service
        assert service is not None
        yield client, service.store


def body_of(row: dict[str, Any], behaviours: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    context = {name: row[name] for name in ("coins", "gadgets", "device")}
    candidate = {"id": row["offer"], "features": {"price": row["price"]}}
    body = {"ts": row["at"], "user": {"id": row["player"]}, "context": context, "candidates": [candidate]}
    return body if behaviours is None else body | {"behaviours": behaviours}


@pytest.mark.parametrize("kind", ["memory", "redis"])
async def test_events_with_features_are_served_as_training_encoded_them(
    kind: str, made: Made, request: pytest.FixtureRequest
) -> None:
    rows, schema, encoder = log_rows(), made.data.schema, Encoder(made.data.schema)
    events = [event_of(n, row) for n, row in enumerate(rows) if row["clicked"]]
    random.Random(1).shuffle(events)
    test, first = made.data.rows("test"), NUM - len(made.data.rows("test"))
    differences, ctrs = [], []

    async with served(made.artifacts, request.getfixturevalue("redis_url") if kind == "redis" else None) as (
        client,
        store,
    ):
        await store.put_items({offer["item"]: offer for offer in offers()})
        receipt = (await client.post("/events", json=events)).json()
        assert receipt == {"accepted": len(events), "duplicates": 0, "rejected": []}
        for n, row in enumerate(rows[first:]):
            inputs = test.take(np.array([n])).inputs
            fetched = await store.fetch(row["player"], [], before=row["at"], limit=schema.history_length)
            for name, array in encoder.encode_history(fetched.behaviours, row["at"]).items():
                np.testing.assert_array_equal(array, inputs[name].numpy(), err_msg=name)
            past = [e for e in events if e["user"] == row["player"]]
            inline = [{name: e[name] for name in ("item", "ts", "features", "context")} for e in past]
            with torch.inference_mode():
                offline = made.model(inputs).sigmoid().item()
            for body in (body_of(row), body_of(row, sorted(inline, key=lambda e: (e["ts"], e["item"])))):
                answer = (await client.post("/predict", json=body)).json()
                assert answer["degraded"] == []
                ctrs.append(answer["predictions"][0]["ctr"])
                differences.append(abs(ctrs[-1] - offline))

    assert max(differences) < 1e-6
    assert np.std(ctrs) > 0.05  # an answer that is always the same would agree with a model that is, too


def test_every_row_is_encoded_as_its_request_with_the_values_of_the_clicks_own_rows(made: Made) -> None:
    rows, encoder, n = log_rows(), Encoder(made.data.schema), 0
    prices = {offer["item"]: offer["price"] for offer in offers()}
    pasts: dict[str, list[Event]] = {}
    for row in rows:
        if row["clicked"]:
            features = {name: row[name] for name in OF_CLICKS}
            event = Event(
                item=row["offer"],
                ts=row["at"],
                features=features,
                item_features={"price": prices[row["offer"]], "coins": 1},
            )
            pasts.setdefault(row["player"], []).append(event)

    for part in PARTS:
        encoded = made.data.rows(part)
        for place in range(len(encoded)):
            row, inputs = rows[n], encoded.take(np.array([place])).inputs
            asked = Request(
                user={"player": row["player"]}, context=row, ts=row["at"], behaviours=pasts.get(row["player"], ()),
                items={"offer": [row["offer"]], "price": [row["price"]]}, num_items=1,
            )  # fmt: skip
            for name, array in encoder.encode(asked).items():
                np.testing.assert_array_equal(array, inputs[name].numpy(), err_msg=f"row {n}: {name}")
            n += 1
    assert n == NUM


async def test_the_loaded_file_of_past_clicks_says_what_the_events_said(made: Made) -> None:
    store, encoder = MemoryStore(), Encoder(made.data.schema)
    await store.put_items({offer["item"]: offer for offer in offers()})
    await load_behaviours(made.data.path / "raw" / "behaviours.parquet", store)
    test = made.data.rows("test")
    row = log_rows()[NUM - len(test)]

    fetched = await store.fetch(row["player"], [], before=row["at"], limit=made.data.schema.history_length)

    inputs = test.take(np.array([0])).inputs
    assert inputs["hist_mask"].any()
    for name, array in encoder.encode_history(fetched.behaviours, row["at"]).items():
        np.testing.assert_array_equal(array, inputs[name].numpy(), err_msg=name)


async def test_a_clicks_value_that_is_none_for_its_field_is_named_by_its_place_or_counts_as_absent(made: Made) -> None:
    row = log_rows()[-1]
    sent = [
        {"item": "o1", "ts": START, "features": {"spent": "much"}},
        {"item": "o1", "ts": START + 1, "context": {"coins": [1], "device": "tv"}},
    ]

    async with served(made.artifacts, None) as (client, _):
        refused = await client.post("/predict", json=body_of(row, sent))
        event = {"event_id": 1, "type": "click", "ts": START, "user": row["player"], "item": "o1"}
        await client.post("/events", json=[event | {"features": {"spent": "much", "coins": 3}}])
        stored = (await client.post("/predict", json=body_of(row))).json()
        await client.post("/events", json=[event | {"user": "other", "features": {"coins": 3}}])
        without = (await client.post("/predict", json=body_of(row | {"player": "other"}))).json()
        known = (await client.post("/predict", json=body_of(row, [sent[0] | {"features": {"coins": 3}}]))).json()

    assert refused.status_code == 422
    assert [error["pointer"] for error in refused.json()["errors"]] == [
        "/behaviours/0/features/spent",
        "/behaviours/1/context/coins",
    ]
    assert stored["degraded"] == ["stored_values_invalid"]
    assert without["degraded"] == []
    assert abs(stored["predictions"][0]["ctr"] - known["predictions"][0]["ctr"]) < 1e-6


READERS = {"mian", "feseq", "deepfm", "fm", "widedeep", "dcn", "dcnv2", "xdeepfm", "autoint", "finalmlp"}


@pytest.mark.parametrize("name", sorted({*zoo.MODELS} - {"din", "dien", "bst", "dmr"}))
def test_every_model_that_reads_a_history_as_it_is_takes_what_clicks_had(name: str, made: Made) -> None:
    rows, model = made.data.rows("test"), lively(name, made.data.schema)
    clicked = np.flatnonzero(rows.end > rows.start)
    inputs = {n: v.double() if v.dtype == torch.float32 else v for n, v in rows.take(clicked).inputs.items()}
    absent = inputs | {"hist.coins": torch.zeros_like(inputs["hist.coins"])}

    with torch.inference_mode():
        with_coins, without = model(inputs), model(absent)

    assert torch.isfinite(with_coins).all()
    assert bool((with_coins != without).any()) == (name in READERS)
