"""A running service on the tiny model: its app, its client, its parts."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.http.routes import Api, OpenService
from service.settings import PREFIX, Settings
from tests.service import tiny

TWO_ARMS = {
    "experiment": "test",
    "salt": "s",
    "arms": [
        {"name": "one", "model": "tiny", "share": 50},
        {"name": "two", "model": "other", "share": 50},
    ],
    "overrides": {"u1": "one", "u2": "two"},
}


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)


@pytest.fixture
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's runs are timed once when it is loaded, not for a while: for tests that load many."""
    monkeypatch.setattr("service.runtime.latency_model.ROUNDS_S", 0.0)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("artifacts")
    tiny.write(root, "tiny", seed=1, explaining_seed=1)
    tiny.write(root, "other", seed=2)
    return root


class Running:
    """An open service: `client` talks to it, `api` is its inside."""

    def __init__(self, client: httpx.AsyncClient, app: FastAPI) -> None:
        self.client = client
        self.app = app
        self.api: Api = app.state.api

    @property
    def parts(self) -> OpenService:
        assert self.api.service is not None
        return self.api.service

    @property
    def store(self) -> Any:
        return self.parts.store

    async def predict(self, **body: Any) -> httpx.Response:
        return await self.client.post("/predict", json=body)

    async def metric(self, name: str) -> float:
        """The value of a sample by its name and labels, 0 where it was never recorded."""
        text = (await self.client.get("/metrics")).text
        return next((float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + " ")), 0.0)


Start = Callable[..., AbstractAsyncContextManager[Running]]


@pytest.fixture
def start(artifacts: Path) -> Start:
    """Opens a service with the given settings until the block ends."""

    @asynccontextmanager
    async def started(**given: Any) -> AsyncIterator[Running]:
        since_1970 = 36_500
        defaults = {"experiment": TWO_ARMS, "timeout_ms": 30_000, "keep_behaviours_days": since_1970}
        settings = Settings(**{"artifacts_dir": artifacts, **defaults, **given})
        app = create_app(settings)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client,
        ):
            yield Running(client, app)

    return started


@pytest.fixture
async def service(start: Start) -> AsyncIterator[Running]:
    async with start() as running:
        yield running
