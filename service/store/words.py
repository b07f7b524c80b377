"""Word table: short codes for what clicks repeat, the names of their features and values such as a category.

A click's features would take more room than the click. So a value that many clicks share is a word: its code stands in
the click, and the word itself once in the deployment's table. A code is a hash of its word, so that it does not depend
on the order in which words come, and a table that was lost is made again as it was. A value whose code another word
has is spelled out, and so is every new one once the table is full.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from models.features.values import Row, Value

MAX_WORDS = 16_384  # of 65,535 codes: beyond it a new word would too often meet another one's code
MAX_SHAPES = 4096  # beyond those
MAX_WORDS_OF_A_FEATURE = 1024  # a feature of more values, such as an address, would fill the table
MAX_REMEMBERED = 65_536  # values, with how they are packed
WORD_BYTES = range(3, 65)  # packed; what is shorter takes no more room than its code
SPELLED = b"\x00\x00"  # in place of a shape's code: the features follow in full
CODE_BYTES = 2
NUM_ROWS = 3

Rows = tuple[Row, Row, Row]
"""A click's features: its item's, the event's own, and its context."""
Shape = tuple[tuple[tuple[str, bool], ...], ...]
"""The names of each row's features, and whether the value is a word."""
NO_ROWS: Rows = ({}, {}, {})

_Value = str | int | float | bool | list[str | int | float | bool | None] | None
_encode = msgspec.msgpack.encode
_VALUE = msgspec.msgpack.Decoder(_Value)
_VALUES: msgspec.msgpack.Decoder[list[Any]] = msgspec.msgpack.Decoder(list[_Value])
_ROWS: msgspec.msgpack.Decoder[list[Any]] = msgspec.msgpack.Decoder(list[dict[str, _Value]])
_SHAPE: msgspec.msgpack.Decoder[Shape] = msgspec.msgpack.Decoder(Shape)


class UnknownWordError(LookupError):
    """A code whose word the table does not have."""


