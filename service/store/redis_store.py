"""The store in Redis (or Valkey): one MGET a request, one script an append, no waiting beyond its timeout."""

import asyncio
import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from models.features.values import Row
from service.settings import Settings, SettingsError
from service.store.click_table import ClickTable, Column, UserRecords
from service.store.codec import (
    NO_HISTORY,
    Click,
    ClickHistory,
    Mark,
    enriched,
    event_tag,
    order,
    pack_click,
    pack_row,
    tombstone,
    unpack_history,
    unpack_row,
)
from service.store.faults import Failure, FaultState
from service.store.feature_store import (
    EVENT_TAGS_TTL_S,
    FeatureStore,
    Fetched,
    ItemChanges,
    OnFetched,
    Outcome,
    StoreUnavailable,
)
from service.store.keys import DAY_S, KeySpace, day_of
from service.store.redis_client import RedisClient, unavailable, value_of
from service.store.redis_connection import OnReply, ReplyError, packed_command
from service.store.words import Rows, UnknownWordError, WordTable

EVENTS_A_SCRIPT = 32  # nothing else is answered while one runs
ITEMS_A_CHANGE = 1000
MAX_CHANGES = 1000  # that the stream holds, or a few more
MAX_CHANGES_READ = 500  # in one go: well before they are trimmed
USERS_A_MERGE = 32
BYTES_A_MERGE = 50_000
MERGES_AT_ONCE = 4  # the server works while others are on their way; live traffic waits for these at most
ITEMS_AT_ONCE = 1000
MAX_READABLE = 100_000  # features of clicks that are known to have no unknown word
Durability = Literal["memory", "disk", "replica"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much the store keeps, and for how long. Seconds count from the last change."""

    max_clicks: int = 100  # of a user
    max_bytes: int = 32_768  # of a user's clicks
    behaviours_s: float = 30 * DAY_S
    features_s: float = 90 * DAY_S


def opened(
    settings: Settings, *, write_timeout_s: float | None = None, faults: FaultState | None = None
) -> "RedisStore":
    """The store that the settings name. Raises SettingsError."""
    if settings.redis_url is None:
        raise SettingsError("no store: set redis_url in --config or CLICKSERVE_REDIS_URL")
    limits = Limits(
        max_clicks=settings.keep_behaviours,
        max_bytes=settings.keep_behaviours_bytes,
        behaviours_s=settings.keep_behaviours_days * DAY_S,
        features_s=settings.keep_features_days * DAY_S,
    )
    return RedisStore.connect(
        settings.redis_url,
        timeout_s=settings.store_timeout_ms / 1000,
        write_timeout_s=write_timeout_s or settings.store_write_timeout_ms / 1000,
        prefix=settings.redis_prefix,
        limits=limits,
        faults=faults,
        durability=settings.event_durability,
    )


class _Script:
    """A Lua script that is made of files, one behind the other."""

    def __init__(self, *files: str) -> None:
        self.text = "".join(Path(__file__).with_name(file).read_text(encoding="utf-8") for file in files)
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


_APPEND = _Script("past.lua", "append.lua")
_MERGE = _Script("past.lua", "merge.lua")


class RedisStore(FeatureStore):
    """A user's clicks, their features and the items' as values of their own: see keys.py, codec.py and words.py.

    Predictions read by a connection of their own, which waits for `timeout_s`; all else goes by another one, which may
    wait longer. Each has its circuit breaker: a server too slow for predictions may still take events.
    """

    def __init__(
        self,
        reads: "RedisClient",
        writes: "RedisClient",
        *,
        keys: KeySpace,
        limits: Limits,
        faults: FaultState,
        durability: Durability,
    ) -> None:
        self._faults = faults
        self._durability = durability
        self._reads = reads
        self._writes = writes
        self._keys = keys
        self._limits = limits
        self.max_clicks = limits.max_clicks
        self._words = WordTable()
        self._readable: set[bytes] = set()
        self._awaiting_words: list[OnReply] = []

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        timeout_s: float,
        write_timeout_s: float | None = None,
        prefix: str = "cs",
        limits: Limits | None = None,
        faults: FaultState | None = None,
        durability: Durability = "memory",
    ) -> Self:
        """Connects on first use. Raises SettingsError for a URL that is none. `faults` hears of what goes wrong."""
        faults = faults or FaultState(lambda _fault, _stands: None, lambda _fault: None)
        keys = KeySpace(prefix)
        reads = RedisClient(url, timeout_s=timeout_s, probe_key=keys.words, faults=faults)
        write_timeout_s = write_timeout_s or timeout_s
        shared = reads.router.topology
        writes = RedisClient(url, timeout_s=write_timeout_s, probe_key=keys.words, faults=faults, topology=shared)
        return cls(reads, writes, keys=keys, limits=limits or Limits(), faults=faults, durability=durability)

    # --- reading ---

    def fetch_soon(
        self,
        user: str | None,
        items: Sequence[str],
        on_fetched: OnFetched,
        *,
        before: float,
        limit: int,
        timeout_s: float | None = None,
    ) -> None:
        keys = [self._keys.item(item) for item in items]
        if user is not None:
            keys += [self._keys.profile(user), self._keys.behaviours(user)]
        if not keys:
            on_fetched(Fetched(user=None, behaviours=NO_HISTORY, items=[]))
            return

        def on_values(values: Any) -> None:
            if isinstance(values, Exception):
                on_fetched(unavailable(values))
                return
            profile, past = values[len(items) :] if user is not None else (None, None)
            history = unpack_history(past, before=before, limit=limit, words=self._words)
            fetched = Fetched(user=unpack_row(profile), behaviours=history, items=values[: len(items)])
            if self._is_readable(history):
                on_fetched(fetched)
            else:
                self._read_words(lambda reply: on_fetched(_fetched(reply, fetched)), timeout_s)

        self._reads.send_mget(keys, on_values, timeout_s=timeout_s)

    def _is_readable(self, history: ClickHistory) -> bool:
        """Whether every word of it is known."""
        for features in history.features:
            if features and features not in self._readable:
                try:
                    self._words.unpack(features)
                except UnknownWordError:
                    return False
                except ValueError:  # is logged where it is used
                    pass
                if len(self._readable) >= MAX_READABLE:
                    self._readable.clear()
                self._readable.add(features)
        return True

    def _read_words(self, on_read: OnReply, timeout_s: float | None) -> None:
        """Words that other workers have added since; for all that wait for them in one go."""

        def on_reply(reply: Any) -> None:
            waiting, self._awaiting_words = self._awaiting_words, []
            if not isinstance(reply, Exception):
                self._words.add(dict(zip(reply[::2], reply[1::2], strict=True)))
            for call in waiting:
                call(reply)

        self._awaiting_words.append(on_read)
        if len(self._awaiting_words) == 1:
            self._reads.send(self._keys.words, packed_command(b"HGETALL", [self._keys.words]), on_reply, timeout_s)

    # --- events ---

    async def append(self, events: Sequence[Click | Mark]) -> list[Outcome]:
        stored: list[Click | Mark] = list(events)
        clicks = [position for position, event in enumerate(events) if isinstance(event, Click)]
        if clicks:
            items, _ = await asyncio.gather(
                self._item_rows({event.item for event in events if isinstance(event, Click)}), self._put_lost_words()
            )
            rows = []
            for position in clicks:
                click = events[position]
                assert isinstance(click, Click)
                stored[position] = click = enriched(click, items.get(click.item))
                rows.append(click.rows)
            await self._add_words(rows)
        positions = sorted(range(len(stored)), key=lambda p: _script_order(stored[p]))
        by_slot: dict[int, list[int]] = defaultdict(list)
        for position in positions:
            by_slot[self._writes.slot(self._keys.behaviours(stored[position].owner))].append(position)
        calls = [
            group[start : start + EVENTS_A_SCRIPT]
            for group in by_slot.values()
            for start in range(0, len(group), EVENTS_A_SCRIPT)
        ]
        arguments = [self._append_arguments([stored[p] for p in call]) for call in calls]
        answers = await self._run(_APPEND, arguments)
        if self._durability != "memory":
            await self._wait_until_durable({self._writes.slot(key): key for key, _ in arguments}.values())
        outcomes = [Outcome.KNOWN] * len(stored)
        for call, answer in zip(calls, answers, strict=True):
            for position, outcome in zip(call, answer, strict=True):
                outcomes[position] = Outcome(outcome)
        return outcomes

    async def _wait_until_durable(self, keys: Collection[str]) -> None:
        """Behind the writes on the same connections. Raises StoreUnavailable where it takes too long."""
        timeout_ms = str(math.floor(self._writes.timeout_s * 500))  # its answer still has to come
        if self._durability == "disk":
            wait, what = packed_command(b"WAITAOF", ["1", "0", timeout_ms]), "written to the store's disk"
        else:
            wait, what = packed_command(b"WAIT", ["1", timeout_ms]), "with a replica"
        for reply in await self._writes.ask_all([(key, wait) for key in keys]):
            if not (reply[0] if isinstance(reply, list) else reply):
                raise StoreUnavailable(f"the events are not {what} yet")

    def _append_arguments(self, events: Sequence[Click | Mark]) -> tuple[str, list[str | bytes]]:
        """One of the keys, and what follows the script."""
        keys: dict[str, int] = {}
        limits = self._limits
        numbers = (limits.max_clicks, limits.max_bytes, math.ceil(limits.behaviours_s), EVENT_TAGS_TTL_S)
        arguments: list[str | bytes] = [str(number) for number in numbers]
        for event in events:
            tags = keys.setdefault(self._keys.event_tags(event.owner, day_of(event.ts)), len(keys) + 1)
            arguments += [str(tags), event_tag(event)]
            if isinstance(event, Click):
                past = keys.setdefault(self._keys.behaviours(event.user), len(keys) + 1)
                arguments += [str(past), pack_click(event, self._words)]
            else:
                arguments += ["0", b""]
        return next(iter(keys)), [str(len(keys)), *keys, *arguments]

    async def merge(self, clicks: ClickTable, *, max_per_s: float | None = None) -> list[int | None]:
        clicks = clicks.newest(self.max_clicks)
        items = clicks.items.values
        stored = await self._item_rows(items)
        await self._put_lost_words()
        rows = clicks.rows([stored[item] for item in items])
        packed, candidates = self._words.pack_many(rows.values)
        while await self._add_words(candidates):
            packed, candidates = self._words.pack_many(rows.values)
        features = Column(values=packed, positions=rows.positions)
        calls = self._merge_calls(clicks.records(features))
        num_new: dict[str, int | None] = {}
        num_sent, started = 0, time.monotonic()
        while some := list(islice(calls, MERGES_AT_ONCE)):
            answers = await self._run(_MERGE, [self._merge_arguments(call) for call in some])
            for each, answer in zip(chain(*some), chain(*answers), strict=True):
                num_new[each.user] = answer if answer >= 0 else None
                num_sent += each.num_clicks
            if max_per_s is not None:
                await asyncio.sleep(started + num_sent / max_per_s - time.monotonic())
        return [num_new[user] for user in clicks.users]

    def _merge_calls(self, records: Iterable[UserRecords]) -> Iterator[list[UserRecords]]:
        """Groups of users in one slot, so small that nobody waits long for one."""
        groups: dict[int, list[UserRecords]] = defaultdict(list)
        num_bytes: dict[int, int] = defaultdict(int)
        for each in records:
            slot = self._writes.slot(self._keys.behaviours(each.user))
            if groups[slot] and num_bytes[slot] + len(each.records) > BYTES_A_MERGE:
                yield groups.pop(slot)
                num_bytes[slot] = 0
            groups[slot].append(each)
            num_bytes[slot] += len(each.records)
            if len(groups[slot]) == USERS_A_MERGE:
                yield groups.pop(slot)
                num_bytes[slot] = 0
        yield from groups.values()

    def _merge_arguments(self, users: Sequence[UserRecords]) -> tuple[str, list[str | bytes]]:
        keys = [self._keys.behaviours(each.user) for each in users]
        limits = self._limits
        arguments: list[str | bytes] = [str(len(keys)), *keys]
        arguments += [str(n) for n in (limits.max_clicks, limits.max_bytes, math.ceil(limits.behaviours_s))]
        for each in users:
            arguments += [each.records, str(each.num_clicks), str(each.last_size)]
        return keys[0], arguments

    async def _run(self, script: _Script, calls: Sequence[tuple[str, list[str | bytes]]]) -> list[Sequence[int]]:
        """The script's answer to each call: one of its keys, and what follows the script."""
        by_hash = [(key, packed_command(b"EVALSHA", [script.sha, *parts])) for key, parts in calls]
        replies = await self._writes.replies(by_hash)
        again = [i for i, reply in enumerate(replies) if _has_no_script(reply)]
        if again:
            in_full = [(calls[i][0], packed_command(b"EVAL", [script.text, *calls[i][1]])) for i in again]
            for i, reply in zip(again, await self._writes.replies(in_full), strict=True):
                replies[i] = reply
        answers = [value_of(reply) for reply in replies]
        if self._faults.standing:
            self._faults.written()
        return answers

    async def _item_rows(self, items: Collection[str]) -> dict[str, Row | None]:
        names = list(items)
        values: list[bytes | None] = []
        for start in range(0, len(names), ITEMS_AT_ONCE):
            values += await self._writes.mget([self._keys.item(n) for n in names[start : start + ITEMS_AT_ONCE]])
        return {item: unpack_row(value) for item, value in zip(names, values, strict=True)}

    async def _put_lost_words(self) -> None:
        """Words may be lost: a server came back without its last writes, or empty."""
        key = self._keys.words
        if await self._writes.ask(key, packed_command(b"HLEN", [key])) < len(self._words):
            await self._put_words(self._words.words)

    async def _add_words(self, features: Sequence[Rows]) -> bool:
        """Gives the words of clicks' features their codes: those of their values, then of their shapes.

        Whether there were new ones.
        """
        for is_again in (False, True):
            new: dict[bytes, bytes] = {}
            for rows in features:
                new.update(self._words.new_words(rows))
            if not new:
                return is_again
            codes = list(new)
            stored = await self._words_at(codes)
            absent = {code: new[code] for code in codes if stored[code] is None}
            if absent:
                await self._put_words(absent)
                stored = await self._words_at(codes)
            self._words.add({code: word for code, word in stored.items() if word is not None})
            self._words.add_collided(word for code, word in new.items() if stored[code] != word)
        return True

    async def _words_at(self, codes: Sequence[bytes]) -> dict[bytes, bytes | None]:
        words = await self._writes.ask(self._keys.words, packed_command(b"HMGET", [self._keys.words, *codes]))
        return dict(zip(codes, words, strict=True))

    async def _put_words(self, words: Mapping[bytes, bytes]) -> None:
        """Those whose code no other word has."""
        key = self._keys.words
        await self._writes.ask_all(
            [(key, packed_command(b"HSETNX", [key, code, word])) for code, word in words.items()]
        )

    # --- features, and the end of a user ---

    async def delete_user(self, user: str, *, at: float) -> None:
        keys, today = self._keys, day_of(at)
        kept_days = math.ceil(self._limits.behaviours_s / DAY_S) + 2
        gone = [keys.profile(user), *(keys.event_tags(user, day) for day in range(today - kept_days, today + 2))]
        past = keys.behaviours(user)
        ttl = str(math.ceil(self._limits.behaviours_s))
        await self._writes.ask(past, packed_command(b"SET", [past, tombstone(at), "EX", ttl]))
        await self._writes.ask(past, packed_command(b"UNLINK", gone))

    async def put_users(self, rows: Mapping[str, Row]) -> None:
        await self._put({self._keys.profile(user): pack_row(row) for user, row in rows.items()})

    async def put_items(self, rows: Mapping[str, Row]) -> None:
        await self._put({self._keys.item(item): pack_row(row) for item, row in rows.items()})
        ids, changes = list(rows), self._keys.item_changes
        for start in range(0, len(ids), ITEMS_A_CHANGE):
            some = msgspec.msgpack.encode(ids[start : start + ITEMS_A_CHANGE])
            bound = [changes, "MAXLEN", "~", str(MAX_CHANGES), "*", "items"]
            await self._writes.ask(changes, packed_command(b"XADD", [*bound, some]))

    async def changed_items(self, since: str | None) -> ItemChanges:
        """The stream says which entry was its last: if that is not later than `since`, it was lost and begun anew."""
        key = self._keys.item_changes
        last = await self._writes.ask(key, packed_command(b"XREVRANGE", [key, "+", "-", "COUNT", "1"]))
        position = last[0][0].decode() if last else "0-0"
        if since is None or position == since:
            return ItemChanges(items=(), position=position)
        if _stream_position(position) < _stream_position(since):
            return ItemChanges(items=None, position=position)
        count = str(MAX_CHANGES_READ + 1)
        entries = await self._writes.ask(key, packed_command(b"XRANGE", [key, f"({since}", position, "COUNT", count]))
        if len(entries) > MAX_CHANGES_READ:
            return ItemChanges(items=None, position=position)
        items = [item for _, (_, packed) in entries for item in msgspec.msgpack.decode(packed, type=list[str])]
        return ItemChanges(items=items, position=position)

    async def _put(self, values: Mapping[str, bytes]) -> None:
        ttl = str(math.ceil(self._limits.features_s))
        await self._writes.ask_all(
            [(key, packed_command(b"SET", [key, value, "EX", ttl])) for key, value in values.items()]
        )

    async def ping(self) -> None:
        """On the connection of the predictions, which is open then before the first of them comes."""
        await self._reads.ask(self._keys.words, packed_command(b"PING", []))

    async def check(self) -> None:
        await self._reads.router.check()

    def failures(self) -> Sequence[Failure]:
        return list(self._faults.standing.values())

    async def aclose(self) -> None:
        for side in (self._writes, self._reads):  # the topology is that of the last
            await side.aclose()


def _fetched(reply: Any, fetched: Fetched) -> Fetched | StoreUnavailable:
    return unavailable(reply) if isinstance(reply, Exception) else fetched


def _script_order(event: Click | Mark) -> tuple[Any, ...]:
    """One owner's events together, and clicks in the order of a past."""
    return (event.owner, *order(event)) if isinstance(event, Click) else (event.owner, event.ts, "", b"")


def _stream_position(entry: str) -> tuple[int, int]:
    milliseconds, _, number = entry.partition("-")
    return int(milliseconds), int(number)


def _has_no_script(reply: Any) -> bool:
    """Whether the server does not have the script yet, or no more."""
    return isinstance(reply, ReplyError) and str(reply).startswith("NOSCRIPT")
