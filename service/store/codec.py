"""Layout of stored values: keys, and the binary form of features and click histories."""

import hashlib
import logging
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, overload

import msgspec

from models.features.history import Event
from models.features.values import Row

log = logging.getLogger(__name__)


MAX_FEATURES_BYTES = 8192  # of one row, packed


@dataclass(frozen=True, kw_only=True, slots=True)
class Click:
    """One click as it is stored: what the event brought, and its item's features at the time it is appended."""

    event_id: str
    user: str
    item: str
    ts: float
    features: Row = field(default_factory=dict)
    context: Row = field(default_factory=dict)
    item_features: Row = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.ts < math.inf:
            raise ValueError(f"ts is Unix seconds, finite and not negative, got {self.ts}")


class ClickHistory(Sequence[Event]):
    """A user's clicks in the order of history, each with its features as they were packed: most are never unpacked."""

    __slots__ = ("features", "items", "ts")

    def __init__(self, items: Sequence[str], ts: Sequence[float], features: Sequence[bytes]) -> None:
        self.items, self.ts, self.features = items, ts, features

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> "ClickHistory": ...
    def __getitem__(self, index: int | slice) -> "Event | ClickHistory":
        if isinstance(index, slice):
            return ClickHistory(self.items[index], self.ts[index], self.features[index])
        item_features, features, context = unpack_features(self.features[index])
        return Event(
            item=self.items[index], ts=self.ts[index], features=features, context=context, item_features=item_features
        )


NO_HISTORY = ClickHistory((), (), ())


def enriched(click: Click, item: Row | None) -> Click:
    """The click with its item's stored features, but for those that it brought itself."""
    others = {name: value for name, value in (item or {}).items() if click.features.get(name) is None}
    return replace(click, item_features=others) if others else click


def order(click: Click) -> tuple[float, str, bytes]:
    """Where a click stands in its user's past."""
    return click.ts, click.item, event_tag(click.event_id)


def user_key(user: str) -> str:
    return f"cs1:{{{_tag(user)}}}:p"


def behaviours_key(user: str) -> str:
    return f"cs1:{{{_tag(user)}}}:b"


def mark_key(owner: str, event_id: str) -> str:
    return f"cs1:{{{_tag(owner)}}}:e:{event_tag(event_id).hex()}"


def item_key(item: str) -> str:
    return f"cs1:i:{item}"


def event_tag(event_id: str) -> bytes:
    """Eight bytes that stand for an event among those of one user."""
    return hashlib.blake2b(event_id.encode(), digest_size=8).digest()


def _tag(owner: str) -> str:
    return hashlib.blake2b(owner.encode(), digest_size=16).hexdigest()


EMPTY_HISTORY = b"\x01\x00\x00"


_FRONT = struct.Struct(">HHd")


_SIZE = struct.Struct(">H")


_TAG_BYTES = 8


_FRAME_BYTES = _FRONT.size + _TAG_BYTES + _SIZE.size


_MSGPACK_LIST = 0x90  # and the number of its members, up to 15


_Row = dict[str, str | int | float | bool | list[str | int | float | bool | None] | None]
_FEATURES: msgspec.msgpack.Decoder[dict[str, Any]] = msgspec.msgpack.Decoder(_Row)
_CLICK_FEATURES: msgspec.msgpack.Decoder[dict[str, Any] | list[dict[str, Any]]] = msgspec.msgpack.Decoder(
    _Row | Annotated[list[_Row], msgspec.Meta(min_length=2, max_length=3)]
)


def pack_row(row: Row) -> bytes:
    """Raises ValueError for a row that is too large or holds what is no raw value."""
    packed = packed_features(row)
    if len(packed) > MAX_FEATURES_BYTES:
        raise ValueError(f"features take {len(packed)} bytes, more than {MAX_FEATURES_BYTES}")
    return packed


