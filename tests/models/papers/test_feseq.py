"""FESeq against its equations, written event by event and field by field."""

from typing import Any

import numpy as np
import pytest
import torch

from models import zoo
from models.features.field import FieldSpec
from models.features.schema import SchemaSpec
from models.layers.base import explain
from models.papers.feseq import SequenceEncoder
from tests.models.flat import batch_norm, layer_norm, linear, sigmoid, softmax, weights
from tests.models.halves import check_parts
from tests.models.small import (
    COLUMNS,
    ITEM_FIELDS,
    REQUEST_FIELDS,
    SEQUENCES,
    lively,
    one_request,
    tensors,
    without_history,
)
from training.export import example

HOURS = FieldSpec(name="hour", kind="sequence", group="behaviour", of="hour")
SCHEMA = SchemaSpec(item_key="movie", history_length=3, fields=(*REQUEST_FIELDS, *ITEM_FIELDS, *SEQUENCES, HOURS)).fit(
    COLUMNS
)  # three sequence fields, four constant ones, and the price, which no click has
OPTIONS: dict[str, Any] = {"emb_dim": 4, "heads": 4, "pool_width": 5, "hidden": (7, 6), "time_buckets": 12_000}


class Oracle:
    """One row at a time, from the text of models.md section 3.2, by the names of the weights."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        self.config, self.p, self.inputs = model.config, weights(model), inputs
        self.fields, self.own_tables = model.fields, model.pooling.fields if model.pooling is not None else None

    def logit(self, row: int) -> float:
        c, p = self.config, self.p
        user = int(self.inputs["user_index"][row])
        own_fields = (*SCHEMA.group("user"), *SCHEMA.group("context"))
        of_user = self.fields.request(self.inputs)[user].detach().numpy()
        request = {f.name: vector for f, vector in zip(own_fields, of_user, strict=True)}
        of_item = self.fields.item(self.inputs)[row].detach().numpy()
        item = {f.name: vector for f, vector in zip(SCHEMA.group("item"), of_item, strict=True)}
        clicks = self.fields.history(self.inputs)[user].detach().numpy().transpose(1, 0, 2)
        constant = [request[name] for name in ("user_id", "age", "likes", "device")]

        present = [t for t in range(3) if self.inputs["hist_mask"][user, t]]
        events = []  # those that are there, oldest first, the target last
        for t in [*present, 3]:
            own = [click[t] for click in clicks] if t < 3 else [item["movie"], item["genres"], request["hour"]]
            x = np.stack(own + constant if c.nonseq_in_interaction else own)
            flat = self.interact("interaction", x, c.interact_layers_in).flatten()
            age = int(self.inputs["hist_age"][user, t]) if t < 3 else 0
            units = age // c.time_unit_s
            bucket = units.bit_length() if c.time_scale == "log2" else units
            places = [p["places.positions"][t]] if c.use_pos else []
            places += [p["places.times"][min(bucket, c.time_buckets - 1)]] if c.use_time else []
            events.append(np.concatenate([flat, *places]) if c.pos_time == "concat" else flat + sum(places))

        refined = [self.refine(i, events) for i in range(len(events))]
        z = np.concatenate([*constant, item["price"], self.pool(row, present, refined)])
        for layer in range(len(c.hidden)):
            name = "first" if layer == 0 else f"rest.{3 * layer - 1}"
            z = self.leaky(linear(p, name, z))
        return float(linear(p, f"rest.{3 * len(c.hidden) - 1}" if c.hidden else "first", z)[0])

    def interact(self, name: str, x: np.ndarray, layers: int) -> np.ndarray:
        p, x0 = self.p, x
        for layer in range(layers):
            at = f"{name}.layers.{layer}"
            if self.config.interaction == "autoint":
                q, k, v = (linear(p, f"{at}.{part}", x) for part in ("query", "key", "value"))
                y = np.zeros_like(x)
                for i in range(len(x)):
                    a = softmax(np.array([q[i] @ k[j] for j in range(len(x))]) / np.sqrt(x.shape[1]))
                    y[i] = sum(a[j] * v[j] for j in range(len(x))) + x[i]
                x = np.maximum(layer_norm(p, f"{at}.norm", y) if self.config.interact_ln else y, 0)
            elif self.config.interaction == "destine":
                q, k, v, residual = (linear(p, f"{at}.{part}", x) for part in ("query", "key", "value", "residual"))
                of_all = softmax(linear(p, f"{at}.unary", x)[:, 0])
                rows = []
                for i in range(len(x)):
                    whitened = [(q[i] - q.mean(axis=0)) @ (k[j] - k.mean(axis=0)) for j in range(len(x))]
                    of_pair = softmax(np.array(whitened) / np.sqrt(x.shape[1]))
                    rows.append(sum((of_pair[j] + of_all[j]) * v[j] for j in range(len(x))) + residual[i])
                x = np.stack(rows)
            elif self.config.interaction == "final":
                h = linear(p, f"{at}.kernel", x.flatten())
                second, first = h[: len(h) // 2], h[len(h) // 2 :]
                x = np.maximum(second * (1 + first), 0).reshape(x.shape)
            else:
                kernel, bias, flat = p[f"{at}.kernel.weight"], p[f"{at}.bias"], x.flatten()
                if self.config.interaction == "crossnet":
                    crossed = x0.flatten() * (flat @ kernel[0]) + bias
                else:
                    crossed = x0.flatten() * (kernel @ flat + bias)
                x = (crossed + flat).reshape(x.shape)
        return x

    def refine(self, i: int, events: list[np.ndarray]) -> np.ndarray:
        p, width = self.p, len(events[0])
        seen = range(i + 1) if self.config.causal else range(len(events))
        keys = {j: linear(p, "refiner.shown", events[j])[:width] for j in seen}
        values = {j: linear(p, "refiner.shown", events[j])[width:] for j in seen}
        query, out = linear(p, "refiner.query", events[i]), np.zeros(width)
        for h in range(self.config.heads):
            part = slice(h * width // self.config.heads, (h + 1) * width // self.config.heads)
            a = softmax(np.array([query[part] @ keys[j][part] for j in seen]) / np.sqrt(width / self.config.heads))
            out[part] = sum(a[j] * values[j][part] for j in seen)
        s = events[i] + linear(p, "refiner.out", out)
        refined: np.ndarray = s + linear(p, "refiner.ffn.2", self.leaky(linear(p, "refiner.ffn.0", s)))
        return refined

    def pool(self, row: int, present: list[int], refined: list[np.ndarray]) -> np.ndarray:
        c, p = self.config, self.p
        match c.pool:
            case "target":
                return refined[-1]
            case "sum":
                return np.asarray(sum(refined))
            case "mean":
                return np.asarray(sum(refined)) / len(refined)
            case "concat":
                places = np.zeros((4, len(refined[0])))
                places[[*present, 3]] = refined
                return places.flatten()
        assert self.own_tables is not None
        item = self.own_tables.item(self.inputs)[row].detach().numpy()
        e = self.interact("pooling.interaction", item, c.interact_layers_item).flatten()
        q = self.prelu(linear(p, "pooling.query", e))
        keys = [self.prelu(linear(p, "pooling.key", r)) for r in refined]
        values = [self.prelu(linear(p, "pooling.value", r)) for r in refined]
        scale = np.sqrt(c.pool_width) if c.pool_scale else 1.0
        if c.pool_attn == "bilinear":
            scores = np.array([k @ p["pooling.kernel"] @ q for k in keys]) / scale
        elif c.pool_attn == "dot":
            scores = np.array([k @ q for k in keys]) / scale
        else:
            scores = np.array([self.meet(q, k) for k in keys])
        alpha = softmax(scores) if c.pool_softmax else scores
        pooled = sum(a * v for a, v in zip(alpha, values, strict=True))
        return self.prelu(linear(p, "pooling.out", pooled))

    def meet(self, q: np.ndarray, k: np.ndarray) -> float:
        x = linear(self.p, "pooling.meeting.first", np.concatenate([q, k, q - k, q * k]))
        for layer in range(3):
            at = f"pooling.meeting.rest.{2 * layer}"
            share = sigmoid(batch_norm(self.p, f"{at}.norm", x, eps=1e-9))
            x = share * x + (1 - share) * self.p[f"{at}.alpha"] * x
            x = linear(self.p, f"pooling.meeting.rest.{2 * layer + 1}", x)
        return float(x[0])

    def prelu(self, x: np.ndarray) -> np.ndarray:
        return np.where(x > 0, x, self.p["pooling.activation.weight"] * x)

    @staticmethod
    def leaky(x: np.ndarray) -> np.ndarray:
        return np.where(x > 0, x, 0.01 * x)


FORMS: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"interaction": "crossnet", "interact_layers_in": 3},
    {"interaction": "crossnetv2", "interact_layers_item": 1},
    {"interaction": "destine"},
    {"interaction": "final", "interact_layers_item": 3},
    {"interact_layers_in": 0, "interact_layers_item": 0},
    {"interact_ln": False},
    {"nonseq_in_interaction": False, "use_pos": False},
    {"use_time": False},
    {"use_pos": False, "use_time": False},
    {"pos_time": "add"},
    {"time_unit_s": 1, "time_buckets": 40_000},
    {"time_unit_s": 1, "time_buckets": 28, "time_scale": "log2"},
    {"time_unit_s": 100, "time_buckets": 3, "time_scale": "log2", "pos_time": "add"},
    {"pool_softmax": False},
    {"pool_scale": False},
    {"pool_attn": "dot"},
    {"pool_attn": "din"},
    {"pool": "target"},
    {"pool": "mean"},
    {"pool": "sum"},
    {"pool": "concat"},
    {"pool": "concat", "causal": False},
    {"hidden": ()},
]


@pytest.mark.parametrize("history", [True, False], ids=["history", "no history"])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_every_form_is_its_equations_written_as_loops(options, history):
    model: Any = lively("feseq", SCHEMA, **OPTIONS | options)
    if options.get("pool_attn") == "din":  # so that the softmax of its scores is not all or nothing
        for parameter in model.pooling.meeting.parameters():
            parameter.data *= 0.1
    inputs = tensors(example(SCHEMA, 3, 6, history=history))
    if history:
        inputs["hist_mask"][:] = torch.tensor([[False, True, True], [False, False, True], [True, True, True]])

    logits = model(inputs).detach().numpy()

    expected = [Oracle(model, inputs).logit(row) for row in range(6)]
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_one_requests_candidates_are_scored_as_rows_of_their_own(options):
    check_parts(lively("feseq", SCHEMA, **OPTIONS | options), one_request(SCHEMA, 7))


def with_clicks(mask: list[bool]) -> dict[str, torch.Tensor]:
    """One request with clicks where the mask is true, and two candidates."""
    inputs = tensors(example(SCHEMA, 1, 2))
    inputs["hist_mask"][:] = torch.tensor(mask)
    inputs["hist.movie"][:], inputs["hist_age"][:] = torch.tensor([2, 3, 4]), torch.tensor([90_000, 5_000, 60])
    return inputs


def shown(inputs: dict[str, torch.Tensor], **options: Any) -> dict[str, np.ndarray]:
    model = lively("feseq", SCHEMA, **OPTIONS | options)
    _, tensors_shown = explain(model, inputs)
    return {name: tensor.detach().numpy() for name, tensor in tensors_shown.items()}


def test_the_history_is_refined_before_any_candidate_is_known():
    model = lively("feseq", SCHEMA, **OPTIONS)
    inputs = with_clicks([True, True, True])

    state = model.encode_user({name: value for name, value in inputs.items() if not name.startswith("item.")})

    assert torch.equal(model.score(state, model.encode_items(inputs), inputs["user_index"]), model(inputs))


@pytest.mark.parametrize("causal", [True, False])
def test_no_click_sees_a_later_event(causal):
    model: Any = lively("feseq", SCHEMA, **OPTIONS, causal=causal)
    events_1SM = torch.randn(
        1, 4 - causal, model.width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    visible_1SS = model._visible(torch.ones(1, 4 - causal, dtype=torch.bool))
    changed_1SM = events_1SM.clone()
    changed_1SM[0, -1] += 1.0

    before, after = (model.refiner(x, model.refiner.read(x), visible_1SS) for x in (events_1SM, changed_1SM))

    assert torch.equal(before[0, :-1], after[0, :-1]) == causal
    assert not torch.equal(before[0, -1], after[0, -1])


def test_no_click_is_refined_for_a_head_that_reads_the_candidate_alone(monkeypatch):
    inputs = with_clicks([True, True, True])
    attended = {pool: set(shown(inputs, pool=pool)) for pool in ("target", "mean")}
    refined = []
    monkeypatch.setattr(SequenceEncoder, "forward", lambda *_: refined.append("clicks"))

    lively("feseq", SCHEMA, **OPTIONS, pool="target")(inputs)

    assert not refined
    assert attended["mean"] - attended["target"] == {"self_attn"}


@pytest.mark.parametrize("causal", [True, False])
def test_every_event_sees_itself_and_no_padding(causal):
    weights_HSS = shown(with_clicks([False, True, True]), causal=causal)["self_attn"][0]

    np.testing.assert_allclose(weights_HSS.sum(axis=-1), 1.0)
    assert (weights_HSS[:, 1:, 0] == 0).all()
    assert (np.diagonal(weights_HSS, axis1=1, axis2=2) > 0).all()
    assert (np.triu(weights_HSS, 1) == 0).all() == causal
    if causal:
        assert (weights_HSS[:, 0, 0] == 1).all()


@pytest.mark.parametrize("mask", [[True, True, True], [False, True, True], [False, False, False]])
@pytest.mark.parametrize("pool_attn", ["bilinear", "dot", "din"])
def test_the_pooling_weighs_present_events_to_a_sum_of_one(mask, pool_attn):
    alpha_CS = shown(with_clicks(mask), pool_attn=pool_attn)["pool_score"]

    np.testing.assert_allclose(alpha_CS.sum(axis=1), 1.0)
    assert (alpha_CS[:, :3][:, ~np.array(mask)] == 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"pool": "mean"},
        {"pool": "target"},
        {"interaction": "crossnet"},
        {"interaction": "destine"},
    ],
    ids=str,
)
def test_what_is_explained_has_the_axes_that_are_promised(options):
    model = lively("feseq", SCHEMA, **OPTIONS | options)
    inputs = tensors(example(SCHEMA, 2, 5))
    along = {"request": 2, "candidate": 5, "behaviour": 3, "event": 4}

    logits, tensors_shown = explain(model, inputs)

    assert torch.equal(logits, model(inputs))
    for explanation in model.explanations():
        sizes = [len(a.labels) if a.labels is not None else along[str(a.along)] for a in explanation.axes]
        assert list(tensors_shown[explanation.name].shape) == sizes


def test_intervals_are_cut_into_buckets_in_whole_numbers():
    model = lively("feseq", SCHEMA, **OPTIONS | {"time_unit_s": 1000, "time_buckets": 20_002})
    edge = 20_000_000  # in single precision the second before it is the same number

    def logit(age):
        inputs = with_clicks([False, False, True])
        inputs["hist_age"][0, -1] = age
        return model(inputs)[0].item()

    assert logit(edge - 1) == logit(edge - 1000) != logit(edge) == logit(edge + 999)
    assert logit(10 * edge) == logit(edge + 1000) != logit(edge)
    assert logit(0) == logit(999) == logit(-5)


def test_on_a_log2_scale_each_bucket_ends_at_twice_the_age_of_the_one_before():
    model = lively("feseq", SCHEMA, **OPTIONS | {"time_unit_s": 60, "time_buckets": 59, "time_scale": "log2"})

    def logit(age):
        inputs = with_clicks([False, False, True])
        inputs["hist_age"][0, -1] = age
        return model(inputs)[0].item()

    ends = [60 << k for k in range(58)]
    assert all(logit(end - 1) != logit(end) == logit(end + 1) for end in (*ends[:4], *ends[24:30], *ends[-3:]))
    assert logit(-5) == logit(0) == logit(59)
    assert logit(120) == logit(239)
    assert logit(ends[-1]) == logit(2**63 - 1)


def test_log2_buckets_that_no_age_reaches_are_refused():
    with pytest.raises(ValueError, match="time_buckets: expected at most 59 .* time_unit_s 60, where .*, got 60"):
        lively("feseq", SCHEMA, **OPTIONS | {"time_unit_s": 60, "time_buckets": 60, "time_scale": "log2"})


def test_without_a_click_nothing_of_the_history_counts():
    model: Any = lively("feseq", SCHEMA, **OPTIONS)
    inputs = with_clicks([False, False, False])
    littered = inputs | {"hist.movie": inputs["hist.movie"] + 1, "hist_age": inputs["hist_age"] * 7}

    assert torch.equal(model(inputs), model(littered))


@pytest.mark.parametrize("pool", ["attention", "target"])
def test_an_item_field_that_no_click_has_counts_without_a_history_too(pool):
    model = lively("feseq", SCHEMA, **OPTIONS, pool=pool)
    inputs = with_clicks([False, False, False])

    difference = model(inputs | {"item.price": inputs["item.price"] + 1}) - model(inputs)

    assert (difference.abs() > 1e-6).all()


def test_fields_of_the_item_alone_are_enough():
    schema = SchemaSpec(history_length=3, fields=(*ITEM_FIELDS, *SEQUENCES)).fit(COLUMNS)
    inputs = tensors(example(schema, 2, 5))

    logits = lively("feseq", schema, **OPTIONS)(inputs)

    assert logits.shape == (5,)
    assert torch.isfinite(logits).all()


def test_heads_that_do_not_divide_an_event_are_refused_with_what_would():
    message = "an event is 45 wide .9 vectors of 5., which 8 heads do not divide; take 5 heads, or emb_dim 8"
    with pytest.raises(ValueError, match=message):
        zoo.build("feseq", {"emb_dim": 5}, SCHEMA)

    zoo.build("feseq", {"emb_dim": 5, "heads": 5}, SCHEMA)
    zoo.build("feseq", {"emb_dim": 8}, SCHEMA)


def test_a_schema_without_clicks_or_items_is_refused():
    clocks = SchemaSpec(history_length=3, fields=(*REQUEST_FIELDS, HOURS)).fit(COLUMNS)

    with pytest.raises(ValueError, match="past clicks; the schema has no sequence field"):
        zoo.build("feseq", {}, without_history())
    with pytest.raises(ValueError, match="needs an item field; the schema has none"):
        zoo.build("feseq", {}, clocks)


def test_the_penalty_is_on_the_tables_of_input_position_and_time_alone():
    model = lively("feseq", SCHEMA, **OPTIONS, l2_emb=0.1)

    state = model.state_dict()
    tables = [v for name, v in state.items() if name.startswith(("fields.", "places."))]
    assert len(tables) == 8 + 2
    assert model.penalty().item() == pytest.approx(0.1 / 2 * sum(v.square().sum().item() for v in tables))


def test_it_starts_as_the_authors_code_does():
    state = zoo.build("feseq", {"emb_dim": 16, "heads": 4}, SCHEMA).state_dict()

    assert state["places.times"].std().item() == pytest.approx(1.0, rel=0.05)
    assert state["pooling.fields.tables.item_movie.weight"][1:].std().item() == pytest.approx(1.0, rel=0.25)
    assert state["fields.tables.ctx_hour.weight"][1:].std().item() == pytest.approx(1e-4, rel=0.2)
    assert state["refiner.out.weight"].std().item() == pytest.approx(np.sqrt(2 / (144 + 144)), rel=0.05)
    assert torch.equal(state["pooling.kernel"], torch.eye(128))
    assert state["pooling.activation.weight"].tolist() == [pytest.approx(0.1)]
    assert not state["refiner.shown.bias"].any()
