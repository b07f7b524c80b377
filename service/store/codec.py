"""Layout of what the store holds of a user: their features, and their past clicks as one value.

A history is a header, then one record a click in the order of history, by time, item and event tag:

    header  version (u8), number of records (u16), where the last one begins (u32, 0 without one), size of the floor
            (u16), the floor
    floor   a record without features, or nothing: a click that is not later in the order is not taken (append.lua)
    record  size of all of it (u8, or 255 and then u16), its item's form (u8), ts (u48, tenths of a millisecond), event
            tag (3 bytes), the item, and the features as words.py packs them; nothing where there are none

The item's form is the length of its UTF-8 text up to 22; 22 + n for a decimal number of n bytes; 31 for a longer text,
whose length then precedes it (u16). Numbers are big-endian. docs/store.md is this page for operators.
"""

import hashlib
import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from typing import Any, Literal, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.features.history import Event
from models.features.values import Row
from service.store.words import Rows, UnknownWordError, WordTable

log = logging.getLogger(__name__)

LAYOUT = 2
MAX_FEATURES_BYTES = 8192  # of one row, packed
MAX_TS = 2**48 / 1e4  # in the year 2861
TAG_BYTES = 6  # a thousand events of one user and day have two with one tag once in a billion days
RECORD_TAG_BYTES = 3

