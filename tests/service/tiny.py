"""A model small enough to score by hand, written as an artifact: one number per known value, added up."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.artifact import folder as artifact
from models.artifact.calibration import Calibration
from models.artifact.explanation import BEHAVIOUR, CANDIDATE, REQUEST, Explanation
from models.artifact.folder import Golden
from models.artifact.manifest import BATCHED, EXPLAINING, TORCHSCRIPT, Graph
from models.features.arrays import Arrays, concat
from models.features.encoder import Encoder
from models.features.field import FIRST, FieldSpec, Input
from models.features.history import Event
from models.features.packing import PackedGroup, PackedLayout
from models.features.request import Request
from models.features.schema import Schema, SchemaSpec

T = 3
POSITIONS = np.array([1.0, 2.0, 4.0], dtype=np.float32)  # so that the order of the history shows in the score
SCHEMA = SchemaSpec(
    user_key="user_id",
    item_key="item_id",
    history_length=T,
    fields=(
        FieldSpec(name="user_id", kind="categorical", group="user"),
        FieldSpec(name="gender", kind="categorical", group="user"),
        FieldSpec(name="device", kind="categorical", group="context"),
        FieldSpec(name="hour", kind="time", group="context", part="hour"),
        FieldSpec(name="item_id", kind="categorical", group="item"),
        FieldSpec(name="price", kind="numeric", group="item"),
        FieldSpec(name="genres", kind="multi", group="item", max_values=2),
        FieldSpec(name="item_id", kind="sequence", group="behaviour", of="item_id"),
        FieldSpec(name="genres", kind="sequence", group="behaviour", of="genres"),
    ),
).fit(
    {
        "user_id": ["u1", "u2", "u3", "u4"],
        "gender": ["F", "M", "F", "M"],
        "device": ["mobile", "desktop", "mobile", "tv"],
        "item_id": ["a1", "a2", "a3", "a4"],
        "price": [1.0, 2.0, 3.0, 4.0],
        "genres": [["x"], ["y"], ["x", "z"], []],
    }
)
UNREAD = ("hist_age",)
CLICK_RATE = 0.125
CALIBRATION = Calibration(slope=0.9, intercept=-0.5)
LAYOUT = PackedLayout(SCHEMA)
PRICE = np.float32(0.5)


def tables(seed: int) -> dict[str, np.ndarray]:
    """One column of numbers per field, that of PAD being 0; a click has numbers of its own."""
    rng = np.random.default_rng(seed)
    made = {}
    for group in (LAYOUT.request, LAYOUT.history, LAYOUT.item):
        for f in group.fields:
            if f.field.kind == "numeric":
                made[f.name] = np.array([PRICE])
            else:
                made[f.name] = rng.normal(0, 0.5, f.num_rows).astype(np.float32)
                made[f.name][0] = 0.0
    return made


def table(group: PackedGroup, seed: int) -> np.ndarray:
    """The numbers of a group's fields, one below the other."""
    return np.concatenate([tables(seed)[f.name] for f in group.fields])


def score(arrays: Arrays, *, seed: int) -> np.ndarray:
    """The model in numpy, candidate by candidate: a list counts as the mean of its values."""
    logits = []
    for row, user in enumerate(arrays["user_index"]):
        logit = PRICE * arrays["item.price"][row]
        for name, numbers in tables(seed).items():
            if name == "item.price":
                continue
            ids = arrays[name][row if name.startswith("item.") else user]
            values = numbers[ids]
            if name.endswith(".genres"):
                values = values.sum(axis=-1) / np.maximum((ids != 0).sum(axis=-1), 1)
            if name.startswith("hist."):
                values = values * POSITIONS
            logit += values.sum()
        logits.append(logit)
    return np.array(logits, dtype=np.float64)


EXPLANATIONS = (
    Explanation(name="click_contrib", axes=(CANDIDATE, BEHAVIOUR), meaning="What each click's item adds to the logit."),
    Explanation(name="user_part", axes=(REQUEST,), meaning="What the user, the context and the clicks add to it."),
)


