"""One connection to Redis that many callers share: commands go out as they come, replies come back in their order.

redis-py gives each command a connection of its own, with some tasks and timers around it, which takes longer than the
server does. Here a caller that gives up leaves its command to be answered, and nobody's connection is lost by that.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from redis import exceptions
from redis.asyncio.connection import AbstractConnection

LOOKS = 3  # turns of the event loop, after a reply's time, in which it may be found to have come
CONNECT_S = 1.0  # for a connection, which takes several round trips: longer than anybody waits for it

Reply = asyncio.Future[Any]


class Wire:
    """Connects on first use. `told` hears of each command whether the server answered it in time."""

    def __init__(
        self, connection: Callable[[], AbstractConnection], *, timeout_s: float, told: Callable[[bool], None]
    ) -> None:
        self._make = connection
        self._timeout_s = timeout_s
        self._told = told
        self._open: _Open | None = None
        self._opening: asyncio.Task[_Open] | None = None

    async def ask(self, command: Sequence[bytes]) -> Any:
        """The reply. Raises what redis-py raises, and TimeoutError.

        A connection found closed is made anew once: a server that restarted closed it before it read the command.
        """
        try:
            try:
                return await self._ask(command)
            except exceptions.ConnectionError:
                return await self._ask(command)
        except (exceptions.ConnectionError, exceptions.TimeoutError):
            self._told(False)
            raise

    async def _ask(self, command: Sequence[bytes]) -> Any:
        opened = self._open
        if opened is None or not opened.is_usable:
            if self._opening is None or self._opening.done():
                self._opening = asyncio.create_task(self._connect())
                self._opening.add_done_callback(_heard)
            try:
                async with asyncio.timeout(self._timeout_s):
                    opened = await asyncio.shield(self._opening)  # for those who come later, should all give up
            except TimeoutError:
                raise exceptions.TimeoutError("Timeout connecting to the server") from None
        return await opened.ask(command, self._timeout_s)

    async def _connect(self) -> "_Open":
        connection = self._make()
        try:
            async with asyncio.timeout(CONNECT_S):
                await connection.connect()  # type: ignore[no-untyped-call] # the library does not annotate it
        except TimeoutError:
            await connection.disconnect(nowait=True)
            raise exceptions.TimeoutError("Timeout connecting to the server") from None
        self._open = _Open(connection, self._told)
        return self._open

    async def aclose(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        if self._open is not None:
            await self._open.aclose()


def _heard(opening: "asyncio.Task[_Open]") -> None:
    """Whoever waited has given up, and nobody else asks why it failed."""
    if not opening.cancelled():
        opening.exception()


class _Open:
    def __init__(self, connection: AbstractConnection, told: Callable[[bool], None]) -> None:
        self.is_usable = True
        self._connection = connection
        self._told = told
        self._waiting: deque[tuple[Reply, asyncio.TimerHandle]] = deque()
        self._loop = asyncio.get_running_loop()
        self._reader = asyncio.create_task(self._read())

    async def ask(self, command: Sequence[bytes], timeout_s: float) -> Any:
        if not self.is_usable:  # lost since it was chosen: redis-py would connect anew, and nobody read
            raise exceptions.ConnectionError("Connection closed")
        reply: Reply = self._loop.create_future()
        self._waiting.append((reply, self._loop.call_later(timeout_s, self._late, reply)))
        try:
            async with asyncio.timeout(timeout_s):  # a server that reads no more takes no more either
                # Nothing else runs between the waiting and the writing: replies are told apart by their order alone.
                await self._connection.send_packed_command(command, check_health=False)
        except BaseException:  # part of it may be out, so redis-py has closed the connection
            self.is_usable = False
            self._reader.cancel()
            if not reply.cancel():
                reply.exception()  # which nobody else reads
            raise
        return await reply  # whoever gives up here cancels it, and it is passed over when it comes

    def _late(self, reply: Reply, looks: int = LOOKS) -> None:
        """A connection that was silent for so long may be dead without a word: the next caller gets another.

        An event loop that stood still runs its timers first, before it reads what came meanwhile: that is no silence.
        """
        if looks:
            timer = self._loop.call_later(0, self._late, reply, looks - 1)
            for place, (waiting, _) in enumerate(self._waiting):
                if waiting is reply:
                    self._waiting[place] = (reply, timer)
                    return
            timer.cancel()  # it has come
            return
        self._told(False)
        self.is_usable = False
        if not reply.done():
            reply.set_exception(TimeoutError("Timeout reading from the server"))
        if all(waiting.done() for waiting, _ in self._waiting):
            self._reader.cancel()

    async def _read(self) -> None:
        failure: Exception = exceptions.ConnectionError("Connection closed")
        try:
            while self.is_usable or self._waiting:
                answer = await self._answer()
                reply, timer = self._waiting.popleft()
                timer.cancel()
                if self.is_usable:
                    self._told(True)
                if reply.done():
                    continue
                if isinstance(answer, exceptions.ResponseError):
                    reply.set_exception(answer)
                else:
                    reply.set_result(answer)
        except (exceptions.RedisError, OSError) as err:
            failure = err
        finally:
            self.is_usable = False
            for reply, timer in self._waiting:
                timer.cancel()
                if not reply.done():
                    reply.set_exception(failure)
            await self._connection.disconnect(nowait=True)

    async def _answer(self) -> Any:
        """The next reply; what the server refuses is one too."""
        try:
            return await self._connection.read_response(disconnect_on_error=False)
        except exceptions.ResponseError as err:
            return err

    async def aclose(self) -> None:
        self._reader.cancel()
        await asyncio.wait([self._reader])