EventType = Literal["impression", "click"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """An event that leaves no trace but that it is known: an impression, or a click without a user."""

    type: EventType
    event_id: str
    owner: str
    ts: float

    def __post_init__(self) -> None:
        _check_ts(self.ts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Click:
    """One click of a user: what the event brought, and its item's features at the time it is appended.

    `ts` is in Unix seconds, and is rounded to tenths of a millisecond, as the store holds it.
    """

    event_id: str
    user: str
    item: str
    ts: float
    features: Row = field(default_factory=dict)
    context: Row = field(default_factory=dict)
    item_features: Row = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_ts(self.ts)
        object.__setattr__(self, "ts", rounded(self.ts))

    @property
    def type(self) -> EventType:
        return "click"

    @property
    def owner(self) -> str:
        return self.user

    @property
    def rows(self) -> Rows:
        return present(self.item_features), present(self.features), present(self.context)


def rounded(ts: float) -> float:
    """As the store holds times; also the time of a request, or a click of the same moment would be one of before."""
    return round(ts * 1e4) / 1e4 if ts < MAX_TS else ts


def _check_ts(ts: float) -> None:
    if not 0 <= ts < MAX_TS:
        raise ValueError(f"ts is Unix seconds from 0 to {MAX_TS:.0f}, got {ts}")


class ClickHistory(Sequence[Event]):
    """A user's clicks in the order of history, each with its features as they were packed: most are never unpacked."""

    __slots__ = ("_words", "features", "items", "ts")

    def __init__(
        self, items: Sequence[str], ts: Sequence[float], features: Sequence[bytes], words: WordTable | None = None
    ) -> None:
        self.items, self.ts, self.features = items, ts, features
        self._words = NO_WORDS if words is None else words

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> "ClickHistory": ...
    def __getitem__(self, index: int | slice) -> "Event | ClickHistory":
        if isinstance(index, slice):
            return ClickHistory(self.items[index], self.ts[index], self.features[index], self._words)
        item_features, features, context = _rows_of(self.features[index], self._words)
        return Event(
            item=self.items[index], ts=self.ts[index], features=features, context=context, item_features=item_features
        )


NO_WORDS = WordTable()  # features are spelled out
NO_HISTORY = ClickHistory((), (), ())


def _rows_of(packed: bytes, words: WordTable) -> Rows:
    """Nothing of what cannot be read: that is logged."""
    try:
        return words.unpack(packed)
    except (ValueError, UnknownWordError) as err:
        log.warning("unreadable features", extra={"error": str(err), "bytes": len(packed)})
        return {}, {}, {}


def enriched(click: Click, item: Row | None) -> Click:
    """The click with its item's stored features, but for those that it brought itself."""
    others = absent_in(click.features, item or {})
    return replace(click, item_features=others) if others else click


def absent_in(features: Row, item: Row) -> Row:
    """An item's features, but for those that its click brought itself."""
    return {name: value for name, value in item.items() if features.get(name) is None}


OrderKey = tuple[float, str, bytes]


def order(click: Click) -> OrderKey:
    """Where a click stands in its user's past."""
    return click.ts, click.item, record_tag(click.event_id)


def event_tag(event: Click | Mark) -> bytes:
    """What stands for an event among those of one owner and day."""
    return _tag(event.type, event.event_id)


def record_tag(event_id: str) -> bytes:
    """What tells a click from others of its user, item and time."""
    return _tag("click", event_id)[:RECORD_TAG_BYTES]


@lru_cache(maxsize=4096)  # asked for three times of each event
def _tag(kind: EventType, event_id: str) -> bytes:
    return hashlib.blake2b(event_id.encode(), digest_size=TAG_BYTES, person=kind.encode()).digest()


# --- rows ---

_Row = dict[str, str | int | float | bool | list[str | int | float | bool | None] | None]
_ROW: msgspec.msgpack.Decoder[dict[str, Any]] = msgspec.msgpack.Decoder(_Row)


def pack_row(row: Row) -> bytes:
    """Raises ValueError for a row that is too large or holds what is no raw value."""
    try:
        packed = msgspec.msgpack.encode(present(row))
        _ROW.decode(packed)
    except (TypeError, OverflowError, UnicodeEncodeError, msgspec.MsgspecError) as err:
        raise ValueError(f"features are strings, numbers of 64 bits, booleans and lists of them ({err})") from err
    if len(packed) > MAX_FEATURES_BYTES:
        raise ValueError(f"features take {len(packed)} bytes, more than {MAX_FEATURES_BYTES}")
    return packed


def unpack_row(packed: bytes | None) -> Row | None:
    """None where nothing is stored, or nothing that can be read: that is logged, and scored without."""
    if packed is None:
        return None
    try:
        return _ROW.decode(packed)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        log.warning("unreadable features", extra={"error": str(err), "bytes": len(packed)})
        return None


def present(row: Row) -> Row:
    return {name: value for name, value in row.items() if value is not None}


# --- histories ---

_HEADER = struct.Struct(">BHIH")
_U16 = struct.Struct(">H")
_TS = struct.Struct(">Q")
_LONG = 255  # in place of a size of one byte: two follow
_TEXT, _NUMBER, _LONG_TEXT = 22, 22, 31
_TS_BYTES = 6
_FRONT_BYTES = 1 + _TS_BYTES + RECORD_TAG_BYTES  # of a record behind its size, up to the item
EMPTY_HISTORY = _HEADER.pack(LAYOUT, 0, 0, 0)


def pack_click(click: Click, words: WordTable) -> bytes:
    """The click's record."""
    return _record(click.ts, record_tag(click.event_id), click.item, words.pack(click.rows))


def pack_records(
    *,
    ts: NDArray[np.int64],
    tags: NDArray[np.uint8],
    items: Sequence[str],
    item_positions: NDArray[np.int64],
    features: Sequence[bytes],
    features_positions: NDArray[np.int64],
) -> tuple[list[bytes], NDArray[np.int64]]:
    """The records of many clicks, each as pack_click makes it: their pieces, three a click, and their sizes.

    Times are in tenths of a millisecond; each item and each click's features stand in a list of the distinct ones.
    """
    packed_items = [_packed_item(item) for item in items]
    forms = np.frombuffer(b"".join(form for form, _ in packed_items), np.uint8)
    texts = [text for _, text in packed_items]
    sizes = 1 + _FRONT_BYTES + _lengths(texts)[item_positions] + _lengths(features)[features_positions]
    is_long = sizes >= _LONG
    heads = np.empty((len(ts), 1 + _FRONT_BYTES), np.uint8)
    heads[:, 0] = np.where(is_long, _LONG, sizes)
    heads[:, 1] = forms[item_positions]
    heads[:, 2 : 2 + _TS_BYTES] = ts.astype(">u8").view(np.uint8).reshape(-1, 8)[:, 2:]
    heads[:, -RECORD_TAG_BYTES:] = tags
    fronts: list[bytes] = heads.view(f"V{heads.shape[1]}").ravel().tolist()
    for click in np.flatnonzero(is_long).tolist():
        front = fronts[click]
        fronts[click] = front[:1] + _U16.pack(sizes[click] + 2) + front[1:]
    item_texts, packed_features = map(texts.__getitem__, item_positions), map(features.__getitem__, features_positions)
    return list(chain.from_iterable(zip(fronts, item_texts, packed_features, strict=True))), sizes + 2 * is_long


def _lengths(texts: Sequence[bytes]) -> NDArray[np.int64]:
    return np.fromiter(map(len, texts), np.int64, len(texts))


def tombstone(at: float) -> bytes:
    """The history of a user who was deleted at `at`: empty, and takes no click of before."""
    floor = _record(at, b"\xff" * RECORD_TAG_BYTES, "", b"")
    return _HEADER.pack(LAYOUT, 0, 0, len(floor)) + floor


def _record(ts: float, tag: bytes, item: str, features: bytes) -> bytes:
    form, text = _packed_item(item)
    content = b"".join([form, _TS.pack(round(ts * 1e4))[2:], tag, text, features])
    size = 1 + len(content)
    return bytes([size]) + content if size < _LONG else bytes([_LONG]) + _U16.pack(size + 2) + content


def _packed_item(item: str) -> tuple[bytes, bytes]:
    if item.isascii() and item.isdigit() and len(item) <= 15 and (item[0] != "0" or item == "0"):
        number = int(item)
        packed = number.to_bytes(max(1, (number.bit_length() + 7) // 8), "big")
        return bytes([_NUMBER + len(packed)]), packed
    text = item.encode()
    if len(text) <= _TEXT:
        return bytes([len(text)]), text
    return bytes([_LONG_TEXT]), _U16.pack(len(text)) + text


def unpack_history(packed: bytes | None, *, before: float, limit: int, words: WordTable) -> ClickHistory:
    """The last `limit` clicks strictly earlier than `before`, oldest first; none where the value cannot be read."""
    if packed is None:
        return NO_HISTORY
    try:
        items, times, features = _unpack_history(packed, rounded(before), limit)
    except (ValueError, IndexError, struct.error) as err:
        log.warning("unreadable behaviours", extra={"error": str(err), "bytes": len(packed)})
        return NO_HISTORY
    return ClickHistory(items, times, features, words)


def _unpack_history(packed: bytes, before: float, limit: int) -> tuple[list[str], list[float], list[bytes]]:
    starts, ends = _record_bounds(packed)
    items: list[str] = []
    times: list[float] = []
    features: list[bytes] = []
    for at, end in zip(reversed(starts), reversed(ends), strict=True):
        if len(items) == limit:
            break
        ts = int.from_bytes(packed[at + 1 : at + 1 + _TS_BYTES], "big") / 1e4
        if ts < before:
            item, item_end = _unpack_item(packed, at)
            if item_end > end:
                raise ValueError(f"an item that ends at {item_end}, in a record that ends at {end}")
            items.append(item)
            times.append(ts)
            features.append(packed[item_end:end])
    return items[::-1], times[::-1], features[::-1]


def _record_bounds(packed: bytes) -> tuple[list[int], list[int]]:
    """Where each record's content begins, behind its size, and where it ends. Raises ValueError and its like."""
    version, count, last, floor_bytes = _HEADER.unpack_from(packed)
    if version != LAYOUT:
        raise ValueError(f"layout {version}, expected {LAYOUT}")
    at, stop = _HEADER.size + floor_bytes, len(packed)
    starts: list[int] = []
    ends: list[int] = []
    begin = 0
    while at < stop:
        begin, size = at, packed[at]
        if size == _LONG:
            (size,) = _U16.unpack_from(packed, at + 1)
            starts.append(at + 3)
        else:
            starts.append(at + 1)
        if size <= _FRONT_BYTES:
            raise ValueError(f"a record of {size} bytes at {at}")
        at += size
        ends.append(at)
    if at != stop or len(starts) != count or begin != last:
        raise ValueError(f"{len(starts)} records that end at {at}, expected {count} that end at {stop}")
    return starts, ends


def _unpack_item(packed: bytes, at: int) -> tuple[str, int]:
    """The item of the record whose content begins at `at`, and where it ends."""
    form, begin = packed[at], at + _FRONT_BYTES
    if form <= _TEXT:
        return packed[begin : begin + form].decode(), begin + form
    if form < _LONG_TEXT:
        end = begin + form - _NUMBER
        return str(int.from_bytes(packed[begin:end], "big")), end
    if form > _LONG_TEXT:
        raise ValueError(f"an item of the form {form}")
    (size,) = _U16.unpack_from(packed, begin)
    return packed[begin + 2 : begin + 2 + size].decode(), begin + 2 + size
