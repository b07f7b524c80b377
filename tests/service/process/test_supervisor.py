"""How many workers there are, what they are handed, and when one is started again or given up: programs stand in."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from service.process import supervisor
from service.process.supervisor import Host, Supervisor, WorkerError
from service.settings import Settings, SettingsError
from service.worker import WorkerInfo
from tests.service.conftest import TWO_ARMS

Eventually = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


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

    assert supervisor.num_workers(Settings(**given)) == number


def host(program: str = "", *arguments: str, reload: Callable[[], Settings] = Settings) -> Host:
    command = (sys.executable, "-c", program, *arguments)
    return Host(command=command, reload=reload, ended=lambda _worker: None)


async def test_one_worker_is_this_very_process() -> None:
    served = []

    async def serve_here(*given: Any) -> None:
        served.append(given)

    settings = Settings(workers=1)

    await supervisor.serve(settings, host(), serve_here)

    assert served == [(settings, WorkerInfo.alone(), None)]


async def test_several_workers_without_a_store_to_share_are_refused() -> None:
    async def serve_here(*_: Any) -> None:
        raise AssertionError("nothing to serve")

    with pytest.raises(SettingsError, match="^setting workers: 2 processes need a store to share, and there is none"):
        await supervisor.serve(Settings(workers=2), host(), serve_here)


def test_a_worker_is_handed_every_setting_of_its_supervisor_and_who_it_is(tmp_path: Path) -> None:
    worker = WorkerInfo(slot=1, workers=2, folder=tmp_path)
    settings = Settings(
        artifacts_dir=tmp_path,
        experiment=TWO_ARMS,
        redis_url="redis://:secret@h/1",
        admin_token="token",
        admin_tokens={"alice": "another"},
    )

    assert supervisor._unpack_order(supervisor._pack_order(settings, worker)) == (settings, worker)


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
# The first one never answers a ping, as a worker whose event loop hangs; the next ones do.
HANGS_ONCE = """
import pathlib, sys
sys.stdin.readline()
first = not pathlib.Path(sys.argv[1]).exists()
pathlib.Path(sys.argv[1]).touch()
print("ready", flush=True)
for ping in sys.stdin:
    if not first:
        print("pong", flush=True)
"""


def supervisor_of(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> Supervisor:
    """Of one worker that runs that program."""
    monkeypatch.setattr(supervisor, "WAITS_S", (0.0, 0.01))
    monkeypatch.setattr(supervisor, "STOP_S", 0.1)
    settings = Settings(drain_s=0, **given)
    return Supervisor(settings, [WorkerInfo(slot=0, workers=1, folder=folder)], host(program, str(folder / "runs")))


async def test_a_worker_that_served_once_is_started_again_however_often_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, eventually: Eventually
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


async def test_a_worker_that_never_served_ends_the_service_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").write_text("x")

    with pytest.raises(WorkerError, match="^no artifact$"):
        await supervisor_of(DIES, tmp_path, monkeypatch).run()
    with pytest.raises(WorkerError, match="^worker 0 ended with code 7$"):
        await supervisor_of("import sys; sys.exit(7)", tmp_path, monkeypatch).run()


async def test_a_worker_that_answers_no_ping_is_killed_and_replaced_and_one_that_does_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    monkeypatch.setattr(supervisor, "PING_S", 0.2)
    supervising = supervisor_of(HANGS_ONCE, tmp_path, monkeypatch, watchdog_s=0.4)
    running = asyncio.create_task(supervising.run())
    answers = 0

    async def answers_many_pings() -> bool:
        nonlocal answers
        heartbeat = supervising._heartbeats.get(0)
        if heartbeat is not None and not hasattr(heartbeat, "counted"):
            heartbeat.counted = True  # type: ignore[attr-defined] # one is counted once
            answered = heartbeat.answered

            def counting() -> None:
                nonlocal answers
                answers += 1
                answered()

            heartbeat.answered = counting  # type: ignore[method-assign]
        return answers > 2 * (2 + supervisor.MARGIN_PINGS)  # or it would have been killed, too

    with caplog.at_level(logging.INFO):
        await eventually(answers_many_pings)
    supervising._stop_all(signal.SIGTERM)
    await asyncio.wait_for(running, 10)

    killed = [record.__dict__["reason"] for record in caplog.records if record.msg == "worker killed"]
    died = [record.__dict__["reason"] for record in caplog.records if record.msg == "worker died"]
    assert killed == ["its event loop hangs"]
    assert died == ["worker 0 ended with signal SIGKILL"]


def test_a_worker_that_dies_before_it_is_handed_anything_costs_no_other(
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
        monkeypatch.setattr(supervising, "_host", Host(command=("false",), reload=Settings, ended=lambda _worker: None))
        supervising._processes[0].kill()
        original = supervising._run

        async def counted(worker: WorkerInfo) -> str:
            nonlocal starts
            starts += 1
            return await original(worker)

        monkeypatch.setattr(supervising, "_run", counted)
        while starts < 8:
            await asyncio.sleep(0.01)
            assert not running.done()
        supervising._stop_all(signal.SIGTERM)
        await running

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(run(), 30))


async def test_a_worker_that_does_not_end_in_time_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    supervising = supervisor_of(REFUSES_TO_END, tmp_path, monkeypatch)
    running = asyncio.create_task(supervising.run())

    async def serves() -> bool:
        return bool(supervising._ready)

    await eventually(serves)
    supervising._stop_all(signal.SIGTERM)

    await asyncio.wait_for(running, 10)


# Writes down when it serves and when it ends, in the order of events.
NOTES = """
import json, os, signal, sys
order = json.loads(sys.stdin.readline())
slot = order["worker"]["slot"]
notes = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def end(*_):
    os.write(notes, f"ends {slot}\\n".encode())
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
if order["settings"]["timeout_ms"] == 13:
    print("no artifact"); sys.exit(2)
