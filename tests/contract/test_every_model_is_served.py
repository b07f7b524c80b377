"""Every model of the zoo, by one test: trained by its recipe, exported, served by both runtimes, asked over HTTP."""

import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from models import zoo
from models.artifact.folder import LOGIT_TOLERANCE
from models.features.encoder import Encoder
from models.features.request import Request
from models.features.schema import Schema
from models.features.values import Row
from service.app import create_app
from service.settings import Settings
from training import recipes
from training.data.batches import Prepared
from training.data.prepare import prepare
from training.datasets import simulated
from training.fit import run_folder
from training.fit.run_folder import Trained
from training.run_export import export_run
from training.simulator.simulate import simulate

# Exports take most of the time, more with every field and with every click that DIEN steps through: DeepFM's 3 s and
# DIEN's 7 s of CPU with these, 5 s and 23 s with all the fields and 20 clicks of a simulated log.
FIELDS = ("user_id", "gender", "hour", "device", "ad_id", "price", "tags")
HISTORY_LENGTH = 3
BRIEF = ("max_epochs=1", "batch_size=64", "lr=0.02")
READ_AGES = {"din", "dien", "dmr", "bst"}  # if they are asked to
ARMS = ("onnx", "torchscript")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    """A simulated log with a field of every kind in it, and a sequence of each kind that has one."""
    folder = tmp_path_factory.mktemp("log")
    fields = tuple(f for f in simulated.SPEC.fields if f.name in FIELDS)
    simulate(folder / "log", users=60, items=40, rows=2000, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        small = {"fields": fields, "history_length": HISTORY_LENGTH}
        patch.setattr(simulated, "SPEC", simulated.SPEC.model_copy(update=small))
        prepare("simulated", folder / "log", folder / "data")
    yield Prepared.open(folder / "data")
    torch.use_deterministic_algorithms(mode=False)


def trained(name: str, data: Prepared, folder: Path) -> Trained:
    recipe = recipes.choose(name, "simulated").name
    brief = (*BRIEF, "model.age_buckets=8") if name in READ_AGES else BRIEF
    run = run_folder.begin(folder, data, name, recipe, brief, resume=False)
    run_folder.train(folder, data, run)
    return run_folder.read(folder)


@asynccontextmanager
async def served(name: str, artifacts: Path) -> AsyncIterator[httpx.AsyncClient]:
    """The service with the model's two graphs as the two arms of an experiment."""
    arms = [{"name": kind, "model": name, "share": 50, "backend": kind} for kind in ARMS]
    experiment = {"experiment": "onnx-vs-torchscript", "salt": "s", "arms": arms}
    app = create_app(Settings(artifacts_dir=artifacts, experiment=experiment, redis_url=None, timeout_ms=60_000))
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://s") as client:
        yield client


def requests_of(data: Prepared) -> Iterator[tuple[str, Request]]:
    """The data's last golden requests, and each again with something missing, unknown or more; with what it is."""
    golden = data.golden_requests()[-12:]
    user_key, item_key = data.schema.user_key, data.schema.item_key
    assert user_key is not None
    assert item_key is not None
    # No ad goes over HTTP without an id, and a golden request may hold one.
    golden = [replace(r, items={**r.items, item_key: [i or "no ad" for i in r.items[item_key]]}) for r in golden]
    everything = {name: list(itertools.chain.from_iterable(r.items[name] for r in golden)) for name in golden[0].items}
    for number, request in enumerate(golden):
        known = {user_key: request.user.get(user_key)}
        yield "as logged", request
        yield "no history", replace(request, behaviours=())
        yield "unknown user", replace(request, user={user_key: f"nobody {number}"})
        yield "anonymous", replace(request, user={})
        yield (
            "no features",
            replace(
                request,
                user=known,
                context={},
                items={item_key: request.items[item_key]},
                behaviours=[replace(event, features={}) for event in request.behaviours],
            ),
        )
        yield "many candidates", replace(request, items=everything, num_items=len(everything[item_key]))


def as_rows(items: Mapping[str, Any], item_key: str) -> list[dict[str, Any]]:
    """Candidates as a list of objects; an absent value is left out."""
    names = [name for name in items if name != item_key]
    return [
        {"id": item, "features": {name: items[name][n] for name in names if items[name][n] is not None}}
        for n, item in enumerate(items[item_key])
    ]


def as_columns(items: Mapping[str, Any], item_key: str) -> dict[str, Any]:
    """Candidates as columns; an absent value is null."""
    return {"id" if name == item_key else name: list(column) for name, column in items.items()}


FORMS: dict[str, Callable[[Mapping[str, Any], str], Any]] = {"rows": as_rows, "columns": as_columns}


def body(request: Request, schema: Schema, form: str, request_id: str) -> dict[str, Any]:
    """The request as a client sends it."""
    features: Row = {name: value for name, value in request.user.items() if name != schema.user_key}
    return {
        "request_id": request_id,
        "ts": request.ts,
        "user": {"id": request.user.get(str(schema.user_key)), "features": features},
        "context": dict(request.context),
        "behaviours": [{"item": e.item, "ts": e.ts, "features": dict(e.features)} for e in request.behaviours],
        "candidates": FORMS[form](request.items, str(schema.item_key)),
    }


def offline(model: Trained, request: Request) -> Any:
    """What PyTorch scores the request with, before calibration."""
    with torch.inference_mode():
        arrays = Encoder(model.schema).encode(request)
        return model.model({name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()


@pytest.mark.parametrize("name", zoo.MODELS)
async def test_a_trained_model_answers_over_http_as_it_does_offline(name: str, data: Prepared, tmp_path: Path):
    model = trained(name, data, tmp_path / "run")
    export_run(model, tmp_path / "artifacts")
    answered: set[tuple[str, str, str]] = set()
    logits: list[float] = []

    async with served(name, tmp_path / "artifacts") as client:
        for number, (kind, request) in enumerate(requests_of(data)):
            expected = offline(model, request)
            logits.extend(expected)
            slack = LOGIT_TOLERANCE * (1 + np.abs(expected))
            low, high = model.calibration(expected - slack), model.calibration(expected + slack)
            for form in FORMS:
                response = await client.post("/predict", json=body(request, model.schema, form, f"r{number}"))

                assert response.status_code == 200, response.text
                answer = response.json()
                scored = answer["predictions"]
                ctr = np.array(scored["ctr"] if form == "columns" else [p["ctr"] for p in scored])
                assert ctr.shape == expected.shape
                assert ((low <= ctr) & (ctr <= high)).all(), f"{kind}, as {form}, on {answer['arm']}"
                assert (answer["model"], answer["degraded"]) == (name, [])
                answered.add((kind, form, answer["arm"]))

    # Otherwise a service that scores all alike, or leaves one runtime out, would do.
    assert np.std(logits) > 1000 * LOGIT_TOLERANCE
    kinds = {kind for kind, _ in requests_of(data)}
    assert answered == set(itertools.product(kinds, FORMS, ARMS))
