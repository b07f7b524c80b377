"""DIN, DIEN, DMR and BST against their equations, written click by click."""

from typing import Any

import numpy as np
import pytest
import torch

from models import zoo
from models.baselines.din import DINConfig
from models.features.field import FieldSpec
from models.features.schema import SchemaSpec
from tests.models.flat import batch_norm, layer_norm, linear, mlp, sigmoid, softmax, weights
from tests.models.small import COLUMNS, ITEM_FIELDS, REQUEST_FIELDS, lively, tensors, with_history, without_history
from training.export import example, used_inputs

SCHEMA = with_history(3)
OPTIONS: dict[str, Any] = {"emb_dim": 4, "hidden": (6, 5)}
HISTORIES = pytest.mark.parametrize("history", [True, False], ids=["history", "no history"])
AGES = {"age_buckets": 4}
MODELS = ["din", "dien", "dmr", "bst"]


def scored(name: str, options: dict[str, Any], *, history: bool) -> tuple[Any, np.ndarray, list[Any]]:
    """A model, its logits, and per row: request's fields, item's fields, target, clicks, mask, vectors of ages."""
    model: Any = lively(name, SCHEMA, **OPTIONS | options)
    inputs = tensors(example(SCHEMA, 3, 8, history=history))
    if history:
        inputs["hist_mask"][:] = torch.tensor([[False, True, True], [False, False, True], [True, True, True]])
        inputs["hist_age"][:] = torch.tensor([[0, 7, 1], [0, 0, 0], [1_800_000_000, 4, 3]])
    logits = model(inputs).detach().numpy()
    assert np.std(logits) > 1e-3
    fields = model.fields
    request = fields.request(inputs).flatten(1).detach().numpy()
    items = fields.item(inputs).detach().numpy()
    clicks = fields.history(inputs).flatten(2).detach().numpy()
    mask = inputs["hist_mask"].numpy()
    ages = np.zeros_like(clicks)
    if model.config.age_buckets:
        # An age of n binary digits is at least n of the ends 1, 2, 4, ...
        digits = [[int(age).bit_length() for age in of_user] for of_user in inputs["hist_age"]]
        ages = weights(model)["ages.table"][np.minimum(digits, model.config.age_buckets - 1)]
    rows = []
    for c, u in enumerate(inputs["user_index"].tolist()):
        target = items[c, :2].flatten()  # movie and genres, which the sequences are of
        rows.append((request[u], items[c].flatten(), target, clicks[u], mask[u], ages[u]))
    return model, logits, rows


@HISTORIES
@pytest.mark.parametrize(
    "options",
    [
        {},
        AGES,
        {"attention_softmax": True},
        {"attention_activation": "relu", "attention_hidden": (5,)},
        {"batch_norm": True, "dropout": 0.4},
        {"hidden": ()},
    ],
    ids=str,
)
def test_din_weights_each_click_by_how_it_meets_the_candidate(options, history):
    model, logits, rows = scored("din", {"attention_hidden": (5, 3)} | options, history=history)

    c, p = model.config, weights(model)

    def activation(name, x):
        if c.attention_activation == "relu":
            return np.maximum(x, 0)
        share = sigmoid(batch_norm(p, f"{name}.norm", x, eps=1e-9))
        return share * x + (1 - share) * p[f"{name}.alpha"] * x

    def weight(e_i, e_t):
        x = linear(p, "attention.first", np.concatenate([e_i, e_t, e_i - e_t, e_i * e_t]))
        for layer in range(len(c.attention_hidden)):
            x = linear(p, f"attention.rest.{2 * layer + 1}", activation(f"attention.rest.{2 * layer}", x))
        return x[0]

    expected = []
    for request, item, target, clicks, mask, ages in rows:
        present = [clicks[t] + ages[t] for t in range(len(clicks)) if mask[t]]
        a = np.array([weight(target, e_t) for e_t in present])
        if c.attention_softmax and present:
            a = softmax(a)
        interest = sum((a[t] * e_t for t, e_t in enumerate(present)), np.zeros_like(target))
        expected.append(mlp(p, "mlp", np.concatenate([request, item, interest]), c))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


