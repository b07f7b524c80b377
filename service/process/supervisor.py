"""Supervisor: worker processes behind one port, each replaced when it dies or hangs, reloaded one by one, drained."""

import asyncio
import logging
import math
import os
import shutil
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from service.process import cpu_count, sockets
from service.settings import Settings, SettingsError
from service.worker import WorkerInfo

log = logging.getLogger(__name__)

# What a worker says on stdout; any other line there is why it cannot serve.
READY = "ready"  # it listens
PONG = "pong"  # its event loop turns: the answer to a line on stdin
PING = b"ping\n"
PING_S = 1.0
MARGIN_PINGS = 3  # beyond the watchdog's time, in which a worker says why it hangs and ends by itself
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - counting in files is as fast as in memory where the files are memory
STABLE_S = 60.0  # a worker that served that long and died is replaced at once
WAITS_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # before each replacement in a row of deaths, and the last one from then on
STOP_S = 30.0  # beyond the drain; a worker that has not ended by then is killed

Serve = Callable[[Settings, WorkerInfo, Callable[[], None] | None], Awaitable[None]]
"""Serves in this process until it is told to stop; calls what it is given once it listens."""


class WorkerError(RuntimeError):
    """A worker that could not start, in its own words."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """What the supervisor is handed. `command` starts a worker, which calls `work`.

    `reload` reads the settings anew; it raises ValueError, in one sentence, for some that cannot be used. `ended` hears
    of every worker that has ended, before another takes its slot.
    """

    command: Sequence[str]
    reload: Callable[[], Settings]
    ended: Callable[[WorkerInfo], None]


async def serve(settings: Settings, host: Host, serve_here: Serve) -> None:
    """Serves until SIGTERM or Ctrl-C, in this process if one is enough. Raises what is wrong with the settings."""
    workers = num_workers(settings)
    if workers == 1:
        await serve_here(settings, WorkerInfo.alone(), None)
        return
    if sys.platform != "linux":
        raise SettingsError(f"setting workers: more than one needs Linux, and this is {sys.platform}")
    _check_store(settings, workers)
    memory = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    with (
        sockets.reserve_port(settings.host, settings.port) as port,
        TemporaryDirectory(prefix="clickserve-", dir=memory, ignore_cleanup_errors=True) as folder,
    ):
        infos = [WorkerInfo(slot=slot, workers=workers, folder=Path(folder)) for slot in range(workers)]
        await Supervisor(settings.model_copy(update={"port": port}), infos, host).run()
    log.info("stopped")


def num_workers(settings: Settings) -> int:
    # Without a store that all can reach, a click would be in the history of some requests and not of others.
    return settings.workers or (1 if settings.redis_url is None else cpu_count.usable())


def _check_store(settings: Settings, workers: int) -> None:
    if settings.redis_url is None:
        reason = "each would keep clicks and shares of its own; set redis_url, or workers to 1"
        raise SettingsError(f"setting workers: {workers} processes need a store to share, and there is none: {reason}")


async def work(serve_here: Serve, setup: Callable[[WorkerInfo], None]) -> None:
    """One worker: its settings come on stdin, then pings, and it ends when its supervisor does. Raises as `serve`."""
    order = sys.stdin.buffer.readline()
    if not order:  # the supervisor is gone already
        return
    settings, worker = _unpack_order(order)
    setup(worker)
    loop, stdin = asyncio.get_running_loop(), sys.stdin.fileno()
    orphaned = False

    def hear() -> None:
        nonlocal orphaned
        pings = os.read(stdin, 4096)
        if pings:
            print(PONG, flush=True)
            return
        orphaned = True
        loop.remove_reader(stdin)
        signal.raise_signal(signal.SIGINT)  # which does not drain: the port may be wanted by another service

    loop.add_reader(stdin, hear)
    try:
        await serve_here(settings, worker, lambda: print(READY, flush=True))
    finally:
        if orphaned and worker.folder is not None:  # the supervisor would have removed it
            shutil.rmtree(worker.folder, ignore_errors=True)


def _pack_order(settings: Settings, worker: WorkerInfo) -> bytes:
    """For stdin and not the command line, as a URL in the settings may hold a password."""
    info = {"slot": worker.slot, "workers": worker.workers, "folder": str(worker.folder)}
    return msgspec.json.encode({"settings": settings.model_dump(mode="json"), "worker": info}) + b"\n"


def _unpack_order(order: bytes) -> tuple[Settings, WorkerInfo]:
    content = msgspec.json.decode(order)
    info = content["worker"]
    return Settings(**content["settings"]), WorkerInfo(**{**info, "folder": Path(info["folder"])})


class Supervisor:
    """One process per slot, from `run` on until it is told to stop."""

    def __init__(self, settings: Settings, workers: list[WorkerInfo], host: Host) -> None:
        self._settings = settings
        self._workers = workers
        self._host = host
        self._processes: dict[int, Process] = {}
        self._ready: set[int] = set()  # slots whose worker listens
        self._failed: set[int] = set()  # slots whose worker ended before it listened, since it was told to be replaced
        self._changed = asyncio.Event()  # either of these sets
        self._replaced: set[int] = set()  # slots whose worker is told to end for another
        self._heartbeats: dict[int, Heartbeat] = {}
        self._all_served = False
        self._stop = asyncio.Event()
        self._reload = asyncio.Event()

    async def run(self) -> None:
        """Until it is told to stop and every worker has ended. Raises WorkerError if one cannot even start."""
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sig, self._stop_all, sig)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        reloading = asyncio.create_task(self._reload_for_ever())
        try:
            async with asyncio.TaskGroup() as group:
                for worker in self._workers:
                    group.create_task(self._keep(worker))
        except* WorkerError as failed:
            raise failed.exceptions[0] from None
        finally:
            reloading.cancel()

    async def _keep(self, worker: WorkerInfo) -> None:
        """A worker in that slot, and another when it dies."""
        deaths = 0
        served = False
        while not self._stop.is_set():
            started = time.monotonic()
            reason = await self._run(worker)
            if self._stop.is_set():
                return
            if worker.slot in self._ready:
                served = True
            else:
                self._failed.add(worker.slot)
                self._changed.set()
            self._ready.discard(worker.slot)
            if not served:
                raise WorkerError(reason)
            if worker.slot in self._replaced:
                self._replaced.discard(worker.slot)
                continue
            deaths = 0 if time.monotonic() - started > STABLE_S else deaths
            wait_s = WAITS_S[min(deaths, len(WAITS_S) - 1)]
            deaths += 1
            log.error("worker died", extra={"worker": worker.slot, "reason": reason, "wait_s": wait_s})
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), wait_s)

    async def _run(self, worker: WorkerInfo) -> str:
        """One process from its start to its end. Returns why it ended."""
        slot = worker.slot
        try:
            # In a session of its own a worker does not get the terminal's Ctrl-C a second time.
            process = await asyncio.create_subprocess_exec(
                *self._host.command, stdin=PIPE, stdout=PIPE, start_new_session=True
            )
        except OSError as err:
            return f"worker {slot} cannot be started: {err.strerror}"
        self._processes[slot] = process
        try:
            if self._stop.is_set():  # while it was being started
                self._end(slot, signal.SIGTERM)
            await _send(process, _pack_order(self._settings, worker))
            reason = await self._listen(worker, process)
            code = await process.wait()
        finally:
            if process.returncode is None:  # another could not start, and so this one has nothing to drain for
                self._end(slot, signal.SIGINT)
                await process.wait()
            if slot in self._heartbeats:
                self._heartbeats.pop(slot).stop()
            del self._processes[slot]
            self._host.ended(worker)
        return reason or f"worker {slot} ended with {_exit_status(code)}"

    async def _listen(self, worker: WorkerInfo, process: Process) -> str:
        """Returns the last line that it said beside those of the protocol."""
        last_words = ""
        assert process.stdout is not None
        async for line in process.stdout:
            words = line.decode(errors="replace").strip()
            if words == READY:
                self._serves(worker, process)
            elif words == PONG:
                if worker.slot in self._heartbeats:
                    self._heartbeats[worker.slot].answered()
            else:
                last_words = words
        return last_words

    def _serves(self, worker: WorkerInfo, process: Process) -> None:
        self._ready.add(worker.slot)
        self._changed.set()
        if self._settings.watchdog_s:
            max_unanswered = math.ceil(self._settings.watchdog_s / PING_S) + MARGIN_PINGS
            self._heartbeats[worker.slot] = Heartbeat(worker.slot, process, max_unanswered=max_unanswered)
        log.info("worker serving", extra={"worker": worker.slot, "pid": process.pid})
        if len(self._ready) == len(self._workers) and not self._all_served:
            self._all_served = True
            address = {"host": self._settings.host, "port": self._settings.port}
            log.info("serving", extra={**address, "workers": worker.workers, "folder": worker.folder})

    async def _reload_for_ever(self) -> None:
        while True:
            await self._reload.wait()
            self._reload.clear()  # one more that comes meanwhile is for settings that were not read yet
            try:
                await self._reload_all()
            except Exception:  # the workers that serve go on
                log.exception("reload failed")

    async def _reload_all(self) -> None:
        """New settings for new workers, one by one: the next is replaced when every other serves.

        Where the first does not come up, the old settings are back.
        """
        try:
            settings = await asyncio.to_thread(self._host.reload)
            _check_store(settings, len(self._workers))
        except ValueError as err:
            log.error("reload refused", extra={"reason": str(err)})  # noqa: TRY400 - the reason says it all
            return
        # The address is taken, and the workers share it in their number.
        fixed = {"host": self._settings.host, "port": self._settings.port, "workers": self._settings.workers}
        ignored = {name: getattr(settings, name) for name, value in fixed.items() if getattr(settings, name) != value}
        if ignored.get("port") == 0:  # any will do
            del ignored["port"]
        if ignored:
            log.warning("settings that only a restart changes", extra=ignored)
        old_settings, self._settings = self._settings, settings.model_copy(update=fixed)
        log.info("reloading", extra={"workers": len(self._workers)})
        for worker in self._workers:
            await self._until(lambda: len(self._ready) == len(self._workers))
            slot, old = worker.slot, self._processes[worker.slot]
            self._replaced.add(slot)
            self._failed.discard(slot)
            self._end(slot, signal.SIGTERM)
            await self._until(partial(self._is_replaced, slot, old))
            if slot in self._failed and worker is self._workers[0]:
                self._settings = old_settings
                log.error("reload given up", extra={"worker": slot, "reason": "with it no worker comes up"})
                return
            await self._until(partial(self._serves_after, slot, old))
        log.info("reloaded", extra={"workers": len(self._workers)})

    def _is_replaced(self, slot: int, old: Process) -> bool:
        return slot in self._failed or self._serves_after(slot, old)

    def _serves_after(self, slot: int, old: Process) -> bool:
        return slot in self._ready and self._processes.get(slot) is not old

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._changed.clear()
            await self._changed.wait()

    def _stop_all(self, sig: signal.Signals) -> None:
        log.info("stopping", extra={"signal": sig.name})
        self._stop.set()
        for slot in list(self._processes):
            self._end(slot, sig)

    def _end(self, slot: int, sig: signal.Signals) -> None:
        """Tells a worker to end; kills it where it does not in time."""
        process = self._processes[slot]
        if slot in self._heartbeats:  # an app that closes need not answer
            self._heartbeats.pop(slot).stop()
        asyncio.get_running_loop().call_later(self._settings.drain_s + STOP_S, _kill, slot, process)
        # To Ctrl-C a Python that still imports answers with a traceback; there is nothing to drain in either case.
        with suppress(ProcessLookupError):  # it has ended, and nobody has heard of it yet
            process.send_signal(sig if slot in self._ready else signal.SIGTERM)


class Heartbeat:
    """Pings one worker every PING_S, and kills it after so many in a row without an answer.

    Pings are counted and not seconds: a machine that slept is no worker that hangs.
    """

    def __init__(self, slot: int, process: Process, *, max_unanswered: int) -> None:
        self._slot = slot
        self._process = process
        self._max_unanswered = max_unanswered
        self._unanswered = 0
        self._task = asyncio.create_task(self._beat())

    def answered(self) -> None:
        self._unanswered = 0

    def stop(self) -> None:
        self._task.cancel()

    async def _beat(self) -> None:
        while self._unanswered < self._max_unanswered:
            self._unanswered += 1
            await _send(self._process, PING)
            await asyncio.sleep(PING_S)
        log.error("worker killed", extra={"worker": self._slot, "reason": "its event loop hangs"})
        with suppress(ProcessLookupError):
            self._process.kill()


async def _send(process: Process, line: bytes) -> None:
    """To a process that has ended it says nothing: its end is noticed elsewhere."""
    assert process.stdin is not None
    with suppress(ConnectionError, RuntimeError):  # RuntimeError is uvloop's word for a pipe that it has closed
        process.stdin.write(line)
        await process.stdin.drain()


def _kill(slot: int, process: Process) -> None:
    if process.returncode is None:
        log.error("worker killed", extra={"worker": slot, "reason": "it did not end in time"})
        with suppress(ProcessLookupError):
            process.kill()


def _exit_status(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
