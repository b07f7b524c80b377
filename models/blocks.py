"""What two or more models share: the two halves, field embeddings, masked attention, the MLP.

No fused attention and no einsum: each disagrees between runtimes, or runs slower, once exported (models.md section 9).
"""

# U requests, C candidates, T history length, F fields, M values of a multi-valued field, H heads, D width; n: U or C

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor, nn

from models.explanation import Explanation
from models.schema import PAD, Field, Group, Schema, input_name
from models.taps import tap

Inputs: TypeAlias = Mapping[str, Tensor]
"""A model's inputs by name, as `Schema.inputs` lists them."""
UserState: TypeAlias = dict[str, Tensor]
"""What a model knows of each request before it sees a candidate: tensors whose first dimension is U."""
Init: TypeAlias = Callable[[Tensor], object]
"""Fills a tensor in place."""


class CTRModel(nn.Module):
    """A click model in two halves: what depends on the request alone, and what needs a candidate.

    One request with N candidates is U = 1, C = N; a training batch is U = C with `user_index = arange`.
    Both give a candidate the same logit: nothing but its own request and itself enters it.
    """

    def encode_user(self, inputs: Inputs) -> UserState:
        """Everything that depends only on user, context and history: once per request."""
        raise NotImplementedError

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        """Logits [C]; reads the `item.*` inputs and `user_index`, which names each candidate's request."""
        raise NotImplementedError

    def forward(self, inputs: Inputs) -> Tensor:
        return self.score(self.encode_user(inputs), inputs)

    def penalty(self) -> Tensor:
        """The L2 terms the model's config asks for, to be added to the mean loss; 0 where it asks for none."""
        raise NotImplementedError

    def auxiliary_loss(self, state: UserState, inputs: Inputs) -> Tensor:  # noqa: ARG002  # some models read it
        """What the model learns beside the labels, of a training batch and what `encode_user` made of it; 0 by default.

        Scalar, to be added to the mean loss.
        """
        return inputs["user_index"].new_zeros((), dtype=torch.get_default_dtype())

    def explanations(self) -> tuple[Explanation, ...]:
        """What the model shows of itself by `tap` (models/taps.py), in the order to be read; nothing by default."""
        return ()


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


class MLP(nn.Module):
    """Hidden layers (Linear, BatchNorm if asked, ReLU, Dropout), then one logit. No hidden layer: a linear map.

    `first` stands apart so that a model can apply it to its input piece by piece: W [a; b] = W_a a + W_b b.
    """

    def __init__(self, width: int, hidden: Sequence[int], *, dropout: float, batch_norm: bool = False) -> None:
        super().__init__()
        widths = (*hidden, 1)
        self.first = nn.Linear(width, widths[0])
        self.rest = nn.Sequential()
        for this, following in pairwise(widths):
            if batch_norm:
                self.rest.append(nn.BatchNorm1d(this))
            self.rest.append(nn.ReLU())
            self.rest.append(nn.Dropout(dropout))
            self.rest.append(nn.Linear(this, following))

    def forward(self, x_CD: Tensor) -> Tensor:
        """The logits [C]."""
        return self.finish(self.first(x_CD))

    def finish(self, z_CF: Tensor) -> Tensor:
        """The logits [C], given the first layer's output."""
        logit_C1: Tensor = self.rest(z_CF)
        return logit_C1.squeeze(-1)


class SelfAttention(nn.Module):
    """Multi-head attention of n sequences over themselves: concat_h(softmax(Q K^T / sqrt(D/H)) V) W_O^T, no biases."""

    def __init__(self, width: int, heads: int, *, dropout: float, shown_as: str = "self_attn") -> None:
        super().__init__()
        self.heads, self.shown_as = heads, shown_as
        self.scale = math.sqrt(width / heads)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_nTD: Tensor, mask_nT: Tensor | None = None) -> Tensor:
        # What is H x T x T large takes most of the time: scale the queries, and clear the values, in its place.
        query_nTD, key_nTD, value_nTD = self.query(x_nTD) / self.scale, self.key(x_nTD), self.value(x_nTD)
        scores_nHTT = split_heads(query_nTD, self.heads) @ split_heads(key_nTD, self.heads).transpose(-1, -2)
        if mask_nT is not None:
            scores_nHTT = scores_nHTT + _never(mask_nT, scores_nHTT.dtype).unsqueeze(1).unsqueeze(1)
            value_nTD = value_nTD * mask_nT.unsqueeze(-1)  # so that attending to nothing gives zeros
        weights_nHTT = scores_nHTT.softmax(dim=-1)
        tap(self.shown_as, lambda: weights_nHTT if mask_nT is None else weights_nHTT * _both(mask_nT))
        attended_nHTD = self.dropout(weights_nHTT) @ split_heads(value_nTD, self.heads)
        out_nTD: Tensor = self.out(merge_heads(attended_nHTD))
        return out_nTD


def _both(mask_nT: Tensor) -> Tensor:
    """[n, 1, T, T]: true where neither place is padding."""
    return (mask_nT.unsqueeze(1) & mask_nT.unsqueeze(2)).unsqueeze(1)


def split_heads(x_nTD: Tensor, heads: int) -> Tensor:
    """[n, T, D] to [n, H, T, D/H], the heads being contiguous slices of D."""
    return torch.unflatten(x_nTD, -1, (heads, -1)).transpose(1, 2)


def merge_heads(x_nHTD: Tensor) -> Tensor:
    """The inverse of `split_heads`."""
    return x_nHTD.transpose(1, 2).flatten(2)


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the last axis where the mask is true, 0 elsewhere; all zeros, never NaN, where nothing is true."""
    if mask is None:
        return scores.softmax(dim=-1)
    return (scores + _never(mask, scores.dtype)).softmax(dim=-1) * mask


def _never(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores before a softmax: 0 where the mask is true, so much elsewhere that nothing is left."""
    # -inf would give NaN in a row without a single true (models.md section 9, X1); half precision ends at -65504 (X3).
    low = -1e4 if dtype == torch.float16 else -1e9
    return torch.where(mask, 0.0, low).to(dtype)


def l2(weight: float, parameters: Iterable[Tensor]) -> Tensor:
    """Weight * sum of squares; with a weight of 0 none is read, and none gets a gradient: tables are large."""
    squares = [p.square().sum() for p in parameters] if weight else []
    return weight * torch.stack(squares).sum() if squares else torch.zeros(())


def tiny_normal(tensor: Tensor) -> None:
    """FuxiCTR's rule for embedding tables: normal with deviation 1e-4."""
    nn.init.normal_(tensor, std=1e-4)


def truncated_normal(tensor: Tensor) -> None:
    """BERT's rule: normal with deviation 0.02, cut at two deviations."""
    nn.init.trunc_normal_(tensor, std=0.02, a=-0.04, b=0.04)


def start_linears(module: nn.Module, init: Init) -> None:
    """Starts the weights of every dense layer by the given rule (FuxiCTR's is Xavier-normal), its biases at zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            init(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _key(field: Field) -> str:
    # A bare field name could be a name that modules already use, such as `type` or `values`.
    return input_name(field).replace(".", "_")
