"""Embedding tables: one vector for each field of a request, a click or a candidate."""

# U requests, C candidates, T history length, R request fields, S sequence fields, I item fields, D width
# K columns of a packed group; n: U, C or U x T

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.features.field import PAD, Field, input_name
from models.features.packing import PackedField, PackedGroup, PackedLayout, PackedName
from models.features.schema import Schema
from models.layers.base import Inputs, history_mask
from models.layers.folding import of_weights
from models.layers.initialisation import Init, l2


class FieldEmbeddings(nn.Module):
    """A [D] vector per field: one table for each categorical, multi-valued and time field, one direction per number.

    - categorical, time: the id's row. PAD's row is zero and gets no gradient; OOV's is trained like any other.
    - multi-valued: the mean over the values present, zero where there is none.
    - numeric: e = x v, so an absent (zero) number is the zero vector.
    - history: a sequence shares the table of the field it is `of`.

    Reads one array per field, as training has them, or a group's packed tensors, as the serving graphs do
    (`models.features.packing`): one gather over one table. Packed ids are not clamped; whoever packs has valid ones.
    A group without fields has no vectors: see `num_request`, `num_sequences` and `num_item` before asking for them.
    """

    def __init__(self, schema: Schema, width: int, *, init: Init, fields: Sequence[Field] | None = None) -> None:
        """`fields`: those of the schema's user, context and item fields that get a table; by default all of them."""
        super().__init__()
        self.schema, self.width = schema, width
        self.tables = nn.ModuleDict()
        self.directions = nn.ParameterDict()
        for field in schema.fields:
            if fields is not None and field not in fields:
                continue
            if field.kind == "numeric":
                direction = torch.empty(width)
                init(direction)
                self.directions[_key(field)] = nn.Parameter(direction)
            elif field.kind != "sequence":
                table = nn.Embedding(field.num_ids, width, padding_idx=PAD)
                init(table.weight.data)
                table.weight.data[PAD] = 0
                self.tables[_key(field)] = table
        layout = PackedLayout(schema)
        readers = [
            _PackedReader(group, [f for f in group.fields if self._has(f.field)])
            for group in (layout.request, layout.history, layout.item)
        ]
        self.num_request, self.num_sequences, self.num_item = (len(reader.fields) for reader in readers)
        self._readers = nn.ModuleDict({reader.name: reader for reader in readers})

    def request(self, inputs: Inputs) -> Tensor:
        """The user fields' vectors, then the context fields', each in the schema's order: [U, R, D]."""
        return self._read("request", inputs)

    def history(self, inputs: Inputs) -> Tensor:
        """The clicks' vectors, one per sequence field: [U, T, S, D]; zero where there is no click."""
        events_UTSD = self._read("history", inputs)
        if "history_ids" in inputs:  # padding is packed as the row of PAD, which is zero
            return events_UTSD
        return events_UTSD * history_mask(inputs).unsqueeze(-1).unsqueeze(-1)

    def pooled_history(self, inputs: Inputs) -> Tensor:
        """The mean over the past clicks, one vector per sequence field: [U, S, D]; zero where there are none."""
        count_U = history_mask(inputs).sum(dim=1).clamp(min=1)
        return self.history(inputs).sum(dim=1) / count_U.unsqueeze(-1).unsqueeze(-1)

    def item(self, inputs: Inputs) -> Tensor:
        """The item fields' vectors in the schema's order: [C, I, D]; I may be 0."""
        if not self.num_item:
            dtype = next((p.dtype for p in self.parameters()), torch.get_default_dtype())
            index_C = inputs["user_index"]
            return torch.zeros(index_C.shape[0], 0, self.width, dtype=dtype, device=index_C.device)
        return self._read("item", inputs)

    def embed(self, field: Field, values: Tensor) -> Tensor:
        """One field's vectors [*, D] of the encoder's array of it [*], or [*, M] of a multi-valued field."""
        vectors: Tensor
        if field.kind == "numeric":
            direction_D = self.directions[_key(field)]
            vectors = values.unsqueeze(-1).to(direction_D.dtype) * direction_D
            return vectors
        # The encoder gives no other ids; a tensor client might, and what a gather does then depends on the runtime.
        ids = values.clamp(PAD, field.num_ids - 1)
        vectors = self.tables[_key(field)](ids)
        if field.kind == "multi":
            count = (ids != PAD).sum(dim=-1, keepdim=True).clamp(min=1)
            vectors = vectors.sum(dim=-2) / count
        return vectors

    def penalty(self, weight: float) -> Tensor:
        """(weight / 2) * sum of squares over whole tables, not only the rows of a batch: FuxiCTR's regulariser."""
        return l2(weight / 2, self.parameters())

    def _read(self, name: PackedName, inputs: Inputs) -> Tensor:
        reader = self._readers[name]
        assert isinstance(reader, _PackedReader)
        if not reader.fields:
            raise ValueError(f"the schema has no {name} field to read")
        if f"{name}_ids" in inputs:
            vectors: Tensor = reader(self._table(name), inputs)
            return vectors
        return torch.stack([self.embed(f.field, inputs[f.name]) for f in reader.fields], dim=-2)

    @of_weights
    def _table(self, name: PackedName) -> Tensor:
        """The tables of a group's fields one below the other."""
        reader = self._readers[name]
        assert isinstance(reader, _PackedReader)
        return torch.cat([self._rows(f.field) for f in reader.fields])

    def _rows(self, field: Field) -> Tensor:
        """What a field contributes to its group's table, [rows, D]."""
        if field.kind == "numeric":
            direction_D: Tensor = self.directions[_key(field)]
            return direction_D.unsqueeze(0)
        table = self.tables[_key(field)]
        assert isinstance(table, nn.Embedding)
        return table.weight

    def _has(self, field: Field) -> bool:
        return _key(field) in self.tables or _key(field) in self.directions


