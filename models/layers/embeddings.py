"""Embedding tables: one vector for each field of a request, a click or a candidate."""

# U requests, C candidates, T history length, F fields, M values of a multi-valued field, H heads, D width; n: U or C

import torch
from torch import Tensor, nn

from models.features.field import PAD, Field, Group, input_name
from models.features.schema import Schema
from models.layers.base import Inputs
from models.layers.initialisation import Init, l2


class FieldEmbeddings(nn.Module):
    """A [D] vector per field: one table for each categorical, multi-valued and time field, one direction per number.

    - categorical, time: the id's row. PAD's row is zero and gets no gradient; OOV's is trained like any other.
    - multi-valued: the mean over the values present, zero where there is none.
    - numeric: e = x v, so an absent (zero) number is the zero vector.
    - history: a sequence shares the table of the field it is `of`.
    """

    def __init__(self, schema: Schema, width: int, *, init: Init) -> None:
        super().__init__()
        self.schema = schema
        self.tables = nn.ModuleDict()
        self.directions = nn.ParameterDict()
        for field in schema.fields:
            if field.kind == "numeric":
                direction = torch.empty(width)
                init(direction)
                self.directions[_key(field)] = nn.Parameter(direction)
            elif field.kind != "sequence":
                table = nn.Embedding(field.num_ids, width, padding_idx=PAD)
                init(table.weight.data)
                table.weight.data[PAD] = 0
                self.tables[_key(field)] = table

    def group(self, group: Group, inputs: Inputs) -> list[Tensor]:
        """The vectors of a user, context or item group, one [n, D] per field in schema order."""
        return [self._embed(field, inputs[input_name(field)]) for field in self.schema.group(group)]

    def history(self, inputs: Inputs) -> list[Tensor]:
        """One [U, T, D] per sequence field; zero where `hist_mask` is false."""
        mask_UT1 = inputs["hist_mask"].unsqueeze(-1)
        events = []
        for field in self.schema.group("behaviour"):
            assert field.of is not None
            events.append(self._embed(self.schema.field(field.of), inputs[input_name(field)]) * mask_UT1)
        return events

    def pooled_history(self, inputs: Inputs) -> list[Tensor]:
        """One [U, D] per sequence field: the mean over the past clicks, zero where there are none."""
        count_U1 = inputs["hist_mask"].sum(dim=1, keepdim=True).clamp(min=1)
        return [events_UTD.sum(dim=1) / count_U1 for events_UTD in self.history(inputs)]

    def request(self, inputs: Inputs, *, use_history: bool = True) -> list[Tensor]:
        """The vectors [U, D] that all candidates of a request share: its fields', and its past's where it has any."""
        past = self.pooled_history(inputs) if use_history and self.schema.group("behaviour") else []
        return [*self.group("user", inputs), *self.group("context", inputs), *past]

    def _embed(self, field: Field, values: Tensor) -> Tensor:
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


def _key(field: Field) -> str:
    # A bare field name could be a name that modules already use, such as `type` or `values`.
    return input_name(field).replace(".", "_")