class WordTable:
    """The words that this process knows."""

    def __init__(self) -> None:
        self._words: dict[bytes, bytes] = {}
        self._collided: set[bytes] = set()
        self._words_of_feature: dict[str, set[bytes]] = {}
        self._packed: dict[tuple[type, Value], tuple[bytes, bool]] = {}
        self._shape_codes: dict[Shape, bytes | None] = {}
        self._num_forgotten = 0  # of values and shapes: they were packed, and how was not remembered
        self._values: dict[bytes, Value] = {}  # unpacked, by code
        self._shapes: dict[bytes, Shape] = {}

    def __len__(self) -> int:
        return len(self._words)

    @property
    def words(self) -> Mapping[bytes, bytes]:
        """By code."""
        return self._words

    def add(self, words: Mapping[bytes, bytes]) -> None:
        """Words as the store has them, by code."""
        self._words.update(words)
        self._packed.clear()
        self._shape_codes.clear()

    def add_collided(self, words: Iterable[bytes]) -> None:
        """Words whose code another one has."""
        self._collided.update(words)

    def new_words(self, rows: Rows) -> dict[bytes, bytes]:
        """A click's words that the store's table should get, by code: its values, and when they are known, its shape.

        So to be called again once they were added.
        """
        if not any(rows):
            return {}
        found: dict[bytes, bytes] = {}
        for row in rows:
            for name, value in row.items():
                if self._pack_value(value)[1]:
                    continue
                word = _word(value)
                if word is None or word in self._collided:
                    continue
                words = self._words_of_feature.setdefault(name, set())
                if word in words or (len(words) < MAX_WORDS_OF_A_FEATURE and len(self._words) < MAX_WORDS):
                    words.add(word)
                    found[code_of(word)] = word
        if found:
            return found
        shape = tuple(tuple((name, self._pack_value(row[name])[1]) for name in sorted(row)) for row in rows)
        if self._shape_code(shape) is not None or len(self._words) >= MAX_WORDS + MAX_SHAPES:
            return {}
        word = _encode(shape)
        return {code_of(word): word} if word not in self._collided else {}

    def pack(self, rows: Rows) -> bytes:
        """A click's features, with codes for the words that are known. Empty where there are none."""
        if not any(rows):
            return b""
        shape: list[tuple[tuple[str, bool], ...]] = []
        codes: list[bytes] = []
        values: list[msgspec.Raw] = []
        for row in rows:
            entries: list[tuple[str, bool]] = []
            for name in sorted(row):
                packed, is_word = self._pack_value(row[name])
                entries.append((name, is_word))
                if is_word:
                    codes.append(packed)
                else:
                    values.append(msgspec.Raw(packed))
            shape.append(tuple(entries))
        code = self._shape_code(tuple(shape))
        if code is None:
            return SPELLED + _encode(rows)
        return b"".join([code, *codes, _encode(values) if values else b""])

    def pack_many(self, features: Iterable[Rows]) -> tuple[list[bytes], list[Rows]]:
        """The features of many clicks packed, and those among them that may have new words.

        The others have nothing that was not packed since a word was added.
        """
        packed: list[bytes] = []
        candidates: list[Rows] = []
        for rows in features:
            num_forgotten = self._num_forgotten
            packed.append(self.pack(rows))
            if self._num_forgotten > num_forgotten:
                candidates.append(rows)
        return packed, candidates

    def unpack(self, packed: bytes) -> Rows:
        """Raises UnknownWordError, and ValueError for what is no click's features."""
        if not packed:
            return NO_ROWS
        if packed[:CODE_BYTES] == SPELLED:
            rows = _ROWS.decode(packed[CODE_BYTES:])
            if len(rows) != NUM_ROWS:
                raise ValueError(f"expected {NUM_ROWS} rows of features, got {len(rows)}")
            return rows[0], rows[1], rows[2]
        shape = self._shape_of(packed[:CODE_BYTES])
        num_words = sum(is_word for entries in shape for _, is_word in entries)
        end = CODE_BYTES * (1 + num_words)
        values = _VALUES.decode(packed[end:]) if len(packed) > end else []
        codes = [packed[at : at + CODE_BYTES] for at in range(CODE_BYTES, end, CODE_BYTES)]
        if len(values) + num_words != sum(map(len, shape)):
            raise ValueError(f"expected {sum(map(len, shape))} values, got {num_words} words and {len(values)} others")
        words, others = map(self._value_of, codes), iter(values)
        found = [{name: next(words if is_word else others) for name, is_word in entries} for entries in shape]
        return found[0], found[1], found[2]

    def _pack_value(self, value: Value) -> tuple[bytes, bool]:
        """A value's code and True, or where it is no known word, its packed form and False."""
        is_remembered = type(value) in (str, int, float) and value  # 0.0 and -0.0 are one key, and two values
        if is_remembered and (found := self._packed.get((type(value), value))) is not None:
            return found
        word = _word(value)
        packed = (code_of(word), True) if word is not None and self._is_known(word) else (_encode(value), False)
        if is_remembered:
            self._num_forgotten += 1
            if len(self._packed) >= MAX_REMEMBERED:
                self._packed.clear()
            self._packed[type(value), value] = packed
        return packed

    def _shape_code(self, shape: Shape) -> bytes | None:
        """None where it is no known word."""
        if shape not in self._shape_codes:
            self._num_forgotten += 1
            if len(self._shape_codes) >= MAX_REMEMBERED:
                self._shape_codes.clear()
            word = _encode(shape)
            self._shape_codes[shape] = code_of(word) if self._is_known(word) else None
        return self._shape_codes[shape]

    def _is_known(self, word: bytes) -> bool:
        return self._words.get(code_of(word)) == word

    def _value_of(self, code: bytes) -> Value:
        if code not in self._values:
            self._values[code] = _VALUE.decode(self._word_of(code))
        return self._values[code]

    def _shape_of(self, code: bytes) -> Shape:
        if code not in self._shapes:
            shape = _SHAPE.decode(self._word_of(code))
            if len(shape) != NUM_ROWS:
                raise ValueError(f"expected the names of {NUM_ROWS} rows of features, got those of {len(shape)}")
            self._shapes[code] = shape
        return self._shapes[code]

    def _word_of(self, code: bytes) -> bytes:
        try:
            return self._words[code]
        except KeyError:
            raise UnknownWordError(f"no word has the code {code.hex()}") from None


def code_of(word: bytes) -> bytes:
    """Two bytes that stand for a word; never those of SPELLED."""
    code = hashlib.blake2b(word, digest_size=CODE_BYTES).digest()
    return code if code != SPELLED else b"\x00\x01"


def _word(value: Value) -> bytes | None:
    """A value as a word; None for one that is no text and no number of few digits, or of another length."""
    if isinstance(value, str) or (isinstance(value, float) and value == round(value, 2)):
        packed = _encode(value)
        if len(packed) in WORD_BYTES:
            return packed
    return None
