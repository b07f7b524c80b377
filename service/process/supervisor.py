"""Several processes behind one port: started together, each replaced when it dies, stopped together."""

import asyncio
import logging
import os
import shutil
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from service.experiments import assignment
from service.observability import json_log, multiprocess
from service.process import cpu_count, sockets
from service.settings import Settings, SettingsError
from service.worker import WorkerInfo

log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "service", "serve", "--as-worker")
READY = "ready"  # what a worker says on stdout once it listens; the other thing that it says there is why it cannot
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - counting in files is as fast as in memory where the files are memory
STABLE_S = 60.0  # a worker that served that long and died is replaced at once
WAITS_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # before each replacement in a row of deaths, and the last one from then on
STOP_S = 30.0  # beyond the drain; who has not ended by then is killed


class WorkerError(RuntimeError):
    """A worker that could not start, in its own words."""


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM or Ctrl-C, in this process if one is enough. Raises what is wrong with the settings."""
    workers = number(settings)
    if workers == 1:
        from service.process import server

        await server.serve(settings, WorkerInfo.alone())
        return
    if sys.platform != "linux":
        raise SettingsError(f"setting workers: more than one needs Linux, and this is {sys.platform}")
    if settings.redis_url is None:
        log.warning("no redis_url: every worker keeps clicks of its own")
    memory = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    with (
        sockets.reserved(settings.host, settings.port) as port,
        TemporaryDirectory(prefix="clickserve-", dir=memory, ignore_cleanup_errors=True) as folder,
    ):
        # Read once: a worker that is replaced serves what the others serve, whatever stands in the file by then.
        read = assignment.given(settings.experiment).model_dump(by_alias=True)
        places = [WorkerInfo(slot=slot, workers=workers, folder=Path(folder)) for slot in range(workers)]
        await _Supervisor(settings.model_copy(update={"port": port, "experiment": read}), places).run()
    log.info("stopped")


def number(settings: Settings) -> int:
    # Without a store that all can reach, a click would be in the history of some requests and not of others.
    return settings.workers or (1 if settings.redis_url is None else cpu_count.usable())


async def work() -> None:
    """One worker, which is told its settings and place on stdin and ends when that does. Raises as `serve`."""
    told = sys.stdin.buffer.readline()
    if not told:  # the supervisor is gone already
        return
    settings, place = _understood(told)
    json_log.setup(worker=place.slot)
    orphaned = False

    def leave() -> None:
        nonlocal orphaned
        orphaned = True
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        signal.raise_signal(signal.SIGINT)  # which does not drain: the port may be wanted by who takes our place

    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), leave)
    from service.process import server

    try:
        await server.serve(settings, place, listening=lambda: print(READY, flush=True))
    finally:
        if orphaned and place.folder is not None:  # the supervisor would have removed it
            shutil.rmtree(place.folder, ignore_errors=True)


def _order(settings: Settings, place: WorkerInfo) -> bytes:
    """On stdin and not the command line, as a URL in the settings may hold a password."""
    seat = {"slot": place.slot, "workers": place.workers, "folder": str(place.folder)}
    return msgspec.json.encode({"settings": settings.model_dump(mode="json"), "place": seat}) + b"\n"


def _understood(order: bytes) -> tuple[Settings, WorkerInfo]:
    told = msgspec.json.decode(order)
    place = told["place"]
    return Settings(**told["settings"]), WorkerInfo(**{**place, "folder": Path(place["folder"])})


class _Supervisor:
    def __init__(self, settings: Settings, places: list[WorkerInfo]) -> None:
        self._settings = settings
        self._places = places
        self._processes: dict[int, Process] = {}
        self._ready: set[int] = set()  # slots whose worker listens
        self._all_served = False
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Until it is told to stop and every worker has ended. Raises WorkerError if one cannot even start."""
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self._stop_all, sig)
        try:
            async with asyncio.TaskGroup() as group:
                for place in self._places:
                    group.create_task(self._keep(place))
        except* WorkerError as failed:
            raise failed.exceptions[0] from None

    async def _keep(self, place: WorkerInfo) -> None:
        """A worker in that place, and another when it dies."""
        deaths = 0
        served = False
        while not self._stop.is_set():
            started = time.monotonic()
            why = await self._run(place)
            if self._stop.is_set():
                return
            served = served or place.slot in self._ready
            self._ready.discard(place.slot)
            if not served:
                raise WorkerError(why)
            deaths = 0 if time.monotonic() - started > STABLE_S else deaths
            wait_s = WAITS_S[min(deaths, len(WAITS_S) - 1)]
            deaths += 1
            log.error("worker died", extra={"worker": place.slot, "reason": why, "wait_s": wait_s})
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), wait_s)

    async def _run(self, place: WorkerInfo) -> str:
        """One process from its start to its end. Returns why it ended."""
        try:
            # In a session of its own a worker does not get the terminal's Ctrl-C a second time.
            process = await asyncio.create_subprocess_exec(*COMMAND, stdin=PIPE, stdout=PIPE, start_new_session=True)
        except OSError as err:
            return f"worker {place.slot} cannot be started: {err.strerror}"
        self._processes[place.slot] = process
        try:
            if self._stop.is_set():  # while it was being started
                self._end(place.slot, signal.SIGTERM)
            assert process.stdin is not None
            # Then it died at once, which is told below; RuntimeError is uvloop's word for a pipe that it has closed.
            with suppress(ConnectionError, RuntimeError):
                process.stdin.write(_order(self._settings, place))
                await process.stdin.drain()
            said = await self._listen(place, process)
            code = await process.wait()
        finally:
            if process.returncode is None:  # another could not start, and so this one has nothing to drain for
                self._end(place.slot, signal.SIGINT)
                await process.wait()
            del self._processes[place.slot]
            multiprocess.leave(place)
        return said or f"worker {place.slot} ended with {_told(code)}"

    async def _listen(self, place: WorkerInfo, process: Process) -> str:
        """Returns the last thing that it said but that it is ready."""
        said = ""
        assert process.stdout is not None
        async for line in process.stdout:
            if line.decode().strip() == READY:
                self._ready.add(place.slot)
                log.info("worker serving", extra={"worker": place.slot, "pid": process.pid})
                if len(self._ready) == len(self._places) and not self._all_served:
                    self._all_served = True
                    told = {"host": self._settings.host, "port": self._settings.port, "workers": place.workers}
                    log.info("serving", extra={**told, "folder": place.folder})
            else:
                said = line.decode(errors="replace").strip()
        return said

    def _stop_all(self, sig: signal.Signals) -> None:
        log.info("stopping", extra={"signal": sig.name})
        if not self._stop.is_set():
            asyncio.get_running_loop().call_later(self._settings.drain_s + STOP_S, self._kill_all)
        self._stop.set()
        for slot in self._processes:
            self._end(slot, sig)

    def _end(self, slot: int, sig: signal.Signals) -> None:
        # To Ctrl-C a Python that still imports answers with a traceback; there is nothing to drain in either case.
        with suppress(ProcessLookupError):  # it has ended, and nobody has heard of it yet
            self._processes[slot].send_signal(sig if slot in self._ready else signal.SIGTERM)

    def _kill_all(self) -> None:
        for slot, process in self._processes.items():
            log.error("worker killed", extra={"worker": slot, "reason": "it did not end in time"})
            with suppress(ProcessLookupError):
                process.kill()


def _told(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
