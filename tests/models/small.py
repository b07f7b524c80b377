"""Small schemas, inputs and models for the tests of models and their export."""

import numpy as np
import torch
from torch import Tensor, nn

from models import zoo
from models.features.arrays import Arrays, concat
from models.features.encoder import Encoder
from models.features.field import PAD, FieldSpec
from models.features.history import Event
from models.features.request import Request
from models.features.schema import Schema, SchemaSpec
from models.features.values import Columns, Row
from models.layers.base import CTRModel
from training.export import example

GENRES = ["drama", "comedy", "noir"]
ITEMS = [f"m{n}" for n in range(6)]
COLUMNS: Columns = {
    "user_id": ["u0", "u1", "u2", "u0", "u1", "u2"],
    "age": [20, 30, 40, 20, 30, 40],
    "likes": [["a"], ["a", "b"], [], ["c"], ["b"], ["a"]],
    "device": ["tv", "phone", "tv", "tv", "phone", "tv"],
    "movie": ITEMS,
    "genres": [GENRES[:1], GENRES[1:], [], GENRES, GENRES[2:], GENRES[:2]],
    "price": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    "spent": [None, 2.0, 3.5, None, 5.0, 6.0],
    "coupons": [["x"], [], ["x", "y"], None, ["y"], []],
}
REQUEST_FIELDS: tuple[FieldSpec, ...] = (
    FieldSpec(name="user_id", kind="categorical", group="user"),
    FieldSpec(name="age", kind="numeric", group="user"),
    FieldSpec(name="likes", kind="multi", group="user"),
    FieldSpec(name="hour", kind="time", part="hour", group="context"),
    FieldSpec(name="device", kind="categorical", group="context"),
)
ITEM_FIELDS: tuple[FieldSpec, ...] = (
    FieldSpec(name="movie", kind="categorical", group="item"),
    FieldSpec(name="genres", kind="multi", group="item"),
    FieldSpec(name="price", kind="numeric", group="item"),
)
SEQUENCES = (
    FieldSpec(name="movie", kind="sequence", group="behaviour", of="movie"),
    FieldSpec(name="genres", kind="sequence", group="behaviour", of="genres"),
)


def with_history(length: int = 4) -> Schema:
    """Every kind of field in every group it may stand in."""
    return _fit((*REQUEST_FIELDS, *ITEM_FIELDS, *SEQUENCES), length)


def with_fields_of_clicks(length: int = 4) -> Schema:
    """A history that also repeats a number of the item's, what the request is about, and what only clicks have."""
    repeated = ("price", "device", "likes", "age", "hour")
    clicks = (
        *(FieldSpec(name=name, kind="sequence", group="behaviour", of=name) for name in repeated),
        FieldSpec(name="spent", kind="numeric", group="behaviour"),
        FieldSpec(name="coupons", kind="multi", group="behaviour"),
    )
    return _fit((*REQUEST_FIELDS, *ITEM_FIELDS, *SEQUENCES, *clicks), length)


def without_history() -> Schema:
    return _fit((*REQUEST_FIELDS, *ITEM_FIELDS), 0)


def _fit(fields: tuple[FieldSpec, ...], length: int) -> Schema:
    return SchemaSpec(item_key="movie", history_length=length, fields=fields).fit(COLUMNS)


def lively(name: str, schema: Schema, **options: object) -> CTRModel:
    """A model in float64 and eval mode whose every parameter matters: as initialised, most are nearly zero."""
    model = zoo.build(name, options, schema).double().eval()
    draw = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4, generator=draw)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight.data[PAD] = 0
        if isinstance(module, nn.BatchNorm1d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(generator=draw)
            module.running_var.uniform_(0.5, 2.0, generator=draw)
    return model


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    """Arrays as a float64 model takes them."""
    values = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {name: v.double() if v.dtype == torch.float32 else v for name, v in values.items()}


def one_request(schema: Schema, num_candidates: int, *, history: bool = True) -> Arrays:
    """One request; with a history, it has at least one click and, if T allows, one free place."""
    arrays = example(schema, 1, num_candidates, history=history)
    if history and schema.history_length:
        arrays["hist_mask"][:] = [[False, *[True] * (schema.history_length - 1)]]
        arrays["hist.movie"][:] = [[PAD, *range(1, schema.history_length)]]
    return arrays


def rows_of(arrays: Arrays) -> Arrays:
    """The row form of a request: every candidate with its own copy of its request."""
    index = arrays["user_index"]
    own = ("item.", "user_index")
    rows = {name: array if name.startswith(own) else array[index] for name, array in arrays.items()}
    return rows | {"user_index": np.arange(len(index))}


def raw_requests() -> list[Request]:
    """Raw requests with unknown, missing and awkward values, with and without history."""
    past = [Event(item=f"m{n}", ts=100.0 * n, features={"genres": [GENRES[n % 3]]}) for n in range(6)]
    usual: Row = {"user_id": "u1", "age": 33, "likes": ["a", "z"]}
    movies: Columns = {
        "movie": ["m0", "m5", "never seen"],
        "genres": [["noir"], None, ["?"]],
        "price": [2.5, None, 1e9],
    }
    return [
        Request(user=usual, context={"device": "tv"}, ts=1e6, behaviours=past, items=movies, num_items=3),
        Request(user=usual, context={"device": "car"}, ts=250.0, behaviours=past, items=movies, num_items=3),
        Request(user={}, context={}, ts=0.0, behaviours=(), items={"movie": ["m1"]}, num_items=1),
    ]


def encoded(schema: Schema) -> Arrays:
    return concat([Encoder(schema).encode(request) for request in raw_requests()])
