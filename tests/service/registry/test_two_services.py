"""Two services on one real Redis, and two processes of one: what is decided at either serves at both."""

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.artifact.folder import make_current
from service.store import local_server
from tests.service import tiny
from tests.service.conftest import Running, Start
from tests.service.running_process import started

pytestmark = pytest.mark.usefixtures("measured_once")

TOKEN = {"authorization": "Bearer secret"}
ARMS = [{"name": name, "model": "tiny", "share": 50} for name in ("one", "two")]
EXPERIMENT = {"experiment": "test", "salt": "s", "arms": ARMS}
USERS = [f"u{number}" for number in range(20)]

Eventually = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


def write_versions(root: Path) -> list[str]:
    """Three; the first is the current one."""
    versions = [tiny.write(root, seed=seed).name for seed in (1, 2, 3)]
    make_current(root, "tiny", versions[0])
    return versions


@pytest.fixture
def versions(tmp_path: Path) -> list[str]:
    return write_versions(tmp_path / "artifacts")


@pytest.fixture
async def services(
    start: Start, redis_url: str, tmp_path: Path, versions: list[str]
) -> AsyncIterator[tuple[Running, Running]]:
    """Each with artifacts of its own, as on two hosts."""
    shutil.copytree(tmp_path / "artifacts", tmp_path / "elsewhere", symlinks=True)
    settings = {"experiment": EXPERIMENT, "redis_url": redis_url, "admin_token": "secret", "store_timeout_ms": 5000}
    async with AsyncExitStack() as stack:
        yield (
            await stack.enter_async_context(start(artifacts_dir=tmp_path / "artifacts", **settings)),
            await stack.enter_async_context(start(artifacts_dir=tmp_path / "elsewhere", **settings)),
        )


async def put(service: Running, body: Any, **headers: str) -> httpx.Response:
    return await service.client.put("/experiments/test", json=body, headers={**TOKEN, **headers})


async def load(service: Running, version: str, arm: str = "one") -> httpx.Response:
    return await service.client.post(f"/models/{arm}/load", json={"version": version}, headers=TOKEN)


async def arms(service: Running) -> set[str]:
    answers = [await service.predict(user={"id": user}, candidates=[{"id": "a1"}]) for user in USERS]
    return {answer.json()["arm"] for answer in answers}


def control_version(service: Running) -> int:
    return service.parts.control.document.version