@HISTORIES
@pytest.mark.parametrize("options", [{}, AGES, {"batch_norm": True, "dropout": 0.4}, {"hidden": ()}], ids=str)
def test_dien_is_a_gru_and_then_one_whose_update_gate_is_attention(options, history):
    model, logits, rows = scored("dien", options, history=history)

    p = weights(model)

    def step(name, h, x, attention):
        width = len(h)
        w, v, b = p[f"{name}.input.weight"], p[f"{name}.state.weight"], p[f"{name}.input.bias"]
        update, reset, fresh = (slice(k * width, (k + 1) * width) for k in range(3))
        u = attention * sigmoid(w[update] @ x + b[update] + v[update] @ h)
        r = sigmoid(w[reset] @ x + b[reset] + v[reset] @ h)
        return (1 - u) * h + u * np.tanh(w[fresh] @ x + b[fresh] + r * (v[fresh] @ h))

    expected = []
    for request, item, target, clicks, mask, ages in rows:
        h, interests = np.zeros_like(target), []
        for t in range(len(clicks)):
            if mask[t]:
                h = step("extraction", h, clicks[t] + ages[t], 1.0)
                interests.append(h)
        scores = np.array([interest @ p["relevance.weight"].T @ target for interest in interests])
        alpha = softmax(scores) if interests else scores
        h = np.zeros_like(target)
        for t, interest in enumerate(interests):
            h = step("evolution", h, interest, alpha[t])
        expected.append(mlp(p, "mlp", np.concatenate([request, item, h]), model.config))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


@HISTORIES
@pytest.mark.parametrize("options", [{}, AGES, {"attention_dim": 2, "dropout": 0.4}, {"hidden": ()}], ids=str)
def test_dmr_reads_both_relevances_and_what_its_attention_finds(options, history):
    model, logits, rows = scored("dmr", {"attention_dim": 5} | options, history=history)

    p = weights(model)
    inputs = tensors(example(SCHEMA, 3, 8, history=history))
    outputs = model.output_fields.item(inputs).flatten(1).detach().numpy()

    expected = []
    for (request, item, target, clicks, mask, ages), output in zip(rows, outputs, strict=True):
        present = np.flatnonzero(mask)
        placed = [np.concatenate([p["positions"][t] + ages[t], clicks[t]]) for t in present]
        user_scores = np.array([linear(p, "user_score", np.tanh(linear(p, "user_read", x)))[0] for x in placed])
        met = [np.tanh(linear(p, "item_read", x) + linear(p, "item_target", target)) for x in placed]
        item_scores = np.array([linear(p, "item_score", x)[0] for x in met])
        pooled, found = np.zeros_like(target), np.zeros_like(target)
        if len(present):
            pooled = sum(a * clicks[t] for a, t in zip(softmax(user_scores), present, strict=True))
            found = sum(a * clicks[t] for a, t in zip(softmax(item_scores), present, strict=True))
        user = linear(p, "user_out.0", pooled)
        user = np.where(user > 0, user, p["user_out.1.weight"] * user)
        relevances = [user @ output, sum(item_scores)]
        expected.append(mlp(p, "mlp", np.concatenate([request, item, found, relevances]), model.config))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


