"""A change in every process that serves behind one port, or in none: prepared by all, then made by all."""

import asyncio
import fcntl
import logging
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import msgspec

from service.changes import Change, Changes, Prepared, State
from service.errors import Problem, busy_changing
from service.place import Place

log = logging.getLogger(__name__)

PREPARE_S = 300.0  # for a peer to read, verify and warm a model
COMMIT_S = 10.0
MAX_LINE = 2**20

COMMIT, DISCARD = b"commit\n", b"discard\n"


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What all processes serve after so many changes: the file that a process which starts later begins with."""

    changes: int
    state: State


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    change: Change
    number: int  # of the change, as `Served.changes` counts


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    status: int
    detail: str
    reason: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    refusal: Refusal | None = None


def served(place: Place) -> Served | None:
    """What serves in the other processes; None where nothing was changed since the first of them started."""
    if place.folder is None:
        return None
    try:
        return msgspec.json.decode((place.folder / "served.json").read_bytes(), type=Served)
    except FileNotFoundError:
        return None


class Peers:
    """One process among those of its place. A place without a folder has no others, and then no file is written."""

    def __init__(self, place: Place, changes: Changes) -> None:
        self._place = place
        self._changes = changes
        self._busy = False

    @asynccontextmanager
    async def joined(self) -> AsyncIterator[None]:
        """Takes part in the others' changes while it is open. What they changed before is caught up first."""
        folder = self._place.folder
        if folder is None:
            yield
            return
        async with AsyncExitStack() as stack:
            async with _turn(folder):  # so that no change passes between the reading and the listening
                now = served(self._place)
                if now is not None:
                    await self._changes.catch_up(now.state)
                socket = _socket(folder, self._place.slot)
                server = await asyncio.start_unix_server(self._answer, socket, limit=MAX_LINE)
                stack.callback(server.close)
                stack.callback(socket.unlink, missing_ok=True)
            yield

    async def make(self, change: Change) -> None:
        """The change, in every process or in none.

        Raises Problem: what any of them has against it, and 409 while another change is under way anywhere.
        """
        folder = self._place.folder
        with self._own_turn(), _lock(folder) as got:
            if not got:
                raise busy_changing("another change is under way, or a process starts; try again")
            prepared = await self._changes.prepare(change)
            if folder is None:
                prepared.commit()
                return
            last = served(self._place)
            number = 1 if last is None else last.changes + 1
            await self._make_everywhere(folder, prepared, number)

    async def _make_everywhere(self, folder: Path, prepared: Prepared, number: int) -> None:
        asked = Asked(change=prepared.change, number=number)
        others = [_socket(folder, slot) for slot in range(self._place.workers) if slot != self._place.slot]
        async with AsyncExitStack() as stack:
            lines = [line for path in others if (line := await _Line.open(path, stack)) is not None]
            try:
                _raise_first(await asyncio.gather(*(line.prepare(asked) for line in lines)))
            except BaseException:
                prepared.discard()
                raise  # the lines close, and each peer discards
            # Nothing refuses from here on. The file decides for a peer that loses its line now, and for who starts.
            prepared.commit()
            _write(folder, Served(changes=number, state=self._changes.state()))
            await asyncio.gather(*(line.commit() for line in lines))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One change that another process asks for. It holds what it prepared until that one decides, or is gone."""
        try:
            asked = msgspec.json.decode(await reader.readline(), type=Asked)
            try:
                prepared = await self._changes.prepare(asked.change)
            except Problem as problem:
                refusal = Refusal(status=problem.status, detail=problem.detail, reason=problem.reason)
                await _say(writer, Answer(refusal=refusal))
                return
            decided = False
            try:
                await _say(writer, Answer())
                decided = await reader.readline() == COMMIT
            finally:
                self._end(prepared, asked, decided=decided)
            await _say(writer, Answer())
        except (ConnectionError, msgspec.DecodeError) as err:
            log.warning("a change was broken off", extra={"reason": str(err)})
        finally:
            writer.close()

    def _end(self, prepared: Prepared, asked: Asked, *, decided: bool) -> None:
        now = served(self._place)
        if decided or (now is not None and now.changes >= asked.number):
            prepared.commit()
        else:
            prepared.discard()

    @contextmanager
    def _own_turn(self) -> Iterator[None]:
        if self._busy:
            raise busy_changing("another change is under way; try again")
        self._busy = True
        try:
            yield
        finally:
            self._busy = False


class _Line:
    """To one peer. One that is gone has nothing against a change: whoever starts in its place reads the file."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, path: Path, stack: AsyncExitStack) -> "_Line | None":
        try:
            reader, writer = await asyncio.open_unix_connection(path, limit=MAX_LINE)
        except OSError:
            return None
        stack.callback(writer.close)
        return cls(reader, writer)

    async def prepare(self, asked: Asked) -> Answer:
        try:
            async with asyncio.timeout(PREPARE_S):
                await _say(self._writer, asked)
                told = await self._reader.readline()
        except TimeoutError:
            raise busy_changing(f"a process did not get ready within {PREPARE_S:g} s") from None
        except ConnectionError:
            return Answer()
        return msgspec.json.decode(told, type=Answer) if told else Answer()

    async def commit(self) -> None:
        try:
            async with asyncio.timeout(COMMIT_S):
                self._writer.write(COMMIT)
                await self._writer.drain()
                await self._reader.readline()
        except (TimeoutError, ConnectionError) as err:
            log.warning("a process did not confirm a change", extra={"reason": repr(err)})


def _raise_first(answers: Sequence[Answer]) -> None:
    for answer in answers:
        if answer.refusal is not None:
            raise Problem(answer.refusal.status, answer.refusal.detail, reason=answer.refusal.reason)


async def _say(writer: asyncio.StreamWriter, told: msgspec.Struct) -> None:
    writer.write(msgspec.json.encode(told) + b"\n")
    await writer.drain()


def _socket(folder: Path, slot: int) -> Path:
    return folder / f"peer-{slot}.sock"


def _write(folder: Path, told: Served) -> None:
    draft = folder / "served.json.tmp"
    draft.write_bytes(msgspec.json.encode(told))
    draft.replace(folder / "served.json")


@contextmanager
def _lock(folder: Path | None) -> Iterator[bool]:
    """Whether it is this process's turn. The kernel ends the turn of one that dies."""
    if folder is None:
        yield True
        return
    file = os.open(folder / "changes.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(file)


@asynccontextmanager
async def _turn(folder: Path) -> AsyncIterator[None]:
    """Waits for it."""
    while True:
        with _lock(folder) as got:
            if got:
                yield
                return
        await asyncio.sleep(0.05)