class _PackedReader(nn.Module):
    """Reads the packed tensors of one group: [n, K] ids (and weights) to the vectors [n, F, D] of these F fields."""

    def __init__(self, group: PackedGroup, fields: Sequence[PackedField]) -> None:
        super().__init__()
        self.name, self.fields = group.name, tuple(fields)
        self.is_weighted = any(f.field.kind in ("numeric", "multi") for f in fields)
        self.columns: Tensor
        self.shift: Tensor
        self.sum_FK: Tensor | None
        self.has_all = len(self.fields) == len(group.fields)
        columns = [column for f in fields for column in range(f.start, f.stop)]
        widths = [f.stop - f.start for f in fields]
        starts = [0, *accumulate(f.num_rows for f in fields)][: len(fields)]
        shift = [f.offset - start for f, start in zip(fields, starts, strict=True) for _ in range(f.start, f.stop)]
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.int64), persistent=False)
        self.register_buffer("shift", torch.tensor(shift, dtype=torch.int64), persistent=False)
        # A multi-valued field's columns are added up, all fields' at once: a 0/1 product.
        sums = None if len(columns) == len(fields) else torch.zeros(len(fields), len(columns))
        for n, (stop, width) in enumerate(zip(accumulate(widths), widths, strict=True)):
            if sums is not None:
                sums[n, stop - width : stop] = 1
        self.register_buffer("sum_FK", sums, persistent=False)

    def forward(self, table: Tensor, inputs: Inputs) -> Tensor:
        ids_nK = inputs[f"{self.name}_ids"]
        if not self.has_all:
            ids_nK = ids_nK.index_select(-1, self.columns) - self.shift
        vectors_nKD = F.embedding(ids_nK, table)
        if self.is_weighted:
            weights_nK = inputs[f"{self.name}_weights"]
            if not self.has_all:
                weights_nK = weights_nK.index_select(-1, self.columns)
            vectors_nKD = vectors_nKD * weights_nK.unsqueeze(-1).to(table.dtype)
        return vectors_nKD if self.sum_FK is None else self.sum_FK @ vectors_nKD


def _key(field: Field) -> str:
    # A bare field name could be a name that modules already use, such as `type` or `values`.
    return input_name(field).replace(".", "_")
