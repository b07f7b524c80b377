"""How many workers there are, what they are told, and when one is started again or given up: programs stand in."""

import asyncio
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import uvloop

from service.process import server, supervisor
from service.process.supervisor import WorkerError
from service.settings import Settings
from service.worker import WorkerInfo
from tests.service.conftest import TWO_ARMS


@pytest.mark.parametrize(
    ("given", "number"),
    [
        ({"workers": 1}, 1),
        ({"workers": 0}, 1),
        ({"workers": 0, "redis_url": "redis://localhost"}, 7),
        ({"workers": 3}, 3),
    ],
)
def test_there_are_as_many_workers_as_cores_where_a_store_is_shared(
    given: dict[str, Any], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.process.cpu_count.usable", lambda: 7)

    assert supervisor.number(Settings(**given)) == number


async def test_one_worker_is_this_very_process(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []

    async def serve(*given: Any) -> None:
        served.append(given)

    monkeypatch.setattr(server, "serve", serve)
    settings = Settings(workers=1)

    await supervisor.serve(settings)

    assert served == [(settings, WorkerInfo.alone())]


def test_a_worker_is_told_every_setting_of_its_supervisor_and_its_place(tmp_path: Path) -> None:
    place = WorkerInfo(slot=1, workers=2, folder=tmp_path)
    settings = Settings(
        artifacts_dir=tmp_path, experiment=TWO_ARMS, redis_url="redis://:secret@h/1", admin_token="token"
    )

    assert supervisor._understood(supervisor._order(settings, place)) == (settings, place)


DIES = """
import pathlib, sys
sys.stdin.readline()
runs = pathlib.Path(sys.argv[1])
with runs.open("a") as file:
    file.write("x")
match len(runs.read_text()):
    case 1: print("ready"); sys.exit(3)
    case 2 | 3: print("no artifact"); sys.exit(2)
print("ready", flush=True)
sys.stdin.read()
"""
REFUSES_TO_END = """
import signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
sys.stdin.read()
"""


def supervisor_of(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> supervisor._Supervisor:
    """Of one worker that runs that program."""
    monkeypatch.setattr(supervisor, "COMMAND", (sys.executable, "-c", program, str(folder / "runs")))
    monkeypatch.setattr(supervisor, "WAITS_S", (0.0, 0.01))
    monkeypatch.setattr(supervisor, "STOP_S", 0.1)
    return supervisor._Supervisor(Settings(drain_s=0), [WorkerInfo(slot=0, workers=1, folder=folder)])


async def test_who_served_once_is_started_again_however_often_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, eventually: Any
) -> None:
    supervising = supervisor_of(DIES, tmp_path, monkeypatch)
    running = asyncio.create_task(supervising.run())

    async def serves_again() -> bool:
        return len(caplog.records) > 3 and bool(supervising._ready)

    with caplog.at_level(logging.INFO):
        await eventually(serves_again)
    supervising._stop_all(signal.SIGTERM)
    await asyncio.wait_for(running, 10)

    died = [record.__dict__ for record in caplog.records if record.msg == "worker died"]
    assert [entry["reason"] for entry in died] == ["worker 0 ended with code 3", "no artifact", "no artifact"]
    assert [entry["wait_s"] for entry in died] == [0.0, 0.01, 0.01]
    assert [record.msg for record in caplog.records].count("serving") == 1


async def test_who_never_served_ends_the_service_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").write_text("x")

    with pytest.raises(WorkerError, match="^no artifact$"):
        await supervisor_of(DIES, tmp_path, monkeypatch).run()
    with pytest.raises(WorkerError, match="^worker 0 ended with code 7$"):
        await supervisor_of("import sys; sys.exit(7)", tmp_path, monkeypatch).run()


def test_a_worker_that_dies_before_it_is_told_anything_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On uvloop, as in production, whose words for a closed pipe are its own."""
    supervising = supervisor_of(REFUSES_TO_END, tmp_path, monkeypatch)
    starts = 0

    async def run() -> None:
        nonlocal starts
        running = asyncio.create_task(supervising.run())
        while not supervising._ready:  # noqa: ASYNC110 - its program tells nobody else
            await asyncio.sleep(0.01)
        monkeypatch.setattr(supervisor, "COMMAND", ("false",))
        supervising._processes[0].kill()
        own = supervising._run

        async def counted(place: WorkerInfo) -> str:
            nonlocal starts
            starts += 1
            return await own(place)

        monkeypatch.setattr(supervising, "_run", counted)
        while starts < 8:
            await asyncio.sleep(0.01)
            assert not running.done()
        supervising._stop_all(signal.SIGTERM)
        await running

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(run(), 30))


async def test_who_does_not_end_in_time_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    supervising = supervisor_of(REFUSES_TO_END, tmp_path, monkeypatch)
    running = asyncio.create_task(supervising.run())

    async def serves() -> bool:
        return bool(supervising._ready)

    await eventually(serves)
    supervising._stop_all(signal.SIGTERM)

    await asyncio.wait_for(running, 10)
