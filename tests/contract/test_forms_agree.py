"""One model, two uses: what it learns from rows of training is what it answers to a request."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example as case
from hypothesis import given, settings
from hypothesis import strategies as st

from models import zoo
from models.features.arrays import concat
from tests.models.halves import check_parts
from tests.models.small import encoded, lively, one_request, rows_of, tensors, with_history, without_history
from training.export import example

SCHEMA = with_history()
FESEQ: dict[str, Any] = {"emb_dim": 4, "heads": 4, "hidden": (8, 6), "pool_width": 6, "time_buckets": 10_000}
MODELS = {
    "mian": lively("mian", SCHEMA, emb_dim=4, heads=2),
    "mian with every alternative": lively(
        "mian", SCHEMA, emb_dim=4, heads=2, position="learned", ibim_scorer="bilinear", gim_combine="concat"
    ),
    "mian with crosses": lively("mian", SCHEMA, emb_dim=4, heads=2, cross_layers=2),
    "stec": lively("stec", SCHEMA, emb_dim=4),
    "stec without a block": lively("stec", SCHEMA, emb_dim=4, blocks=0, bilinear_form="qk"),
    "stec user_first": lively("stec", SCHEMA, emb_dim=4, field_mask="user_first", hidden=(6,), batch_norm=True),
    "dynint with dgp by request": lively("dynint", SCHEMA, emb_dim=4, subspaces=2, kernel_size=5, gate_scope="request"),
    "dynint with dwp by request": lively("dynint", SCHEMA, emb_dim=4, subspaces=2, mode="dwp", gate_scope="request"),
    "dynint with dgp": lively("dynint", SCHEMA, emb_dim=4, subspaces=2, kernel_size=5),
    "dynint with pin": lively("dynint", SCHEMA, mode="pin", emb_dim=4, subspaces=2),
    "dynint with da": lively("dynint", SCHEMA, mode="da", emb_dim=4, subspaces=2, gate_scope="request"),
    "dynint with dwp": lively("dynint", SCHEMA, mode="dwp", emb_dim=4, subspaces=2, residual=False),
    "deepmr": lively("deepmr", SCHEMA, emb_dim=4),
    "deepmr causal": lively("deepmr", SCHEMA, emb_dim=4, sa_blocks=2, alpha_init=0.1, field_mask="causal"),
    "deepmr user_first": lively("deepmr", SCHEMA, emb_dim=4, field_mask="user_first", sa_readout="mean"),
    "feseq": lively("feseq", SCHEMA, **FESEQ),
    "feseq with target in the history": lively("feseq", SCHEMA, **FESEQ, causal=False),
    "feseq as the paper writes it": lively(
        "feseq", SCHEMA, **FESEQ, pos_time="add", pool_softmax=False, pool_scale=False
    ),
    "feseq without requests in events": lively(
        "feseq", SCHEMA, **FESEQ, nonseq_in_interaction=False, interact_ln=False
    ),
    "feseq without places": lively("feseq", SCHEMA, **FESEQ, use_pos=False, use_time=False),
    "feseq without interaction": lively("feseq", SCHEMA, **FESEQ, interact_layers_in=0, interact_layers_item=0),
    "feseq with dot": lively("feseq", SCHEMA, **FESEQ, pool_attn="dot", use_pos=False),
    "feseq with din": lively("feseq", SCHEMA, **FESEQ, pool_attn="din", use_time=False),
    "feseq with target pooling": lively("feseq", SCHEMA, **FESEQ, pool="target"),
    "feseq with ages on a log2 scale": lively(
        "feseq", SCHEMA, **FESEQ | {"time_buckets": 28, "time_unit_s": 1}, time_scale="log2"
    ),
    "feseq with mean pooling": lively("feseq", SCHEMA, **FESEQ, pool="mean"),
    "feseq with destine": lively("feseq", SCHEMA, **FESEQ, interaction="destine"),
    "feseq with final": lively("feseq", SCHEMA, **FESEQ, interaction="final"),
    "feseq with sum pooling": lively("feseq", SCHEMA, **FESEQ, pool="sum", interaction="crossnet"),
    "feseq with concat pooling": lively("feseq", SCHEMA, **FESEQ, pool="concat", interaction="crossnetv2"),
    "feseq with both": lively("feseq", SCHEMA, **FESEQ, pool="concat", causal=False),
    "deepfm": lively("deepfm", SCHEMA, emb_dim=4, hidden=(8,), batch_norm=True),
    "lr": lively("lr", SCHEMA, use_history=True),
    "fm": lively("fm", SCHEMA, emb_dim=4),
    "widedeep": lively("widedeep", SCHEMA, emb_dim=4, hidden=(8,), batch_norm=True),
    "dcn": lively("dcn", SCHEMA, emb_dim=4, hidden=(8,), batch_norm=True),
    "dcnv2": lively("dcnv2", SCHEMA, emb_dim=4, hidden=(8,), batch_norm=True),
    "dcnv2 stacked and low-rank": lively("dcnv2", SCHEMA, emb_dim=4, hidden=(8,), structure="stacked", rank=2),
    "xdeepfm": lively("xdeepfm", SCHEMA, emb_dim=4, hidden=(8,), cin=(5, 3)),
    "autoint": lively("autoint", SCHEMA, emb_dim=4, attention_dim=6),
    "autoint with an MLP": lively("autoint", SCHEMA, emb_dim=4, attention_dim=6, hidden=(8,), layer_norm=True),
    "finalmlp": lively("finalmlp", SCHEMA, emb_dim=4, hidden_1=(8,), hidden_2=(6,), heads=2, gate_hidden=(5,)),
    "finalmlp with contexts": lively("finalmlp", SCHEMA, emb_dim=4, hidden_1=(8,), gate_1="user", gate_2="item"),
    "din": lively("din", SCHEMA, emb_dim=4, hidden=(8,)),
    "din with softmax": lively("din", SCHEMA, emb_dim=4, hidden=(8,), attention_softmax=True),
    "dien": lively("dien", SCHEMA, emb_dim=4, hidden=(8,)),
    "dmr": lively("dmr", SCHEMA, emb_dim=4, hidden=(8,)),
    "bst": lively("bst", SCHEMA, emb_dim=4, hidden=(8,), blocks=2),
    "din with ages": lively("din", SCHEMA, emb_dim=4, hidden=(8,), age_buckets=9),
    "dien with ages": lively("dien", SCHEMA, emb_dim=4, hidden=(8,), age_buckets=9),
    "dmr with ages": lively("dmr", SCHEMA, emb_dim=4, hidden=(8,), age_buckets=9),
    "bst with ages": lively("bst", SCHEMA, emb_dim=4, hidden=(8,), age_buckets=9),
}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def logits_of(model, arrays):
    with torch.no_grad():
        return model(tensors(arrays)).numpy()


def assert_equal(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def test_every_model_is_held_to_these_laws():
    assert {name.split()[0] for name in MODELS} == set(zoo.MODELS)


@every_model
@pytest.mark.parametrize("history", [True, False], ids=["history", "no history"])
def test_the_row_form_equals_the_request_form(model, history):
    request = one_request(SCHEMA, 50, history=history)

    logits = logits_of(model, request)

    assert np.std(logits) > 1e-3
    assert_equal(logits_of(model, rows_of(request)), logits)


@every_model
@pytest.mark.parametrize("history", [True, False], ids=["history", "no history"])
def test_the_form_of_one_request_equals_the_row_form(model, history):
    check_parts(model, one_request(SCHEMA, 20, history=history))


@every_model
@settings(max_examples=5, deadline=None)
@case(cuts=[1, 6, 6], seed=0)
@given(cuts=st.lists(st.integers(0, 12), max_size=4).map(sorted), seed=st.integers(0, 2**32 - 1))
def test_item_rows_made_in_other_batches_give_the_same_scores(model, cuts, seed):
    inputs = tensors(example(SCHEMA, 3, 12))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(12))
    shuffled = {n: v[order] if n.startswith("item.") or n == "user_index" else v for n, v in inputs.items()}
    parts = [
        {n: v[first:last] if n.startswith("item.") or n == "user_index" else v for n, v in shuffled.items()}
        for first, last in pairwise([0, *cuts, 12])
        if first < last
    ]

    with torch.no_grad():
        kept = torch.cat([model.encode_items(part) for part in parts])[order.argsort()]
        logits = model.score(model.encode_user(inputs), kept, inputs["user_index"])
        fresh = model(inputs)

    assert_equal(logits, fresh)


@every_model
@settings(max_examples=6, deadline=None)
@case(num_requests=1, num_candidates=1)
@case(num_requests=4, num_candidates=2)  # more requests than candidates
@given(num_requests=st.integers(1, 4), num_candidates=st.integers(1, 12))
def test_requests_in_one_call_answer_as_their_rows_do(model, num_requests, num_candidates):
    arrays = example(SCHEMA, num_requests, num_candidates)

    assert_equal(logits_of(model, arrays), logits_of(model, rows_of(arrays)))


@every_model
def test_one_call_for_n_candidates_equals_n_calls_for_one(model):
    request = one_request(SCHEMA, 20)
    own = ("item.", "user_index")
    alone = [{k: v[c : c + 1] if k.startswith(own) else v for k, v in request.items()} for c in range(20)]

    assert_equal(np.concatenate([logits_of(model, one) for one in alone]), logits_of(model, request))


@every_model
def test_requests_joined_in_one_batch_do_not_influence_each_other(model):
    first, second = one_request(SCHEMA, 3), one_request(SCHEMA, 5, history=False)

    together = logits_of(model, concat([first, second]))

    assert_equal(together, np.concatenate([logits_of(model, first), logits_of(model, second)]))


@every_model
def test_permuting_the_candidates_permutes_the_logits(model):
    arrays = example(SCHEMA, 3, 20)
    order = np.random.default_rng(0).permutation(20)
    own = ("item.", "user_index")

    permuted = logits_of(model, {k: v[order] if k.startswith(own) else v for k, v in arrays.items()})

    assert_equal(permuted, logits_of(model, arrays)[order])


@every_model
def test_padding_does_not_change_the_score(model):
    request = one_request(SCHEMA, 5)
    littered = {name: array.copy() for name, array in request.items()}
    littered["hist.movie"][~request["hist_mask"]] = 5
    littered["hist.genres"][~request["hist_mask"]] = 3
    littered["hist_age"][~request["hist_mask"]] = 9

    assert_equal(logits_of(model, littered), logits_of(model, request))


@every_model
def test_the_history_matters_where_the_model_reads_it(model):
    request = one_request(SCHEMA, 5)
    other = {**request, "hist.movie": np.full_like(request["hist.movie"], 5)}

    changed = np.abs(logits_of(model, other) - logits_of(model, request)).max()

    name = next(name for name, known in MODELS.items() if known is model)
    assert (changed > 1e-6) == (name.split()[0] not in {"stec", "dynint", "deepmr"})


@every_model
def test_awkward_values_and_empty_histories_score_finite(model):
    arrays = encoded(SCHEMA)

    logits = logits_of(model, arrays)

    assert logits.shape == (7,)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    "name", [n for n in zoo.MODELS if n not in {"din", "dien", "dmr", "bst", "feseq"}]
)  # which refuse such a schema
def test_the_forms_agree_without_a_history_in_the_schema(name):
    schema = without_history()
    model = lively(name, schema, **({"ibim": False} if name == "mian" else {}))
    request = one_request(schema, 10)

    assert_equal(logits_of(model, rows_of(request)), logits_of(model, request))


@pytest.mark.parametrize("name", zoo.MODELS)
def test_an_empty_history_gives_finite_gradients(name):
    model = lively(name, SCHEMA, **({"emb_dim": 4, "heads": 2} if name == "mian" else {}))

    model(tensors(example(SCHEMA, 2, 4, history=False))).sum().backward()

    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
