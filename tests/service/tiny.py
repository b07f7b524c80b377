"""A model small enough to score by hand, written as an artifact: one number per known value, added up."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.artifact import folder as artifact
from models.artifact.calibration import Calibration
from models.artifact.explanation import BEHAVIOUR, CANDIDATE, REQUEST, Explanation
from models.artifact.folder import EXPLAINING, Golden
from models.features.arrays import Arrays, concat
from models.features.encoder import Encoder
from models.features.field import FIRST, FieldSpec
from models.features.history import Event
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
UNREAD = ("hist_mask", "hist_age")
CLICK_RATE = 0.125
CALIBRATION = Calibration(slope=0.9, intercept=-0.5)


def tables(seed: int) -> dict[str, np.ndarray]:
    """One column of numbers per id input, that of PAD being 0."""
    rng = np.random.default_rng(seed)
    made = {}
    for wanted in SCHEMA.inputs:
        if wanted.dtype == "int64" and wanted.name not in ("user_index", *UNREAD):
            field = SCHEMA.field(wanted.name.split(".")[1])
            made[wanted.name] = rng.normal(0, 0.5, field.num_ids).astype(np.float32)
            made[wanted.name][0] = 0.0
    return made


def score(arrays: Arrays, *, seed: int) -> np.ndarray:
    """The model in numpy, candidate by candidate."""
    logits = []
    for row, user in enumerate(arrays["user_index"]):
        logit = 0.5 * arrays["item.price"][row]
        for name, table in tables(seed).items():
            values = table[arrays[name][row if name.startswith("item.") else user]]
            if name.startswith("hist."):
                values = (values.T * POSITIONS).T
            logit += values.sum()
        logits.append(logit)
    return np.array(logits, dtype=np.float64)


EXPLANATIONS = (
    Explanation(name="click_contrib", axes=(CANDIDATE, BEHAVIOUR), meaning="What each click's item adds to the logit."),
    Explanation(name="user_part", axes=(REQUEST,), meaning="What the user, the context and the clicks add to it."),
)


def to_onnx(seed: int, *, poisoned: str | None = None, explaining: bool = False) -> bytes:
    """The model as a graph; it scores the `poisoned` item as NaN. Explaining, it gives EXPLANATIONS after the logit."""
    numbers = tables(seed)
    if poisoned is not None:
        vocabulary = SCHEMA.field("item_id").vocabulary
        assert vocabulary is not None
        numbers["item.item_id"][vocabulary.index(poisoned) + FIRST] = np.nan
    nodes: list[onnx.NodeProto] = []
    of_user: list[str] = []
    of_item = ["priced"]
    weights = [numpy_helper.from_array(POSITIONS[:, None], "positions")]
    weights.append(numpy_helper.from_array(np.array(0.5, np.float32), "half"))
    nodes.append(helper.make_node("Mul", ["item.price", "half"], ["priced"]))
    for name, table in numbers.items():
        weights.append(numpy_helper.from_array(table, f"{name}.table"))
        nodes.append(helper.make_node("Gather", [f"{name}.table", name], [f"{name}.values"]))
        dims = next(i.dims for i in SCHEMA.inputs if i.name == name)
        values = f"{name}.values"
        if name.startswith("hist."):
            if len(dims) == 2:
                weights.append(numpy_helper.from_array(np.array([2]), f"{name}.last"))
                nodes.append(helper.make_node("Unsqueeze", [values, f"{name}.last"], [f"{name}.wide"]))
                values = f"{name}.wide"
            nodes.append(helper.make_node("Mul", [values, "positions"], [f"{name}.placed"]))
            values = f"{name}.placed"
        axes = np.arange(1, 3 if name.startswith("hist.") else len(dims))
        if axes.size:
            weights.append(numpy_helper.from_array(axes, f"{name}.axes"))
            nodes.append(helper.make_node("ReduceSum", [values, f"{name}.axes"], [f"{name}.sum"], keepdims=0))
            values = f"{name}.sum"
        (of_item if name.startswith("item.") else of_user).append(values)
    nodes += [
        helper.make_node("Sum", of_user, ["user_part"]),
        helper.make_node("Gather", ["user_part", "user_index"], ["user_part_C"]),
        helper.make_node("Sum", [*of_item, "user_part_C"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], ["prob"]),
    ]
    types = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT, "bool": TensorProto.BOOL}
    inputs = [
        helper.make_tensor_value_info(i.name, types[i.dtype], i.dims) for i in SCHEMA.inputs if i.name not in UNREAD
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["C"]) for name in ("logit", "prob")]
    if explaining:
        weights.append(numpy_helper.from_array(np.array([2]), "last"))
        nodes.append(helper.make_node("Squeeze", ["hist.item_id.placed", "last"], ["clicks_U"]))
        nodes.append(helper.make_node("Gather", ["clicks_U", "user_index"], ["click_contrib"]))
        outputs[1:] = [
            helper.make_tensor_value_info("click_contrib", TensorProto.FLOAT, ["C", T]),
            helper.make_tensor_value_info("user_part", TensorProto.FLOAT, ["U"]),
        ]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


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
    return artifact.write(
        root,
        model=model,
        config={},
        schema=schema,
        calibration=CALIBRATION,
        metrics={"test_auc": 0.5, "valid": {"click_rate": CLICK_RATE}},
        golden=Golden(requests=GOLDEN, arrays=arrays, logits=score(arrays, seed=seed) + offset),
        inputs=[i.name for i in schema.inputs if i.name not in UNREAD],
        data_hash="none",
        files={
            **(files or {"model.onnx": to_onnx(seed)}),
            **({} if explaining_seed is None else {EXPLAINING: to_onnx(explaining_seed, explaining=True)}),
        },
        explain=() if explaining_seed is None else EXPLANATIONS,
    )
