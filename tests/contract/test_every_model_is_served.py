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
from models.artifact.golden import request_to_json
from models.features.encoder import Encoder
from models.features.request import Request
from models.features.schema import Schema
from models.features.values import Row
from service.app import create_app
from service.settings import Settings
from tests.trained_models import trained_and_exported
from training.data.batches import Prepared
from training.export import example
from training.fit.run_folder import Trained

ARMS = ("onnx", "torchscript")


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
async def test_a_trained_model_answers_over_http_as_it_does_offline(
    name: str, tmp_path_factory: pytest.TempPathFactory
):
    model, written = trained_and_exported(tmp_path_factory, name)
    data = Prepared.open(model.data)
    answered: set[tuple[str, str, str]] = set()
    logits: list[float] = []

    async with served(name, written.path.parents[1]) as client:
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


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_weight_of_a_trained_model_shows_in_its_logits(name: str, tmp_path_factory: pytest.TempPathFactory):
    """What makes these models good for comparisons: a graph that lost a part would score otherwise."""
    run, _ = trained_and_exported(tmp_path_factory, name)
    inputs = {n: torch.from_numpy(array) for n, array in example(run.schema, 2, 100).items()}

    with torch.inference_mode():
        logits = run.model(inputs)
        for parameter_name, parameter in run.model.named_parameters():
            trained = parameter.clone()
            parameter.zero_()
            assert (run.model(inputs) - logits).abs().max() > 3 * LOGIT_TOLERANCE, parameter_name
            parameter.copy_(trained)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_an_artifact_tells_of_the_run_that_it_was_made_of(name: str, tmp_path_factory: pytest.TempPathFactory):
    run, written = trained_and_exported(tmp_path_factory, name)
    requests = Prepared.open(run.data).golden_requests()

    assert zoo.configure(name, written.manifest.config) == zoo.configure(name, run.run.model_config)
    assert (written.manifest.data_hash, written.manifest.metrics) == (run.data_hash, run.metrics)
    assert written.calibration == run.calibration
    assert list(map(request_to_json, written.golden.requests)) == list(map(request_to_json, requests))