os.write(notes, f"serves {slot} {order['settings']['timeout_ms']:g}\\n".encode())
print("ready", flush=True)
for ping in sys.stdin:
    print("pong", flush=True)
"""


class Reloading:
    """Three workers, and settings that a test changes; `timeout_ms` is the one to tell them by."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "notes"
        self.settings = Settings(drain_s=0, redis_url="redis://h", timeout_ms=1)
        workers = [WorkerInfo(slot=slot, workers=3, folder=folder) for slot in range(3)]
        handed = host(NOTES, str(self.file), reload=self.reload)
        self.supervisor = Supervisor(self.settings, workers, handed)

    def reload(self) -> Settings:
        if self.settings.timeout_ms == 99:
            raise SettingsError("that is no setting")
        return self.settings

    def notes(self) -> list[str]:
        return self.file.read_text().splitlines() if self.file.exists() else []

    async def hang_up(self, timeout_ms: float) -> None:
        self.settings = self.settings.model_copy(update={"timeout_ms": timeout_ms})
        os.kill(os.getpid(), signal.SIGHUP)


async def test_a_reload_replaces_one_worker_after_the_other_by_one_with_the_new_settings(
    tmp_path: Path, eventually: Eventually
) -> None:
    reloading = Reloading(tmp_path)
    running = asyncio.create_task(reloading.supervisor.run())

    async def all_serve() -> bool:
        return len(reloading.supervisor._ready) == 3

    async def all_are_replaced() -> bool:
        return len(reloading.notes()) == 9 and await all_serve()

    await eventually(all_serve)
    await reloading.hang_up(2)
    await eventually(all_are_replaced)
    reloading.supervisor._stop_all(signal.SIGTERM)
    await asyncio.wait_for(running, 10)

    notes = reloading.notes()
    assert sorted(notes[:3]) == ["serves 0 1", "serves 1 1", "serves 2 1"]
    assert notes[3:9] == ["ends 0", "serves 0 2", "ends 1", "serves 1 2", "ends 2", "serves 2 2"]


async def test_a_reload_whose_first_worker_does_not_come_up_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    monkeypatch.setattr(supervisor, "WAITS_S", (0.0, 0.01))
    reloading = Reloading(tmp_path)
    running = asyncio.create_task(reloading.supervisor.run())

    async def all_serve() -> bool:
        return len(reloading.supervisor._ready) == 3

    async def is_given_up() -> bool:
        return any(record.msg == "reload given up" for record in caplog.records) and await all_serve()

    await eventually(all_serve)
    await reloading.hang_up(13)
    await eventually(is_given_up)
    notes = reloading.notes()
    reloading.supervisor._stop_all(signal.SIGTERM)
    await asyncio.wait_for(running, 10)

    assert notes[3:] == ["ends 0", "serves 0 1"]
    assert [record.__dict__["reason"] for record in caplog.records if record.msg == "worker died"] == ["no artifact"]


async def test_settings_that_cannot_be_used_are_not_reloaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    reloading = Reloading(tmp_path)
    running = asyncio.create_task(reloading.supervisor.run())

    async def all_serve() -> bool:
        return len(reloading.supervisor._ready) == 3

    async def is_refused() -> bool:
        return any(record.msg == "reload refused" for record in caplog.records)

    await eventually(all_serve)
    await reloading.hang_up(99)
    await eventually(is_refused)
    notes = reloading.notes()
    reloading.supervisor._stop_all(signal.SIGTERM)
    await asyncio.wait_for(running, 10)

    assert len(notes) == 3