async def test_a_kill_at_one_is_live_at_the_other_within_a_second_while_that_loads_a_model(
    services: tuple[Running, Running], versions: list[str], eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = services
    begun, go_on = threading.Event(), threading.Event()
    read = b.parts.registry.read

    def slow(arm: str, version: str) -> Any:
        begun.set()
        assert go_on.wait(30)
        return read(arm, version)

    monkeypatch.setattr(b.parts.registry, "read", slow)
    before = await arms(b)
    await load(a, versions[1])

    async def loads() -> bool:
        return begun.is_set()

    async def is_killed() -> bool:
        return b.parts.running.now.killed == ("two",)

    await eventually(loads)
    await put(a, {"kill": ["two"]})
    killed_at = time.monotonic()
    await eventually(is_killed)
    took_s = time.monotonic() - killed_at
    after, ready = await arms(b), (await b.client.get("/readyz")).json()
    go_on.set()
    await b.parts.control.settled()

    assert took_s < 1
    assert (before, after) == ({"one", "two"}, {"one"})
    assert ready["control"]["models"]["one"] == {"version": versions[0], "target": versions[1], "loading": "under way"}
    assert b.parts.registry.versions()["one"] == [versions[1], versions[0]]


async def test_a_load_and_a_rollback_at_either_serve_at_both_with_the_same_scores(
    services: tuple[Running, Running], versions: list[str], eventually: Eventually
) -> None:
    a, b = services
    request: dict[str, Any] = {"ts": 5e6, "user": {"id": "u1"}, "candidates": [{"id": "a1"}, {"id": "a2"}]}

    async def same_version() -> bool:
        return control_version(a) == control_version(b) and a.parts.registry.versions() == b.parts.registry.versions()

    async def both() -> list[Any]:
        await eventually(same_version)
        return [(await service.predict(request_id="r", **request)).json() for service in (a, b)]

    first = await both()
    answers = [await load(a, versions[1], arm) for arm in ("one", "two")]
    second = await both()
    answers += [await b.client.post(f"/models/{arm}/rollback", headers=TOKEN) for arm in ("one", "two")]
    third = await both()

    assert {answer.status_code for answer in answers} == {200}
    assert all(one == other for one, other in (first, second, third))
    assert [answer["version"] for answer, _ in (first, second, third)] == [versions[0], versions[1], versions[0]]
    assert second[0]["predictions"] != first[0]["predictions"] == third[0]["predictions"]


async def test_of_changes_at_both_for_one_version_exactly_one_wins(services: tuple[Running, Running]) -> None:
    a, b = services
    for version in range(1, 6):
        changes = [
            put(service, {"shares": {"one": share, "two": 100 - share}}, **{"if-match": f'"{version}"'})
            for share, service in enumerate((a, b, a, b), start=10 * version)
        ]
        answers = await asyncio.gather(*changes)

        assert sorted(answer.status_code for answer in answers) == [200, 412, 412, 412]
        won = next(answer.json() for answer in answers if answer.status_code == 200)
        for service in (a, b):
            await service.parts.control.poll()
            assert (await service.client.get("/experiments/test")).json() == won

    audit = (await b.client.get("/experiments/test/audit", headers=TOKEN)).json()
    assert [entry["version"] for entry in audit] == [6, 5, 4, 3, 2, 1]


async def test_a_version_that_one_host_lacks_serves_at_the_other_and_is_told(
    services: tuple[Running, Running], versions: list[str], tmp_path: Path, eventually: Eventually
) -> None:
    a, b = services
    shutil.rmtree(tmp_path / "elsewhere" / "tiny" / versions[1])

    loaded = await load(a, versions[1])

    async def is_refused() -> bool:
        return "refused" in (await b.client.get("/readyz")).json()["control"]["models"]["one"]

    await eventually(is_refused)
    models, ready = await b.client.get("/models"), await b.client.get("/readyz")
    of_one = next(model for model in models.json() if model["arm"] == "one")

    assert (loaded.json()["version"], ready.status_code) == (versions[1], 200)
    assert (of_one["version"], of_one["target"]) == (versions[0], versions[1])
    assert "no such artifact folder" in of_one["refused"]
    assert await arms(b) == {"one", "two"}


async def test_without_its_store_a_service_goes_on_refuses_changes_and_starts_again_with_what_was_decided(
    start: Start, tmp_path: Path, versions: list[str]
) -> None:
    settings = {
        "artifacts_dir": tmp_path / "artifacts",
        "experiment": EXPERIMENT,
        "admin_token": "secret",
        "state_dir": tmp_path / "state",
    }
    (tmp_path / "redis").mkdir()
    with local_server.start(tmp_path / "redis") as server:
        settings["redis_url"] = server.url
        async with start(**settings) as service:
            await load(service, versions[1])
            await put(service, {"kill": ["two"]})
            os.kill(server.pid, signal.SIGKILL)

            refused = await put(service, {"unkill": ["two"]})
            await service.parts.control.poll()
            ready = await service.client.get("/readyz")
            serving = await arms(service)
            await service.parts.control.settled()

    async with start(**settings) as again:
        restarted = (await again.client.get("/readyz")).json()
        after = await arms(again)
        with local_server.start(tmp_path / "redis"):  # empty
            await again.parts.control.poll()
            stored = await again.parts.control_store.read()

    assert (refused.status_code, ready.status_code, serving) == (503, 200, {"one"})
    assert "no answer from the store" in ready.json()["control"]["store"]
    assert (restarted["control"]["version"], restarted["arms"]["one"], after) == (3, versions[1], {"one"})
    assert stored is not None
    assert (stored.version, stored.state.killed) == (3, ["two"])


def test_two_processes_swap_and_one_that_takes_a_dead_ones_slot_serves_what_they_do(
    tmp_path: Path, versions: list[str], redis_url: str
) -> None:
    first, second, third = versions
    settings = {"experiment": EXPERIMENT, "admin_token": "secret", "redis_url": redis_url}
    with started(tmp_path, tmp_path / "artifacts", **settings) as running:
        service = running.opened()
        with httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=30) as client:

            def answering() -> set[tuple[str, str]]:
                """Arms and versions that the workers answer with; 30 connections leave none of the two out."""
                body = {"candidates": [{"id": "a1"}]}
                answers = [client.post(f"{service.url}/predict", json=body).json() for _ in range(30)]
                return {(answer["arm"], answer["version"]) for answer in answers}

            def follow(version: int) -> None:
                deadline = time.monotonic() + 20
                while f"clickserve_control_version {version}.0" not in client.get(f"{service.url}/metrics").text:
                    assert time.monotonic() < deadline
                while follows() != {second}:
                    assert time.monotonic() < deadline

            def follows() -> set[str]:
                ready = [client.get(f"{service.url}/readyz").json() for _ in range(30)]
                return {answer["control"]["models"]["one"]["version"] for answer in ready}

            before = answering()
            swapped = client.post(f"{service.url}/models/one/load", json={"version": second}, headers=TOKEN)
            client.put(f"{service.url}/experiments/test", json={"kill": ["two"]}, headers=TOKEN)
            follow(3)
            after = answering()
            make_current(tmp_path / "artifacts", "tiny", third)  # what is exported does not serve by that
            os.kill(service.wait_for("worker serving")["pid"], signal.SIGKILL)
            service.wait_for("worker serving", times=3)
            again = answering()
            info = client.get(f"{service.url}/metrics").text

    assert swapped.status_code == 200
    assert (before, after, again) == ({("one", first), ("two", first)}, {("one", second)}, {("one", second)})
    assert f'clickserve_model_info{{arm="one",model="tiny",version="{second}"}} 1.0' in info
    assert f'clickserve_model_info{{arm="one",model="tiny",version="{first}"}}' not in info
