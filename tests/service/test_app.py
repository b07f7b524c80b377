"""Start, readiness, stop: in process where that shows it, as a real process where only that does."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from models.artifact.errors import ArtifactError
from service.app import create_app
from service.experiments.assignment import ExperimentError
from service.settings import Settings, SettingsError
from service.store.codec import unpack_row
from service.store.feature_store import StoreUnavailable
from service.store.memory_store import MemoryStore
from tests.service import tiny
from tests.service.conftest import TWO_ARMS, Running, Start

Eventually = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


async def test_an_unopened_service_is_alive_and_not_ready(artifacts: Path) -> None:
    app = create_app(Settings(artifacts_dir=artifacts, experiment=TWO_ARMS))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        alive, ready = await client.get("/healthz"), await client.get("/readyz")
        predict = await client.post("/predict", json={"candidates": [{"id": "a1"}]})

    assert alive.status_code == 200
    assert (ready.status_code, ready.json()) == (503, {"status": "starting"})
    assert (predict.status_code, predict.headers["retry-after"]) == (503, "1")


async def test_an_open_service_is_ready_and_tells_its_arms(service: Running) -> None:
    ready = await service.client.get("/readyz")

    assert ready.status_code == 200
    assert ready.json()["status"] == "ready"
    assert ready.json()["store"] == {"ok": True}
    assert set(ready.json()["arms"]) == {"one", "two"}


async def test_a_stopping_service_is_not_ready_and_still_answers(service: Running) -> None:
    service.api.stopping = True

    ready = await service.client.get("/readyz")
    predict = await service.predict(candidates=[{"id": "a1"}])

    assert (ready.status_code, ready.json()["status"]) == (503, "stopping")
    assert predict.status_code == 200


class Flaky(MemoryStore):
    down = True

    async def ping(self) -> None:
        if self.down:
            raise StoreUnavailable("no answer")


@pytest.mark.parametrize(("require_store", "status"), [(False, 200), (True, 503)])
async def test_readiness_tells_of_a_store_that_is_down_from_the_start_and_of_its_return(
    require_store: bool, status: int, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Flaky()
    monkeypatch.setattr("service.app.MemoryStore", lambda **_: store)

    async with start(require_store=require_store) as service:
        down = await service.client.get("/readyz")
        store.down = False
        up = await service.client.get("/readyz")

    assert (down.status_code, down.json()["status"]) == (status, "degraded")
    assert down.json()["store"] == {"ok": False, "detail": "no answer"}
    assert (up.status_code, up.json()["status"]) == (200, "ready")


async def test_a_service_starts_without_its_redis_and_answers(start: Start) -> None:
    async with start(redis_url="redis://127.0.0.1:1") as service:
        answer = await service.predict(user={"id": "u1"}, candidates=[{"id": "a1"}])

    assert answer.status_code == 200
    assert "behaviours_unavailable" in answer.json()["degraded"]


async def test_a_service_over_redis_answers_as_one_over_memory(start: Start, redis_url: str) -> None:
    click = {"type": "click", "user": "u1", "features": {"genres": ["x"]}}
    events = [{**click, "event_id": f"e{i}", "ts": float(i), "item": f"a{i}"} for i in range(1, 5)]
    request: dict[str, Any] = {"ts": 4.0, "user": {"id": "u1"}, "candidates": [{"id": "a1"}, {"id": "a2"}]}
    answers = []
    for url in (None, redis_url):
        async with start(redis_url=url, store_timeout_ms=5000) as service:
            await service.store.put_users({"u1": {"gender": "F"}})
            await service.store.put_items({"a1": {"price": 2.5, "genres": ["x", "z"]}})
            assert (await service.client.post("/events", json=events)).json()["accepted"] == 4
            answers.append((await service.predict(request_id="r", **request)).json())

    assert answers[0] == answers[1]
    assert answers[0]["degraded"] == []


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no experiment": ({"experiment": None}, ExperimentError, "the setting experiment is missing"),
    "a bad experiment": ({"experiment": {"experiment": "x", "salt": "s"}}, ExperimentError, "at arms: Field required"),
    "no file": ({"experiment": Path("no.yaml")}, ExperimentError, "no.yaml: not a readable"),
    "no artifact": ({"artifacts_dir": Path("nowhere")}, ArtifactError, "nowhere/tiny/current.json: no such file"),
    "an option that Redis has not": (
        {"redis_url": "redis://localhost?foo=bar"},
        SettingsError,
        "setting redis_url: expected redis://",
    ),
    "no redis url": ({"redis_url": "localhost:6379"}, SettingsError, "setting redis_url"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_service_does_not_start_on(name: str, start: Start) -> None:
    settings, kind, told = WRONG[name]

    with pytest.raises(kind, match=told):
        async with start(**settings):
            pass


async def test_what_nobody_foresaw_is_a_500_without_internals(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(service.store, "fetch_soon", breaks)

    answer = await service.predict(candidates=[{"id": "a1"}])

    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "secret" not in answer.text
    assert await service.metric('clickserve_requests_total{arm="none",route="/predict",status="500"}') == 1
    assert await service.metric('clickserve_rejected_total{reason="internal"}') == 1
    leases = [model.served.leases for model in service.parts.registry.models.values()]
    assert leases == [0, 0]  # else it could never be replaced


@asynccontextmanager
async def process(*arguments: str, **environment: str) -> AsyncIterator[Process]:
    """`python -m service` as a user runs it; killed if the test leaves it behind."""
    command = (sys.executable, "-m", "service", *arguments)
    running = await asyncio.create_subprocess_exec(
        *command, stdout=PIPE, stderr=PIPE, env={**os.environ, **environment}
    )
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


async def logged(running: Process, event: str) -> dict[str, Any]:
    """The next log line of that event."""
    assert running.stderr is not None
    while line := await asyncio.wait_for(running.stderr.readline(), 30):
        entry: dict[str, Any] = json.loads(line)
        if entry["event"] == event:
            return entry
    pytest.fail(f"the process ended without {event}")


DRAIN_S = 2


@pytest.fixture
def config(tmp_path: Path, artifacts: Path) -> Path:
    file = tmp_path / "service.yaml"
    settings = {"artifacts_dir": str(artifacts), "experiment": TWO_ARMS, "port": 0, "drain_s": DRAIN_S}
    file.write_text(yaml.safe_dump(settings))
    return file


async def test_a_stop_is_noticed_by_no_client(config: Path, eventually: Eventually) -> None:
    async with process("serve", "--config", str(config)) as running:
        port = (await logged(running, "serving"))["port"]
        # A new connection for every request, as a load balancer that has not noticed yet makes them.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10, limits=limits) as client:
            assert (await client.get("/readyz")).status_code == 200
            request = {"user": {"id": "u1"}, "candidates": [{"id": "a1"}] * 100}
            kept = {"connection": "keep-alive"}
            stopped_at = time.monotonic()
            running.send_signal(signal.SIGTERM)
            await logged(running, "stopping")
            answers = [await client.post("/predict", json=request) for _ in range(10)]

            async def is_leaving() -> bool:
                return "close" in (await client.get("/healthz", headers=kept)).headers.get("connection", "")

            await eventually(is_leaving)
            ready = await client.get("/readyz", headers=kept)

        await asyncio.wait_for(running.wait(), 10)

    assert {a.status_code for a in answers} == {200}
    # Who keeps a connection is told to leave it while there is still time.
    assert ready.headers["connection"] == "close"
    assert (ready.status_code, ready.json()["status"]) == (503, "stopping")
    assert time.monotonic() - stopped_at >= DRAIN_S
    assert running.returncode == 0


async def test_a_large_body_is_answered_over_a_real_connection(config: Path) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield b"x" * 50_000

    async with process("serve", "--config", str(config)) as running:
        port = (await logged(running, "serving"))["port"]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            whole = await client.post("/predict", content=b"x" * 10_000_000)
            chunked = await client.post("/events", content=endless())
            after = await client.get("/healthz")

    assert (whole.status_code, chunked.status_code, after.status_code) == (413, 413, 200)


async def test_a_body_that_an_upgrade_would_lose_is_refused_and_not_read_as_a_request(config: Path) -> None:
    smuggled = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
    asked = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n"

    async with process("serve", "--config", str(config)) as running:
        port = (await logged(running, "serving"))["port"]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(asked % len(smuggled) + smuggled)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"ask without `Upgrade`" in answer
    assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("wrong", ["artifact", "setting", "port", "nothing to load into"])
async def test_what_cannot_be_used_ends_with_one_sentence_and_code_2(wrong: str, config: Path, tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    command = ["serve", "--config", str(config)]
    environment = {}
    match wrong:
        case "artifact":
            tiny.write(tmp_path / "bad", "tiny", offset=1.0)
            environment = {"CLICKSERVE_ARTIFACTS_DIR": str(tmp_path / "bad")}
        case "setting":
            environment = {"CLICKSERVE_DRAIN_S": "soon"}
        case "port":
            command += ["--port", str(taken.getsockname()[1])]
        case _:
            command = ["load-behaviours", "clicks.parquet"]

    async with process(*command, **environment) as running:
        _, stderr = await asyncio.wait_for(running.communicate(), 30)
    taken.close()

    assert running.returncode == 2
    lines = stderr.decode().splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in stderr.decode()


async def test_files_are_loaded_into_redis_and_counted(redis_url: str, tmp_path: Path, start: Start) -> None:
    import polars as pl

    pl.DataFrame({"item": ["a1", "a2"], "genres": [["x"], ["y", "z"]]}).write_parquet(tmp_path / "items.parquet")
    clicks = {"user": ["u1", "u1"], "item": ["a1", "a2"], "ts": [1e9, 1e9 + 1]}
    pl.DataFrame(clicks).write_parquet(tmp_path / "clicks.parquet")
    said = []

    for command in (["load-features", "items", "items.parquet"], ["load-behaviours", "clicks.parquet"]):
        path = str(tmp_path / command.pop())
        async with process(*command, path, CLICKSERVE_REDIS_URL=redis_url) as running:
            said.append((await asyncio.wait_for(running.communicate(), 30))[0].decode())
    async with start(redis_url=redis_url, store_timeout_ms=5000) as service:
        stored = await service.store.fetch("u1", ["a1"], before=2e9, limit=9)

    assert said == ["2 items\n", "2 new clicks\n"]
    assert [unpack_row(packed) for packed in stored.items] == [{"genres": ["x"]}]
    assert [(e.item, e.ts, e.item_features) for e in stored.behaviours] == [
        ("a1", 1e9, {"genres": ["x"]}),
        ("a2", 1e9 + 1, {"genres": ["y", "z"]}),
    ]
