"""MIAN against the paper's equations, written out row by row with its concatenations and without its shortcuts."""

from typing import Any

import numpy as np
import pytest
import torch

from models.features.arrays import Arrays
from models.features.field import PAD, Field, input_name
from models.features.schema import Schema, SchemaSpec
from models.layers.base import CTRModel
from tests.models.small import (
    COLUMNS,
    ITEM_FIELDS,
    REQUEST_FIELDS,
    SEQUENCES,
    lively,
    tensors,
    with_history,
    without_history,
)
from training.export import example

SCHEMA = with_history()
D = 4
OPTIONS = {"emb_dim": D, "heads": 2, "hidden": (6, 3)}
SWITCHES: list[dict[str, Any]] = [
    {},
    {"transformer": "post_ln"},
    {"transformer": "none"},
    {"transformer": "none", "position": "learned"},
    {"final_ln": True, "ffn_mult": 2},
    {"position": "learned"},
    {"ibim_score": "shared"},
    {"ibim_scorer": "bilinear"},
    {"ibim_scorer": "bilinear", "ibim_score": "shared"},
    {"ibim_scorer": "mlp"},
    {"gim_combine": "concat"},
    {"gim_combine": "zero_pad"},
    {"gim_eb": "masked_mean"},
    {"gim_width": 5, "hidden": ()},
    {"hidden": (12, 3)},  # wider than a click, which is 8
    {"ibim": False},
    {"iuim": False},
    {"icim": False},
    {"gim": False},
    {"gim": False, "gim_combine": "zero_pad", "iuim": False, "icim": False},
    {"iuim": False, "icim": False, "ablate_drop_raw": True},
    {"ibim": False, "ablate_drop_raw": True},
    {"cross_layers": 1},
    {"cross_layers": 3, "gim_combine": "concat", "ibim": False},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_the_three_parts_compute_what_the_paper_writes(switches):
    model = lively("mian", SCHEMA, **OPTIONS | switches)
    inputs = example(SCHEMA, 5, 24)
    inputs["hist_mask"][0], inputs["hist.movie"][0], inputs["hist.genres"][0] = False, PAD, PAD

    logits = model(tensors(inputs)).detach().numpy()

    expected = [Paper(model, SCHEMA, inputs, row).logit() for row in range(24)]
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


Vector = Any  # numpy's operators are typed for scalars too, which says nothing here


def softmax(scores):
    return np.exp(scores) / np.exp(scores).sum()


def relu(x):
    return np.maximum(x, 0)


class Paper:
    """One row, one candidate: eq. (2) to (17) of arXiv 2012.06968, with the readings of models.md section 2."""

    def __init__(self, model: CTRModel, schema: Schema, inputs: Arrays, row: int) -> None:
        self.config: Any = model.config
        self.p = {name: value.numpy() for name, value in model.state_dict().items()}
        self.schema, self.inputs, self.row, self.user = schema, inputs, row, inputs["user_index"][row]

    def embed(self, field: Field, value: Any) -> Vector:  # eq. (2)
        key = input_name(field).replace(".", "_")
        if field.kind == "numeric":
            return float(value) * self.p[f"fields.directions.{key}"]
        table = self.p[f"fields.tables.{key}.weight"]
        if field.kind == "multi":
            present = [table[v] for v in value if v != PAD]
            return sum(present) / len(present) if present else np.zeros(D)
        return table[value]

    def group(self, group: Any, row: int) -> list[Vector]:
        return [self.embed(f, self.inputs[input_name(f)][row]) for f in self.schema.group(group)]

    def event(self, t: int) -> Vector:
        sequences = self.schema.group("behaviour")
        return np.concatenate(
            [self.embed(self.schema.field(f.of or ""), self.inputs[input_name(f)][self.user, t]) for f in sequences]
        )

    def linear(self, name: str, x: Vector) -> Vector:
        return self.p[f"{name}.weight"] @ x + self.p.get(f"{name}.bias", 0.0)

    def layer_norm(self, name: str, x: Vector) -> Vector:  # eq. (3)
        scaled = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        return self.p[f"{name}.weight"] * scaled + self.p[f"{name}.bias"]

    def attention(self, x: Vector) -> Vector:  # eq. (4), over the clicks there are
        heads = []
        width = x.shape[1] // self.config.heads
        for h in range(self.config.heads):
            part = slice(h * width, (h + 1) * width)
            q, k, v = (x @ self.p[f"transformer.attention.{w}.weight"][part].T for w in ("query", "key", "value"))
            heads.append(np.stack([softmax(q[t] @ k.T / np.sqrt(width)) @ v for t in range(len(x))]))
        return np.concatenate(heads, axis=1) @ self.p["transformer.attention.out.weight"].T

    def ffn(self, x: Vector) -> Vector:  # eq. (5)
        return self.linear("transformer.ffn.2", relu(self.linear("transformer.ffn.0", x)))

    def transformer(self, e_b: dict[int, Vector]) -> dict[int, Vector]:
        if not e_b:
            return {}
        x = np.stack(list(e_b.values()))
        if self.config.position == "learned":
            x = x + self.p["transformer.positions"][list(e_b)]
        norm = [
            lambda rows, n=n: np.stack([self.layer_norm(n, r) for r in rows])
            for n in ("transformer.norms.0", "transformer.norms.1")
        ]
        if self.config.transformer == "pre_ln":
            y = x + self.attention(norm[0](x))
            x = y + np.stack([self.ffn(r) for r in norm[1](y)])
            if self.config.final_ln:
                x = np.stack([self.layer_norm("transformer.final_norm", r) for r in x])
        elif self.config.transformer == "post_ln":
            y = norm[0](x + self.attention(x))
            x = norm[1](y + np.stack([self.ffn(r) for r in y]))
        return dict(zip(e_b, x, strict=True))

    def additive(self, name: str, n: int, v: Vector) -> float:  # eq. (8), (10)
        weights, biases = self.p[f"local.{name}.kernel.weight"], self.p[f"local.{name}.kernel.bias"]
        n = n if len(weights) > 1 else 0
        return float(np.tanh(v @ weights[n] + biases[n]))

    def gamma(self, t: int, e_i: Vector, h_t: Vector) -> float:
        if self.config.ibim_scorer == "additive":
            return self.additive("ibim", t, np.concatenate([e_i, h_t]))
        b = self.p["local.ibim.bias"]
        b_t = b[t] if len(b) > 1 else b[0]
        if self.config.ibim_scorer == "bilinear":
            return float(np.tanh(e_i @ self.p["local.ibim.kernel.weight"] @ h_t / np.sqrt(len(e_i)) + b_t))
        inner = relu(self.linear("local.ibim.kernel", np.concatenate([e_i, h_t])))
        return float(np.tanh(self.linear("local.ibim.out", inner)[0] + b_t))

    def attend(self, scores: list[float], e_i: Vector, elements: list[Vector], width: int) -> Vector:
        if not elements:
            return np.concatenate([e_i, np.zeros(width)])  # models.md 2.2, step 2
        alpha = softmax(np.array(scores))
        return sum(a * np.concatenate([e_i, x]) for a, x in zip(alpha, elements, strict=True))  # eq. (9), (11), (13)

    def groups(self) -> dict[str, Vector]:  # eq. (14)
        c = self.config
        e_i = np.concatenate(self.group("item", self.row))
        e_u, e_c = self.group("user", self.user), self.group("context", self.user)
        length, width = self.schema.history_length, D * len(self.schema.group("behaviour"))
        e_b = {t: self.event(t) for t in range(length) if self.inputs["hist_mask"][self.user, t]}
        padded = [e_b.get(t, np.zeros(width)) for t in range(length)]
        mean = sum(padded) / max(len(e_b), 1)
        r = {
            "item": e_i,
            "context": np.concatenate(e_c),
            "behaviour": np.concatenate(padded) if c.gim_eb == "concat" else mean,
            "user": np.concatenate(e_u),
        }
        if c.ibim:
            h = self.transformer(e_b)
            r["ibim"] = self.attend([self.gamma(t, e_i, x) for t, x in h.items()], e_i, list(h.values()), width)
            np.testing.assert_allclose(r["ibim"][: len(e_i)], e_i, atol=1e-12)
        for name, elements in (("iuim", e_u), ("icim", e_c)):
            if getattr(c, name):
                scores = [self.additive(name, n, np.concatenate([e_i, x])) for n, x in enumerate(elements)]
                r[name] = self.attend(scores, e_i, elements, D)
        if c.ablate_drop_raw:
            off = {"behaviour": c.ibim, "user": c.iuim, "context": c.icim}
            r = {name: value for name, value in r.items() if off.get(name, True)}
        return r

    def logit(self) -> float:
        r = self.groups()
        if self.config.gim and self.config.gim_combine == "project_sum":
            r = {name: self.linear(f"gim.projections.{name}", value) for name, value in r.items()}
        omega = np.ones(len(r))
        if self.config.gim:  # eq. (15)
            omega = softmax(np.array([np.tanh(self.linear(f"gim.scores.{n}", value)[0]) for n, value in r.items()]))
        weighted = [w * value for w, value in zip(omega, r.values(), strict=True)]
        if self.config.gim and self.config.gim_combine != "concat":
            widest = max(map(len, weighted))
            x = sum(np.pad(value, (0, widest - len(value))) for value in weighted)
        else:
            x = np.concatenate(weighted)
        x = self.linear("gim.head.first", x)  # eq. (16), (17)
        for layer in range(len(self.config.hidden)):
            x = self.linear(f"gim.head.rest.{3 * layer + 2}", relu(x))
        return float(x[0]) + (self.crosses() if self.config.cross_layers else 0.0)

    def crosses(self) -> float:  # not the paper's: DCNv2's, over every field and the mean click
        length, width = self.schema.history_length, D * len(self.schema.group("behaviour"))
        clicks = [self.event(t) for t in range(length) if self.inputs["hist_mask"][self.user, t]]
        past = np.mean(clicks, axis=0) if clicks else np.zeros(width)
        fields = [
            *self.group("user", self.user),
            *self.group("context", self.user),
            past,
            *self.group("item", self.row),
        ]
        x0 = x = np.concatenate(fields)
        for layer in range(self.config.cross_layers):
            name = f"crosses.rest.{layer - 1}" if layer else "crosses.first"
            x = x0 * self.linear(name, x) + x
        return float(self.linear("crosses.out", x)[0])


def test_the_default_global_width_is_twice_the_items_rounded_up_to_eight():
    model = lively("mian", SCHEMA, emb_dim=5, heads=2)

    assert model.state_dict()["gim.projections.item.weight"].shape == (32, 15)


@pytest.mark.parametrize("module", ["ibim", "iuim", "icim"])
def test_an_attention_without_fields_to_attend_to_is_refused_by_name(module):
    fields = {"ibim": (*REQUEST_FIELDS, *ITEM_FIELDS)}
    fields["iuim"] = tuple(f for f in (*REQUEST_FIELDS, *ITEM_FIELDS, *SEQUENCES) if f.group != "user")
    fields["icim"] = tuple(f for f in (*REQUEST_FIELDS, *ITEM_FIELDS, *SEQUENCES) if f.group != "context")
    length = 0 if module == "ibim" else 4
    schema = SchemaSpec(history_length=length, fields=fields[module]).fit(COLUMNS)

    with pytest.raises(
        ValueError, match=f"{module} attends to .* fields and the schema has none; set {module} to false"
    ):
        lively("mian", schema, **OPTIONS)

    assert torch.isfinite(lively("mian", schema, **OPTIONS | {module: False})(tensors(example(schema, 2, 3)))).all()


def test_heads_that_do_not_divide_a_click_are_refused():
    with pytest.raises(ValueError, match=r"a click is 8 wide \(2 sequence fields of 4\), which 3 heads do not divide"):
        lively("mian", SCHEMA, **OPTIONS | {"heads": 3})


def test_a_schema_without_item_fields_is_refused():
    schema = SchemaSpec(fields=REQUEST_FIELDS).fit(COLUMNS)

    with pytest.raises(ValueError, match="needs an item field"):
        lively("mian", schema, ibim=False)


def test_crosses_need_no_field_of_the_request():
    schema = SchemaSpec(fields=ITEM_FIELDS).fit(COLUMNS)
    model = lively("mian", schema, emb_dim=D, ibim=False, iuim=False, icim=False, cross_layers=2)
    plain = lively("mian", schema, emb_dim=D, ibim=False, iuim=False, icim=False)
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    inputs = tensors(example(schema, 2, 3))

    assert (model(inputs) - plain(inputs)).abs().min() > 1e-3


def test_final_ln_without_pre_ln_is_refused():
    with pytest.raises(ValueError, match="final_ln goes with transformer pre_ln, got transformer post_ln"):
        lively("mian", SCHEMA, **OPTIONS, final_ln=True, transformer="post_ln")


def test_the_penalty_covers_dense_kernels_and_whole_tables_but_no_bias_norm_or_position():
    model = lively("mian", without_history(), emb_dim=D, ibim=False, iuim=False, l2_dense=0.5, l2_emb=0.1)

    penalty = model.penalty().item()

    state = {name: value.square().sum().item() for name, value in model.state_dict().items()}
    tables = sum(value for name, value in state.items() if name.startswith("fields."))
    kernels = sum(value for name, value in state.items() if name.startswith(("local.", "gim.")) and "weight" in name)
    assert penalty == pytest.approx(0.5 * kernels + 0.1 / 2 * tables)


def test_positions_are_not_penalised():
    quiet = lively("mian", SCHEMA, **OPTIONS, position="learned", l2_dense=1.0)
    before = quiet.penalty().item()

    quiet.get_parameter("transformer.positions").data.fill_(100.0)

    assert quiet.penalty().item() == before


def test_weights_start_truncated_normal_and_biases_zero():
    from models.zoo import build

    state = build("mian", {**OPTIONS, "emb_dim": 16}, SCHEMA).state_dict()

    for name, value in state.items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            assert 0 < value.abs().max() <= 0.04, name
    assert state["gim.projections.behaviour.weight"].std().item() == pytest.approx(
        0.0176, rel=0.05
    )  # 0.02, cut at 2 sigma


def test_kernels_start_xavier_normal_where_asked_and_tables_as_in_the_paper():
    from models.zoo import build

    state = build("mian", {**OPTIONS, "emb_dim": 16, "kernel_start": "xavier_normal"}, SCHEMA).state_dict()

    for name in ("gim.projections.behaviour.weight", "gim.head.first.weight", "transformer.ffn.0.weight"):
        assert state[name].std().item() == pytest.approx((2 / sum(state[name].shape)) ** 0.5, rel=0.1), name
    for name, value in state.items():
        if name.startswith("fields."):
            assert 0 < value.abs().max() <= 0.04, name
        elif name.endswith("bias"):
            assert not value.any(), name
