"""Packed inputs: the fields of a group side by side in one tensor, as the serving graphs take them.

A graph pays for every input and every node, so it takes one integer tensor a group and makes one gather over one table
that holds the embedding tables of the group's fields one below the other. A column names a row of that table and has a
weight, by which the row is multiplied:

- categorical and time fields take one column of weight 1;
- a multi-valued field takes `max_values` columns, each of weight 1 / (number of values present);
- a numeric field takes one column, always the row of its direction, whose weight is the normalised number.

Absent values are the row of PAD, which is zero. A group in which every weight is 1 has no weights tensor.
"""

# n rows (U requests, C candidates, or U x T clicks), K columns

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from models.features.arrays import Arrays
from models.features.field import OOV, PAD, Field, Input, input_name
from models.features.schema import Schema

PackedName = Literal["request", "history", "item"]


@dataclass(frozen=True, kw_only=True)
class PackedField:
    """Where one field lies in its group: columns `start` to before `stop`, rows from `offset` of the group's table.

    `field` is the field whose values and table these are: `Schema.history_sources` of a behaviour field.
    """

    name: str
    field: Field
    start: int
    stop: int
    offset: int

    @property
    def num_rows(self) -> int:
        """Rows of the group's table: the ids of the field, or the one direction of a number."""
        return 1 if self.field.kind == "numeric" else self.field.num_ids

    def pack(self, values: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Table rows and weights, one column each for what the encoder made of a value: [..., stop - start]."""
        if self.field.kind == "numeric":
            return np.full((*values.shape, 1), self.offset, dtype=np.int64), values[..., None]
        if self.field.kind == "multi":
            count = np.maximum((values != PAD).sum(axis=-1, keepdims=True), 1)
            return values + self.offset, np.broadcast_to(np.float32(1) / count, values.shape).astype(np.float32)
        return values[..., None] + self.offset, np.ones((*values.shape, 1), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class PackedGroup:
    """The columns of one group: `request` (user, then context fields), `history` or `item`, in the schema's order."""

    name: PackedName
    fields: tuple[PackedField, ...]

    @property
    def num_columns(self) -> int:
        return self.fields[-1].stop if self.fields else 0

    @property
    def num_rows(self) -> int:
        """Rows of the group's table."""
        return self.fields[-1].offset + self.fields[-1].num_rows if self.fields else 0

    @property
    def is_weighted(self) -> bool:
        """Whether any weight is other than 1."""
        return any(f.field.kind in ("numeric", "multi") for f in self.fields)

    @cached_property
    def oov_rows(self) -> NDArray[np.int64]:
        """The row of OOV for each column; -1 for a number, which has none."""
        rows = [(-1 if f.field.kind == "numeric" else f.offset + OOV, f.stop - f.start) for f in self.fields]
        return np.array([row for row, width in rows for _ in range(width)], dtype=np.int64)

    @cached_property
    def pad_rows(self) -> NDArray[np.int64]:
        """The row of PAD for each column, which is what padding holds; of a number its direction, with weight 0."""
        rows = [(f.offset + (0 if f.field.kind == "numeric" else PAD), f.stop - f.start) for f in self.fields]
        return np.array([row for row, width in rows for _ in range(width)], dtype=np.int64)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the tensors that `pack` gives."""
        return (f"{self.name}_ids", f"{self.name}_weights") if self.is_weighted else (f"{self.name}_ids",)

    def pack(self, arrays: Arrays, shape: tuple[int, ...]) -> Arrays:
        """The group's `<name>_ids` [*shape, K] and, where it is weighted, `<name>_weights` of the encoder's arrays.

        `shape` is (U,), (C,) or (U, T).
        """
        ids = np.empty((*shape, self.num_columns), dtype=np.int64)
        weights = np.empty((*shape, self.num_columns), dtype=np.float32)
        for field in self.fields:
            columns = slice(field.start, field.stop)
            ids[..., columns], weights[..., columns] = field.pack(arrays[field.name])
        packed: Arrays = {f"{self.name}_ids": ids}
        if self.is_weighted:
            packed[f"{self.name}_weights"] = weights
        return packed


class PackedLayout:
    """Where every field of a schema lies in the packed tensors."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.request = _group(
            "request", [(input_name(f), f) for f in (*schema.group("user"), *schema.group("context"))]
        )
        past = [input_name(f) for f in schema.group("behaviour")]
        self.history = _group("history", list(zip(past, schema.history_sources, strict=True)))
        self.item = _group("item", [(input_name(f), f) for f in schema.group("item")])

    def pack(self, arrays: Arrays) -> Arrays:
        """All packed tensors of the encoder's arrays (of `Encoder.encode` or `concat`), for any U and C.

        Gives `request_*` and `history_*` by request, `item_*` by candidate and `user_index`; a group without fields
        gives none. Clicks behind `history_mask` are padding whatever the arrays hold there.
        """
        packed: Arrays = {"user_index": arrays["user_index"]}
        if self.request.fields:
            packed |= self.request.pack(arrays, (len(arrays[self.request.fields[0].name]),))
        if self.history.fields:
            packed |= self.pack_history(arrays)
        if self.item.fields:
            packed |= self.item.pack(arrays, (len(arrays["user_index"]),))
        return packed

    def pack_history(self, arrays: Arrays) -> Arrays:
        """The `history_*` tensors of the encoder's `hist*` arrays."""
        mask_UT = arrays["hist_mask"]
        packed = self.history.pack(arrays, mask_UT.shape)
        packed["history_ids"] = np.where(mask_UT[..., None], packed["history_ids"], self.history.pad_rows)
        if "history_weights" in packed:
            packed["history_weights"] = packed["history_weights"] * mask_UT[..., None]
        return {**packed, "history_mask": mask_UT, "history_age": arrays["hist_age"]}

    def inputs(self, names: Sequence[str]) -> tuple[Input, ...]:
        """Dtype and dimensions of these packed tensors, in the order of the layout."""
        length = self.schema.history_length
        known: list[Input] = []
        groups: tuple[tuple[PackedGroup, tuple[str | int, ...]], ...]
        groups = ((self.request, ("U",)), (self.history, ("U", length)), (self.item, ("C",)))
        for group, dims in groups:
            for name in group.input_names if group.fields else ():
                dtype: Literal["int64", "float32"] = "int64" if name.endswith("_ids") else "float32"
                known.append(Input(name=name, dtype=dtype, dims=(*dims, group.num_columns)))
            if group.name == "history" and group.fields:
                known.append(Input(name="history_mask", dtype="bool", dims=dims))
                known.append(Input(name="history_age", dtype="int64", dims=dims))
        known.append(Input(name="user_index", dtype="int64", dims=("C",)))
        return tuple(i for i in known if i.name in names)