class GraphBuilder:
    """An ONNX graph under construction."""

    def __init__(self, seed: int, *, poisoned: str | None = None) -> None:
        self._seed, self._poisoned = seed, poisoned
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def constant(self, name: str, value: np.ndarray) -> str:
        self._weights.append(numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def numbers(self, group: PackedGroup) -> str:
        """The weighted number of each column of a group, [..., K]."""
        numbers = table(group, self._seed)
        if self._poisoned is not None and group.name == "item":
            vocabulary = SCHEMA.field("item_id").vocabulary
            assert vocabulary is not None
            numbers[group.fields[0].offset + vocabulary.index(self._poisoned) + FIRST] = np.nan
        name = group.name
        values = self.add("Gather", [self.constant(f"{name}.table", numbers), f"{name}_ids"], f"{name}.values")
        return self.add("Mul", [values, f"{name}_weights"], f"{name}.weighted") if group.is_weighted else values

    def summed(self, values: str, axis: int, output: str) -> str:
        return self.add("ReduceSum", [values, self.constant(f"{output}.axis", np.array([axis]))], output, keepdims=0)

    def items(self, output: str) -> str:
        """The item half, [C, 1]."""
        return self.add(
            "Unsqueeze",
            [self.summed(self.numbers(LAYOUT.item), 1, "item.sum"), self.constant("one", np.array([1]))],
            output,
        )

    def user_part(self) -> str:
        """What a request adds to the logits of its candidates, [U]."""
        request = self.summed(self.numbers(LAYOUT.request), 1, "request.sum")
        clicks = self.summed(self.numbers(LAYOUT.history), 2, "history.by_click")
        placed = self.add("Mul", [clicks, self.constant("positions", POSITIONS)], "history.placed")
        return self.add("Add", [request, self.summed(placed, 1, "history.sum")], "user_part")

    def to_bytes(self, inputs: Sequence[Input], outputs: Sequence[Input]) -> bytes:
        types = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT, "bool": TensorProto.BOOL}
        takes, gives = (
            [helper.make_tensor_value_info(i.name, types[i.dtype], i.dims) for i in part] for part in (inputs, outputs)
        )
        graph = helper.make_graph(self._nodes, "tiny", takes, gives, self._weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(model)
        content: bytes = model.SerializeToString()
        return content


ITEMS = Input(name="items", dtype="float32", dims=("C", 1))
LOGIT = Input(name="logit", dtype="float32", dims=("C",))


def signatures(layout: PackedLayout) -> dict[str, Graph]:
    """What each graph takes and gives, by its file."""
    items = layout.inputs(layout.item.input_names)
    users = layout.inputs((*layout.request.input_names, *layout.history.input_names))
    (user_index,) = layout.inputs(["user_index"])
    one_user = tuple(replace(i, dims=(1, *i.dims[1:])) for i in users)
    explained = (
        Input(name="click_contrib", dtype="float32", dims=("C", T)),
        Input(name="user_part", dtype="float32", dims=("U",)),
    )
    joining = Graph(inputs=(*users, ITEMS, user_index), outputs=(LOGIT,))
    return {
        "model.onnx": Graph(inputs=(*one_user, ITEMS), outputs=(LOGIT,)),
        BATCHED: joining,
        TORCHSCRIPT: joining,
        "item.onnx": Graph(inputs=items, outputs=(ITEMS,)),
        EXPLAINING: Graph(inputs=(*users, *items, user_index), outputs=(LOGIT, *explained)),
    }


SIGNATURES = signatures(LAYOUT)


def request_graph(seed: int) -> bytes:
    graph = GraphBuilder(seed)
    last = graph.constant("last", np.array([1]))
    graph.add("Add", [graph.add("Squeeze", ["items", last], "item_part"), graph.user_part()], "logit")
    return graph.to_bytes(*_signature("model.onnx"))


def item_graph(seed: int, *, poisoned: str | None = None) -> bytes:
    """It gives the `poisoned` item NaN."""
    graph = GraphBuilder(seed, poisoned=poisoned)
    graph.items("items")
    return graph.to_bytes(*_signature("item.onnx"))


def explaining_graph(seed: int) -> bytes:
    graph = GraphBuilder(seed)
    graph.items("items")
    item_part = graph.add("Squeeze", ["items", graph.constant("last", np.array([1]))], "item_part")
    user_part = graph.add("Gather", [graph.user_part(), "user_index"], "user_part_C")
    graph.add("Add", [item_part, user_part], "logit")
    ids = graph.add("Gather", ["history_ids", graph.constant("first", np.array(0))], "history.item_ids", axis=2)
    clicked = graph.add("Gather", ["history.table", ids], "history.item_values")
    placed = graph.add("Mul", [clicked, "positions"], "history.item_placed")
    graph.add("Gather", [placed, "user_index"], "click_contrib")
    return graph.to_bytes(*_signature(EXPLAINING))


def graphs(seed: int, *, poisoned: str | None = None) -> dict[str, bytes]:
    return {"model.onnx": request_graph(seed), "item.onnx": item_graph(seed, poisoned=poisoned)}


def _signature(file: str) -> tuple[Sequence[Input], Sequence[Input]]:
    return SIGNATURES[file].inputs, SIGNATURES[file].outputs


GOLDEN = (
    Request(
        user={"user_id": "u1", "gender": "F"},
        context={"device": "mobile"},
        ts=1_000_000.0,
        behaviours=(Event(item="a1", ts=1.0, features={"genres": ["x"]}), Event(item="a2", ts=2.0, features={})),
        items={"item_id": ["a1", "a9"], "price": [2.5, None], "genres": [["x", "y"], None]},
        num_items=2,
    ),
    Request(user={}, context={}, ts=2_000_000.0, behaviours=(), items={"item_id": ["a3"]}, num_items=1),
)


def write(
    root: Path,
    model: str = "tiny",
    *,
    seed: int = 1,
    files: dict[str, bytes] | None = None,
    schema: Schema = SCHEMA,
    offset: float = 0.0,
    explaining_seed: int | None = None,
) -> Path:
    """An artifact of the model; `offset` makes its golden scores lie. With a seed explain.onnx is that seed's model."""
    arrays = concat([Encoder(schema).encode(request) for request in GOLDEN])
    files = files or graphs(seed)
    if explaining_seed is not None:
        files = {**files, EXPLAINING: explaining_graph(explaining_seed)}
    return artifact.write(
        root,
        model=model,
        config={},
        schema=schema,
        calibration=CALIBRATION,
        metrics={"test_auc": 0.5, "valid": {"click_rate": CLICK_RATE}},
        golden=Golden(requests=GOLDEN, arrays=arrays, logits=score(arrays, seed=seed) + offset),
        inputs=[i.name for i in schema.inputs if i.name not in UNREAD],
        graphs={name: SIGNATURES[name] for name in files},
        data_hash="none",
        files=files,
        explain=() if explaining_seed is None else EXPLANATIONS,
    )