@HISTORIES
@pytest.mark.parametrize("options", [{}, AGES, {"blocks": 2, "heads": 4}, {"ffn_mult": 1, "dropout": 0.4}], ids=str)
def test_bst_is_a_transformer_over_the_clicks_and_the_candidate(options, history):
    model, logits, rows = scored("bst", {"heads": 2} | options, history=history)

    c, p = model.config, weights(model)

    def attend(name, x):
        q, k, v = (linear(p, f"{name}.{part}", x) for part in ("query", "key", "value"))
        width = x.shape[1] // c.heads
        out = np.zeros_like(x)
        for i in range(len(x)):
            for h in range(c.heads):
                part = slice(h * width, (h + 1) * width)
                alpha = softmax(np.array([q[i, part] @ k[j, part] for j in range(len(x))]) / np.sqrt(width))
                out[i, part] = sum(alpha[j] * v[j, part] for j in range(len(x)))
        return linear(p, f"{name}.out", out)

    def block(name, x):
        y = layer_norm(p, f"{name}.norms.0", x + attend(f"{name}.attention", x))
        inner = linear(p, f"{name}.ffn.0", y)
        inner = np.where(inner > 0, inner, 0.01 * inner)
        return layer_norm(p, f"{name}.norms.1", y + linear(p, f"{name}.ffn.2", inner))

    expected = []
    for request, item, target, clicks, mask, ages in rows:
        present = [*np.flatnonzero(mask), len(clicks)]  # the candidate stands last, and has just come
        places = np.concatenate([ages, p["ages.table"][:1]]) if c.age_buckets else p["positions"]
        x = (np.concatenate([clicks, target[None]]) + places)[present]
        for layer in range(c.blocks):
            x = block(f"blocks.{layer}", x)
        outputs = np.zeros((len(clicks) + 1, len(target)))
        outputs[present] = x
        expected.append(mlp(p, "mlp", np.concatenate([request, item, outputs.flatten()]), c))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("softmax_too", [False, True])
def test_din_gives_padding_no_weight(softmax_too):
    attention: Any = lively("din", SCHEMA, **OPTIONS, attention_softmax=softmax_too).attention
    target, clicks = torch.ones(1, 8).double(), torch.ones(1, 3, 8).double()

    weight = attention(target, clicks, attention.read(clicks), torch.tensor([[False, True, False]]))

    assert (weight != 0).tolist() == [[False, True, False]]


@pytest.mark.parametrize("name", MODELS)
def test_the_order_of_clicks_matters_to_all_but_din(name):
    model = lively(name, SCHEMA, **OPTIONS)
    inputs = tensors(example(SCHEMA, 1, 5))
    inputs["hist_mask"][:] = True
    inputs["hist.movie"][:] = torch.tensor([1, 2, 3])
    backwards = inputs | {n: v.flip(1) for n, v in inputs.items() if n.startswith("hist.")}

    difference = (model(inputs) - model(backwards)).abs().max().item()

    assert (difference > 1e-6) == (name != "din")


@pytest.mark.parametrize("name", MODELS)
def test_ages_are_read_only_where_they_are_asked_for(name):
    def reads(**options):
        return "hist_age" in {i.name for i in used_inputs(lively(name, SCHEMA, **OPTIONS | options), SCHEMA)}

    assert (reads(), reads(**AGES)) == (False, True)


@pytest.mark.parametrize("name", MODELS)
def test_a_schema_without_clicks_is_refused(name):
    with pytest.raises(ValueError, match=f"{name.upper()} compares .* past clicks; the schema has no sequence field"):
        zoo.build(name, {}, without_history())


@pytest.mark.parametrize("name", MODELS)
def test_clicks_that_pair_with_no_item_field_are_refused(name):
    hours = FieldSpec(name="hour", kind="sequence", group="behaviour", of="hour")
    schema = SchemaSpec(history_length=3, fields=(*REQUEST_FIELDS, *ITEM_FIELDS, hours)).fit(COLUMNS)

    with pytest.raises(ValueError, match="sequence hour is of hour, which is no item field"):
        zoo.build(name, {}, schema)


def test_heads_that_do_not_divide_a_click_are_refused():
    with pytest.raises(ValueError, match="a click is 8 wide .2 sequence fields of 4., which 3 heads do not divide"):
        zoo.build("bst", {"emb_dim": 4, "heads": 3}, SCHEMA)


def test_din_without_an_attention_layer_is_refused():
    with pytest.raises(ValueError, match="option attention_hidden: expected at least one layer, got none"):
        DINConfig(attention_hidden=())