def slice_candidates(packed: Mapping[str, NDArray[Any]], rows: slice | NDArray[np.int64]) -> Arrays:
    """The same request with these of its candidates: tensors by candidate are cut, those by request stay."""
    by_candidate = ("items", "user_index", "item_ids", "item_weights")
    return {name: values[rows] if name in by_candidate else values for name, values in packed.items()}


def join(parts: Sequence[Arrays]) -> Arrays:
    """Several requests' packed tensors as one batch; `user_index` names each candidate's request."""
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "user_index"}
    sizes = [num_candidates(part) for part in parts]
    joined["user_index"] = np.repeat(np.arange(len(parts)), sizes)
    return joined


def num_requests(packed: Mapping[str, NDArray[Any]]) -> int:
    """U of packed tensors; of a model that reads only candidates, as far as `user_index` tells."""
    for name, values in packed.items():
        if name.startswith(("request_", "history_")):
            return len(values)
    return int(packed["user_index"].max(initial=0)) + 1 if "user_index" in packed else 1


def num_candidates(packed: Mapping[str, NDArray[Any]]) -> int:
    return len(packed["items"] if "items" in packed else packed["item_ids"])


def _group(name: PackedName, sources: Sequence[tuple[str, Field]]) -> PackedGroup:
    fields: list[PackedField] = []
    column = row = 0
    for input_name_, field in sources:
        width = (field.max_values or 1) if field.kind == "multi" else 1
        fields.append(PackedField(name=input_name_, field=field, start=column, stop=column + width, offset=row))
        column, row = column + width, row + fields[-1].num_rows
    return PackedGroup(name=name, fields=tuple(fields))
