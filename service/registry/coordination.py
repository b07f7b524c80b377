"""A change in every process that serves behind one port, or in none: prepared by all, then made by all."""

import asyncio
import fcntl
import logging
import os
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import msgspec

from service.errors import Conflict, Refusal
from service.registry.changes import Change, Changes, Prepared, State
from service.worker import Place

log = logging.getLogger(__name__)

PREPARE_S = 300.0  # for a peer to read, verify and warm a model
COMMIT_S = 10.0
MAX_LINE = 2**20

COMMIT = b"commit\n"
THE_START = "the start"  # is no change's name


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What all processes serve since the first began or the last change: what one that starts later begins with."""

    last: str  # change, by its name
    state: State


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    change: Change
    name: str  # of this attempt and no other, so that one which was given up is never taken for made


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    status: int
    detail: str
    reason: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    refusal: Refusal | None = None


def served(place: Place) -> Served | None:
    """What serves in the other processes; None where there are none yet."""
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
        """Takes part in the others' changes while it is open. What they serve by then is caught up with first.

        The first one says what that is, as `current` may be another version for whoever starts later.
        """
        folder = self._place.folder
        if folder is None:
            yield
            return
        async with AsyncExitStack() as stack:
            async with _turn(folder):  # so that no change passes between the reading and the listening
                now = served(self._place)
                if now is None:
                    _write(folder, Served(last=THE_START, state=self._changes.state()))
                else:
                    await self._changes.catch_up(now.state)
                socket = _socket(folder, self._place.slot)
                server = await asyncio.start_unix_server(self._answer, socket, limit=MAX_LINE)
                stack.callback(server.close)
                stack.callback(socket.unlink, missing_ok=True)
            yield

    async def make(self, change: Change) -> None:
        """The change, in every process or in none.

        Raises Refusal: what any of them has against it, and 409 while another change is under way anywhere.
        """
        folder = self._place.folder
        with self._own_turn(), _lock(folder) as got:
            if not got:
                raise Conflict("another change is under way, or a process starts; try again")
            prepared = await self._changes.prepare(change)
            if folder is None:
                prepared.commit()
                return
            await self._make_everywhere(folder, prepared)

    async def _make_everywhere(self, folder: Path, prepared: Prepared) -> None:
        asked = Asked(change=prepared.change, name=uuid.uuid4().hex)
        others = [_socket(folder, slot) for slot in range(self._place.workers) if slot != self._place.slot]
        async with AsyncExitStack() as stack:
            try:
                lines = [line for path in others if (line := await _Line.open(path, stack)) is not None]
                _raise_first(await asyncio.gather(*(line.prepare(asked) for line in lines)))
            except BaseException:
                prepared.discard()
                raise  # the lines close, and each peer discards
            # Nothing refuses from here on. The file decides for a peer that loses its line now, and for who starts.
            prepared.commit()
            try:
                _write(folder, Served(last=asked.name, state=self._changes.state()))
            finally:  # where the disk is full, those that live agree all the same
                await asyncio.gather(*(line.commit() for line in lines))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One change that another process asks for. It holds what it prepared until that one decides, or is gone."""
        try:
            asked = msgspec.json.decode(await reader.readline(), type=Asked)
            try:
                with self._own_turn():  # one that was given up may still be read here
                    await self._prepare_and_end(asked, reader, writer)
            except Refusal as problem:
                refusal = Refusal(status=problem.status, detail=problem.detail, reason=problem.reason)
                await _say(writer, Answer(refusal=refusal))
                return
            await _say(writer, Answer())
        except (ConnectionError, msgspec.DecodeError) as err:
            log.warning("a change was broken off", extra={"reason": str(err)})
        finally:
            writer.close()

    async def _prepare_and_end(self, asked: Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Raises Refusal where it cannot be: silence would be taken for that of a process that has died."""
        try:
            prepared = await self._changes.prepare(asked.change)
        except Refusal:
            raise
        except Exception:  # whatever it is, the change is refused with it
            log.exception("unforeseen error")
            raise Refusal(500, "a process failed to get ready; it has logged why", reason="internal") from None
        decided = False
        try:
            await _say(writer, Answer())
            decided = await reader.readline() == COMMIT
        finally:
            self._end(prepared, asked, decided=decided)

    def _end(self, prepared: Prepared, asked: Asked, *, decided: bool) -> None:
        now = served(self._place)
        if decided or (now is not None and now.last == asked.name):
            prepared.commit()
        else:
            prepared.discard()

    @contextmanager
    def _own_turn(self) -> Iterator[None]:
        if self._busy:
            raise Conflict("another change is under way; try again")
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
            raise Conflict(f"a process did not get ready within {PREPARE_S:g} s") from None
        except ConnectionError:
            return Answer()
        return msgspec.json.decode(told, type=Answer) if told else Answer()

    async def commit(self) -> None:
        try:
            async with asyncio.timeout(COMMIT_S):
                await _send(self._writer, COMMIT)
                await self._reader.readline()
        except (TimeoutError, ConnectionError) as err:
            log.warning("a process did not confirm a change", extra={"reason": repr(err)})


def _raise_first(answers: Sequence[Answer]) -> None:
    for answer in answers:
        if answer.refusal is not None:
            raise Refusal(answer.refusal.status, answer.refusal.detail, reason=answer.refusal.reason)


async def _say(writer: asyncio.StreamWriter, told: msgspec.Struct) -> None:
    await _send(writer, msgspec.json.encode(told) + b"\n")


async def _send(writer: asyncio.StreamWriter, line: bytes) -> None:
    """Raises ConnectionError where the other is gone."""
    try:
        writer.write(line)
        await writer.drain()
    except RuntimeError as err:  # so uvloop says of a connection that it has closed
        raise ConnectionError(str(err)) from err


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
