"""A change reaches every process behind the port or none, and one that starts later begins with it."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.artifact.folder import make_current
from service.app import create_app
from service.errors import ArtifactRefused
from service.registry import coordination
from service.registry.changes import Load
from service.registry.coordination import Peers
from service.settings import Settings
from service.worker import Place
from tests.service import tiny
from tests.service.conftest import Running
from tests.service.process.test_workers import started

pytestmark = pytest.mark.usefixtures("measured_once")

TOKEN = {"authorization": "Bearer secret"}
ARMS = [{"name": "one", "model": "tiny", "share": 50}, {"name": "two", "model": "tiny", "share": 50}]
EXPERIMENT = {"experiment": "test", "salt": "s", "arms": ARMS}


@pytest.fixture
def versions(tmp_path: Path) -> list[str]:
    """Three; the first is the current one."""
    made = [tiny.write(tmp_path, seed=seed).name for seed in (1, 2, 3)]
    make_current(tmp_path, "tiny", made[0])
    return made


class Workers:
    def __init__(self, root: Path) -> None:
        self.folder = root / "run"
        self.folder.mkdir()
        self._root = root
        self._stack = AsyncExitStack()

    def worker(self, slot: int, *, workers: int = 2) -> AbstractAsyncContextManager[Running]:
        @asynccontextmanager
        async def started() -> AsyncIterator[Running]:
            settings = Settings(
                artifacts_dir=self._root, experiment=EXPERIMENT, admin_token="secret", timeout_ms=30_000
            )
            app = create_app(settings, Place(slot=slot, workers=workers, folder=self.folder))
            transport = httpx.ASGITransport(app)
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=transport, base_url="http://service") as client,
            ):
                yield Running(client, app)

        return started()


@pytest.fixture
def workers(tmp_path: Path, versions: list[str], monkeypatch: pytest.MonkeyPatch) -> Workers:
    # Two apps of one process would write into the same files of metrics.
    monkeypatch.setattr("service.observability.metrics.shared_metrics.join", lambda _place, **_: None)
    return Workers(tmp_path)


async def load(worker: Running, version: str, arm: str = "one") -> httpx.Response:
    return await worker.client.post(f"/models/{arm}/load", json={"version": version}, headers=TOKEN)


def serves(worker: Running) -> dict[str, list[str]]:
    return worker.parts.catalog.versions()


async def test_a_load_at_one_worker_is_a_load_at_all(workers: Workers, versions: list[str]) -> None:
    first, second, _ = versions
    async with workers.worker(0) as a, workers.worker(1) as b:
        answer = await load(a, second)
        told = [serves(a), serves(b)]
        back = await b.client.post("/models/one/rollback", headers=TOKEN)

        assert (answer.status_code, back.status_code) == (200, 200)
        assert told == [{"one": [second, first], "two": [first]}] * 2
        assert serves(a) == serves(b) == {"one": [first], "two": [first]}


async def test_new_shares_at_one_worker_are_those_of_all(workers: Workers) -> None:
    async with workers.worker(0) as a, workers.worker(1) as b:
        answer = await b.client.put("/experiments/test", json={"kill": ["two"]}, headers=TOKEN)
        told = [(await worker.client.get("/experiments")).json() for worker in (a, b)]

    assert told == [[answer.json()]] * 2
    assert [arm["share"] for arm in answer.json()["arms"]] == [50, 0]


async def test_what_one_worker_refuses_changes_none(
    workers: Workers, versions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with workers.worker(0) as a, workers.worker(1) as b:
        swap = b.parts.peers._changes._swap

        async def refuse(arm: str, version: str) -> None:
            raise ArtifactRefused("its disk is broken")

        monkeypatch.setattr(swap, "prepare", refuse)
        before = (workers.folder / "served.json").read_bytes()
        refused = await load(a, versions[1])
        await a.parts.catalog.settled()

        assert (refused.status_code, refused.json()["detail"]) == (409, "its disk is broken")
        assert serves(a) == serves(b) == {"one": [versions[0]], "two": [versions[0]]}
        assert (workers.folder / "served.json").read_bytes() == before
        monkeypatch.undo()
        assert (await load(a, versions[1])).status_code == 200


async def test_a_worker_that_starts_later_begins_with_what_serves(workers: Workers, versions: list[str]) -> None:
    first, second, third = versions
    async with workers.worker(0) as a:
        await load(a, second)
        await load(a, third)
        await a.client.put("/experiments/test", json={"shares": {"one": 1}}, headers=TOKEN)
        async with workers.worker(1) as b:
            shares = [arm.share for arm in b.parts.running.now.arms]
            began = serves(b)
            back = await b.client.post("/models/one/rollback", headers=TOKEN)

            assert began == {"one": [third, second, first], "two": [first]}
            assert shares == [1, 50]
            assert back.json()["version"] == second
            assert serves(a) == serves(b) == {"one": [second, first], "two": [first]}


async def test_a_worker_that_starts_later_knows_which_shares_held_before(workers: Workers) -> None:
    users = [f"u{number}" for number in range(50)]
    async with workers.worker(0) as a:
        began = time.time()
        served = [a.parts.running.at(began).assign(user).name for user in users]
        await asyncio.sleep(0.01)
        await a.client.put("/experiments/test", json={"kill": ["two"]}, headers=TOKEN)
        async with workers.worker(1) as b:
            for worker in (a, b):
                assert [worker.parts.running.at(began).assign(user).name for user in users] == served
                assert {worker.parts.running.at(time.time()).assign(user).name for user in users} == {"one"}


async def test_a_worker_that_starts_after_a_new_export_serves_what_the_others_do(
    workers: Workers, versions: list[str], tmp_path: Path
) -> None:
    async with workers.worker(0) as a:
        make_current(tmp_path, "tiny", versions[1])
        async with workers.worker(1) as b:
            assert serves(a) == serves(b) == {"one": [versions[0]], "two": [versions[0]]}


async def test_a_change_while_a_worker_reads_its_models_is_caught_up(
    workers: Workers, versions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = versions
    read, go_on = asyncio.Event(), asyncio.Event()
    joined = Peers.joined

    @asynccontextmanager
    async def late(self: Peers) -> AsyncIterator[None]:
        read.set()
        await go_on.wait()
        async with joined(self):
            yield

    async with workers.worker(0) as a:
        monkeypatch.setattr(Peers, "joined", late)
        starting = workers.worker(1)
        opened = asyncio.create_task(starting.__aenter__())
        await read.wait()
        monkeypatch.undo()
        await load(a, second)
        go_on.set()
        b = await opened
        try:
            assert serves(b)["one"] == [second, first]
        finally:
            await starting.__aexit__(None, None, None)


async def test_a_worker_that_died_is_not_waited_for(workers: Workers, versions: list[str]) -> None:
    async with workers.worker(0) as a:
        dead = workers.folder / "peer-1.sock"
        server = await asyncio.start_unix_server(lambda _reader, writer: writer.close(), dead)
        closes = await load(a, versions[1])
        server.close()
        await server.wait_closed()
        dead.touch()
        gone = await load(a, versions[2])

    assert (closes.status_code, gone.status_code) == (200, 200)


async def test_a_peer_whose_line_uvloop_has_closed_has_nothing_against_a_change() -> None:
    class Closed:
        def write(self, _: bytes) -> None:
            raise RuntimeError("unable to perform operation on <UnixTransport closed=True>; the handler is closed")

    closed: Any = Closed()
    line = coordination._Line(asyncio.StreamReader(), closed)

    assert await line.prepare(coordination.Asked(change=Load(arm="one"), name="x")) == coordination.Answer()
    await line.commit()


@pytest.mark.parametrize("wrote", [False, True])
async def test_whoever_loses_its_line_before_the_word_does_what_the_file_says(
    wrote: bool, workers: Workers, versions: list[str]
) -> None:
    first, second, _ = versions
    async with workers.worker(0) as a:
        change = coordination.Asked(change=Load(arm="one", version=second), name="c1")
        reader, writer = await asyncio.open_unix_connection(workers.folder / "peer-0.sock")
        await coordination._say(writer, change)
        ready = await reader.readline()
        if wrote:
            state = a.parts.peers._changes.state()
            coordination._write(workers.folder, coordination.Served(last="c1", state=state))
        writer.write_eof()
        await reader.read()
        writer.close()

        assert b"null" in ready
        assert serves(a)["one"] == ([second, first] if wrote else [first])


async def test_two_workers_do_not_change_at_once(
    workers: Workers, versions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with workers.worker(0) as a, workers.worker(1) as b:
        answers = await asyncio.gather(load(a, versions[1]), load(b, versions[2], arm="two"))

        assert sorted(answer.status_code for answer in answers) == [200, 409]
        assert serves(a) == serves(b)


def test_two_processes_swap_together_and_one_that_takes_a_dead_ones_place_serves_what_they_do(
    tmp_path: Path, versions: list[str]
) -> None:
    first, second, _ = versions
    with started(tmp_path, tmp_path, experiment=EXPERIMENT, admin_token="secret") as running:
        service = running.opened()
        with httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=30) as client:

            def answering() -> set[str]:
                """The versions that the workers answer with; 30 connections leave none of the two out."""
                answers = [
                    client.post(f"{service.url}/predict", json={"candidates": [{"id": "a1"}]}) for _ in range(30)
                ]
                return {answer.json()["version"] for answer in answers}

            before = answering()
            swapped = client.post(f"{service.url}/models/one/load", json={"version": second}, headers=TOKEN)
            client.put(f"{service.url}/experiments/test", json={"kill": ["two"]}, headers=TOKEN)
            after = answering()
            os.kill(service.wait_for("worker serving")["pid"], signal.SIGKILL)
            service.wait_for("worker serving", times=3)
            again = answering()
            info = client.get(f"{service.url}/metrics").text

    assert swapped.status_code == 200
    assert (before, after, again) == ({first}, {second}, {second})
    assert f'clickserve_model_info{{arm="one",model="tiny",version="{second}"}} 1.0' in info
    assert f'clickserve_model_info{{arm="one",model="tiny",version="{first}"}}' not in info


async def test_a_worker_that_fails_in_a_way_nobody_foresaw_refuses_the_change(
    workers: Workers, versions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with workers.worker(0) as a, workers.worker(1) as b:

        async def fail(arm: str, version: str) -> None:
            raise MemoryError

        monkeypatch.setattr(b.parts.peers._changes._swap, "prepare", fail)
        refused = await load(a, versions[1])

        assert refused.status_code == 500
        assert serves(a) == serves(b) == {"one": [versions[0]], "two": [versions[0]]}


async def test_where_the_file_cannot_be_written_the_workers_still_agree(
    workers: Workers, versions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, told: coordination.Served) -> None:
        raise OSError(28, "No space left on device")

    async with workers.worker(0) as a, workers.worker(1) as b:
        monkeypatch.setattr(coordination, "_write", full)
        answer = await load(a, versions[1])

        assert answer.status_code == 500
        assert serves(a) == serves(b)


async def test_a_change_that_was_given_up_is_not_made_when_a_later_one_is(
    workers: Workers, versions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asked for it is gone while this worker still reads the model; meanwhile the others change something else."""
    first, second, _ = versions
    async with workers.worker(0) as a:
        swap, prepares, go_on = a.parts.peers._changes._swap, asyncio.Event(), asyncio.Event()
        prepare = swap.prepare

        async def slow(arm: str, version: str) -> Any:
            prepares.set()
            await go_on.wait()
            return await prepare(arm, version)

        monkeypatch.setattr(swap, "prepare", slow)
        _, writer = await asyncio.open_unix_connection(workers.folder / "peer-0.sock")
        await coordination._say(writer, coordination.Asked(change=Load(arm="one", version=second), name="given up"))
        await prepares.wait()
        writer.close()
        busy = await a.client.put("/experiments/test", json={"kill": ["two"]}, headers=TOKEN)
        async with workers.worker(1) as b:
            refused = await b.client.put("/experiments/test", json={"kill": ["two"]}, headers=TOKEN)
            coordination._write(
                workers.folder, coordination.Served(last="another", state=b.parts.peers._changes.state())
            )
            go_on.set()
            await a.parts.catalog.settled()
            monkeypatch.undo()
            async with asyncio.timeout(10):
                while (await load(b, second, arm="two")).status_code == 409:  # noqa: ASYNC110 - nothing tells its end
                    await asyncio.sleep(0.01)

        assert (busy.status_code, refused.status_code) == (409, 409)
        assert serves(a) == {"one": [first], "two": [second, first]}


async def test_workers_that_would_go_back_to_different_versions_do_not_go_back(
    workers: Workers, versions: list[str], tmp_path: Path
) -> None:
    """The worker that started later could not load the version between: its artifact was deleted."""
    first, second, third = versions
    async with workers.worker(0) as a:
        await load(a, second)
        await load(a, third)
        shutil.rmtree(tmp_path / "tiny" / second)
        async with workers.worker(1) as b:
            refused = await a.client.post("/models/one/rollback", headers=TOKEN)

            assert refused.status_code == 422
            assert first in refused.json()["detail"]
            assert second in refused.json()["detail"]
            assert serves(a)["one"] == [third, second, first]
            assert serves(b)["one"] == [third, first]