def packed_features(row: Row) -> bytes:
    try:
        packed = msgspec.msgpack.encode(_present(row))
        _FEATURES.decode(packed)
    except (TypeError, OverflowError, UnicodeEncodeError, msgspec.MsgspecError) as err:
        raise ValueError(f"features are strings, numbers of 64 bits, booleans and lists of them ({err})") from err
    return packed


def unpack_row(packed: bytes | None) -> Row | None:
    """None where nothing is stored, or nothing that can be read: that is logged, and scored without."""
    if packed is None:
        return None
    try:
        return _FEATURES.decode(packed)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        log.warning("unreadable features", extra={"error": str(err), "bytes": len(packed)})
        return None


def pack_click_features(click: Click) -> bytes:
    """The item's features as a map or, where the event brought some itself, a list: the item's, its own, its context.

    The last one is left out where it is empty. Code of before events had features of their own refuses a list, and
    scores that click by its item and time alone.
    """
    rows = [click.item_features, click.features, click.context]
    while len(rows) > 1 and not _present(rows[-1]):
        rows.pop()
    if len(rows) == 1:
        return packed_features(rows[0])
    return bytes([_MSGPACK_LIST | len(rows)]) + b"".join(map(packed_features, rows))


def unpack_features(packed: bytes) -> tuple[Row, Row, Row]:
    """A click's features: its item's, its own, its context. Nothing of what cannot be read: that is logged."""
    try:
        rows = _CLICK_FEATURES.decode(packed)
    except (msgspec.MsgspecError, UnicodeDecodeError) as err:
        log.warning("unreadable features", extra={"error": str(err), "bytes": len(packed)})
        return {}, {}, {}
    if isinstance(rows, dict):
        return rows, {}, {}
    return rows[0], rows[1], rows[2] if len(rows) > 2 else {}


def _present(row: Row) -> Row:
    return {name: value for name, value in row.items() if value is not None}


def pack_click(click: Click) -> bytes:
    """Its item's features, its own and its context may each take what a row may."""
    item, features = click.item.encode(), pack_click_features(click)
    size = _FRAME_BYTES + len(item) + len(features)
    # -0.0 would sort after every other time.
    front = _FRONT.pack(size, len(item), click.ts + 0.0)
    return b"".join((front, item, event_tag(click.event_id), features, _SIZE.pack(size)))


def unpack_history(packed: bytes | None, *, before: float, limit: int) -> ClickHistory:
    """The last `limit` clicks strictly earlier than `before`, oldest first; none where the value cannot be read."""
    if packed is None:
        return NO_HISTORY
    try:
        return _unpack_history(packed, before, limit)
    except (ValueError, struct.error) as err:
        log.warning("unreadable behaviours", extra={"error": str(err), "bytes": len(packed)})
        return NO_HISTORY


def _unpack_history(packed: bytes, before: float, limit: int) -> ClickHistory:
    if packed[:1] != EMPTY_HISTORY[:1]:
        raise ValueError(f"layout {packed[:1]!r}, expected {EMPTY_HISTORY[:1]!r}")
    items: list[str] = []
    times: list[float] = []
    features: list[bytes] = []
    front_of, size_of = _FRONT.unpack_from, _SIZE.unpack_from
    end, header, size_bytes, front_bytes = len(packed), len(EMPTY_HISTORY), _SIZE.size, _FRONT.size
    while end > header and len(items) < limit:
        (size,) = size_of(packed, end - size_bytes)
        start = end - size
        if start < header:
            raise ValueError(f"a record of {size} bytes that ends at {end}")
        front_size, item_len, ts = front_of(packed, start)
        if front_size != size:
            raise ValueError(f"a record of {front_size} or {size} bytes that ends at {end}")
        if ts < before:
            item_from = start + front_bytes
            item_to = item_from + item_len
            items.append(packed[item_from:item_to].decode())
            times.append(ts)
            features.append(packed[item_to + _TAG_BYTES : end - size_bytes])
        end = start
    return ClickHistory(items[::-1], times[::-1], features[::-1])
