"""What models show of themselves: it sums to what it says, has the axes it declares, and changes no score."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models import zoo
from models.artifact.explanation import BEHAVIOUR, CANDIDATE, Axis, Explanation, worded
from models.layers import base, intermediates
from models.layers.base import CTRModel, explain
from models.layers.embeddings import FieldEmbeddings
from models.layers.intermediates import record
from tests.models.small import lively, one_request, rows_of, tensors, with_history
from training.export import example

SCHEMA = with_history()
NUM_FIELDS = 8
U, C, T = 2, 5, SCHEMA.history_length
FORMS: dict[str, dict[str, Any]] = {
    "mian": {"emb_dim": 4, "heads": 2},
    "mian with other scorers": {"emb_dim": 4, "heads": 2, "ibim_scorer": "bilinear", "gim_combine": "concat"},
    "mian without half": {"emb_dim": 4, "iuim": False, "transformer": "none", "gim": False},
    "stec": {"emb_dim": 4},
    "stec, all pairs, added": {"emb_dim": 4, "pairs": "all", "fusion": "add", "blocks": 1},
    "stec, sums, last": {"emb_dim": 4, "interaction": "scalar", "fusion": "last", "bilinear": "explicit"},
    "stec with an MLP": {"emb_dim": 4, "hidden": [8]},
    "stec, request first": {"emb_dim": 4, "field_mask": "user_first"},
    "dynint": {"emb_dim": 4, "subspaces": 2, "mode": "dgp", "kernel_size": 3},
    "dynint dwp": {"emb_dim": 4, "subspaces": 2, "mode": "dwp", "residual": False},
    "dynint da": {"emb_dim": 4, "subspaces": 2, "mode": "da", "gate_scope": "request"},
    "dynint da by row": {"emb_dim": 4, "subspaces": 2, "mode": "da", "da_gate": "row"},
    "dynint pin": {"emb_dim": 4, "subspaces": 2, "mode": "pin"},
    "dynint without layers": {"emb_dim": 4, "layers": 0},
    "deepmr": {"emb_dim": 4},
    "deepmr, causal": {"emb_dim": 4, "field_mask": "causal", "sa_blocks": 2, "sa_rezero": "add", "readout": "linear"},
    "deepmr, one branch": {"emb_dim": 4, "branches": "sa", "sa_rezero": "none", "beta_learned": True},
    "lr": {},
    "lr with history": {"use_history": True},
    "autoint": {"emb_dim": 4, "attention_dim": 6},
    "din": {"emb_dim": 4, "hidden": [8]},
    "dien": {"emb_dim": 4, "hidden": [8]},
    "bst": {"emb_dim": 4, "hidden": [8]},
    "feseq": {"emb_dim": 4, "heads": 4, "hidden": [8], "pool_width": 6},
}


def built(form: str) -> CTRModel:
    return lively(form.partition(" ")[0].rstrip(","), SCHEMA, **FORMS[form])


def shown_by(model: CTRModel, arrays: Any) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.no_grad():
        return explain(model, tensors(arrays))


def explained(form: str) -> tuple[dict[str, Tensor], Tensor]:
    """What a form shows of two requests with five candidates, and the logits."""
    logit, shown = shown_by(built(form), example(SCHEMA, U, C))
    return shown, logit


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_has_the_axes_it_declares_and_no_score_changes(form: str) -> None:
    model, arrays = built(form), example(SCHEMA, U, C)
    sizes = {"request": U, "candidate": C, "behaviour": T, "event": T + 1}

    logit, shown = shown_by(model, arrays)

    with torch.no_grad():
        assert torch.equal(logit, model(tensors(arrays)))
    assert list(shown) == [e.name for e in model.explanations()] != []
    for e in model.explanations():
        wanted = [len(axis.labels) if axis.labels is not None else sizes[str(axis.along)] for axis in e.axes]
        assert list(shown[e.name].shape) == wanted, e.name
        assert e.meaning.endswith(".")


@pytest.mark.parametrize("form", FORMS)
def test_a_candidate_is_explained_alike_alone_and_among_others(form: str) -> None:
    model, arrays = built(form), one_request(SCHEMA, 3)

    _, together = shown_by(model, arrays)
    _, apart = shown_by(model, rows_of(arrays))

    for e in model.explanations():
        whole = together[e.name].expand(3, *together[e.name].shape[1:]) if _of_request(e) else together[e.name]
        torch.testing.assert_close(whole, apart[e.name], rtol=1e-9, atol=1e-9)


def _of_request(e: Explanation) -> bool:
    return bool(e.axes) and e.axes[0].along == "request"


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith(("stec", "deepmr", "autoint"))])
def test_each_field_shares_out_all_of_its_attention(form: str) -> None:
    shown, _ = explained(form)

    if "field_attn" in shown:
        torch.testing.assert_close(shown["field_attn"].sum(dim=-1), torch.ones_like(shown["field_attn"][..., 0]))


@pytest.mark.parametrize("form", ["stec", "stec, all pairs, added", "stec, sums, last", "stec, request first"])
def test_the_pairs_add_up_to_the_logit(form: str) -> None:
    shown, logit = explained(form)

    torch.testing.assert_close(shown["pair_contrib"].sum(dim=(1, 2)) + shown["bias"], logit, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("dynint")])
def test_the_fields_add_up_to_the_logit(form: str) -> None:
    shown, logit = explained(form)

    torch.testing.assert_close(shown["field_contrib"].sum(dim=1) + shown["bias"], logit, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("deepmr")])
def test_the_branches_add_up_to_the_logit(form: str) -> None:
    shown, logit = explained(form)

    torch.testing.assert_close(shown["branch_logit"].sum(dim=1) + shown.get("bias", 0.0), logit, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["lr", "lr with history"])
def test_the_weights_of_a_regression_add_up_to_the_logit(form: str) -> None:
    shown, logit = explained(form)

    of_request = shown["request_contrib"].sum(dim=1)[torch.from_numpy(example(SCHEMA, U, C)["user_index"])]
    torch.testing.assert_close(of_request + shown["item_contrib"].sum(dim=1) + shown["bias"], logit)


def test_what_a_pair_adds_is_all_that_its_weights_change() -> None:
    """By hand: without the head's weights of one pair at one level the logit is less by that contribution."""
    model = built("stec")
    arrays = example(SCHEMA, U, C)
    _, shown = shown_by(model, arrays)
    pair, level, num_pairs = 11, 1, NUM_FIELDS * (NUM_FIELDS - 1) // 2

    weight = model.get_parameter("head.first.weight")
    before, _ = shown_by(model, arrays)
    weight.data[0].view(3, num_pairs, 4)[level, pair] = 0
    after, _ = shown_by(model, arrays)

    torch.testing.assert_close(before - after, shown["pair_contrib"][:, level, pair])


def test_mian_shares_out_one_or_where_there_is_nothing_none() -> None:
    model = built("mian")
    for history, sum_of_clicks in ((True, 1.0), (False, 0.0)):
        arrays = one_request(SCHEMA, 3, history=history)
        _, shown = shown_by(model, arrays)

        np.testing.assert_allclose(shown["alpha_behaviour"].sum(dim=1), [sum_of_clicks] * 3)
        assert (shown["alpha_behaviour"][:, ~arrays["hist_mask"][0]] == 0).all()
        for name in ("alpha_user", "alpha_context", "gim_weight"):
            np.testing.assert_allclose(shown[name].sum(dim=1), np.ones(3))
        np.testing.assert_allclose(shown["self_attn"].sum(dim=-1), arrays["hist_mask"][:, None].repeat(2, axis=1))
        assert (shown["self_attn"][..., ~arrays["hist_mask"][0]] == 0).all()


def test_a_click_that_is_made_to_be_attended_is_the_one_that_stands_out() -> None:
    """Of clicks on 2, 3 and 4 the scorer reads a number that only item 3's vector has."""
    model = lively("mian", SCHEMA, emb_dim=4, heads=2, transformer="none", ibim_score="shared")
    table = model.get_parameter("fields.tables.item_movie.weight")
    table.data[:, 0] = 0.0
    table.data[3, 0] = 5.0
    kernel = model.get_parameter("local.ibim.kernel.weight")
    kernel.data.zero_()
    kernel.data[:, 3 * 4] = 5.0  # the first number of a click, after the candidate's three fields
    model.get_parameter("local.ibim.kernel.bias").data.zero_()
    arrays = one_request(SCHEMA, 2)
    arrays["hist.movie"][:] = [[0, 2, 3, 4]]

    _, shown = shown_by(model, arrays)
    told = worded(
        model.explanations()[0],
        shown["alpha_behaviour"].numpy(),
        request="r",
        candidates=["a", "b"],
        behaviours=["two", "three", "four"],
    )

    weights = dict(zip(told["axes"][1]["labels"], told["values"][0], strict=True))
    by_hand = np.exp([0.0, 1.0, 0.0]) / np.exp([0.0, 1.0, 0.0]).sum()
    np.testing.assert_allclose([weights[name] for name in ("two", "three", "four")], by_hand, rtol=1e-6)


@pytest.mark.parametrize(("mode", "options"), [("dgp", {"kernel_size": 3}), ("dwp", {}), ("pin", {})])
def test_the_effective_weights_are_those_that_map_the_input(mode: str, options: dict[str, Any]) -> None:
    model = lively("dynint", SCHEMA, emb_dim=4, subspaces=1, layers=1, mode=mode, **options)
    arrays = example(SCHEMA, 1, 3)
    logit, shown = shown_by(model, arrays)
    with torch.no_grad():
        inputs = tensors(arrays)
        fields = model.get_submodule("fields")
        assert isinstance(fields, FieldEmbeddings)
        x_CFD = torch.cat([fields.request(inputs).expand(3, -1, -1), fields.item(inputs)], dim=1)

    weight = shown["effective_weight"][:, 0] if mode != "pin" else shown["effective_weight"]
    last_CFD = x_CFD * (1 + weight @ x_CFD)

    by_hand = (last_CFD.sum(dim=-1) * model.get_parameter("out.weight").detach()).sum(dim=1) + shown["bias"]
    torch.testing.assert_close(logit, by_hand, rtol=1e-9, atol=1e-9)


def test_causal_attention_is_lower_triangular_and_request_first_blocks_one_corner() -> None:
    causal, _ = explained("deepmr, causal")
    first, _ = explained("stec, request first")

    assert (causal["field_attn"].triu(diagonal=1) == 0).all()
    assert (first["field_attn"][..., :5, 5:] == 0).all()
    assert (first["field_attn"][..., 5:, :5] > 0).all()


@pytest.mark.parametrize("name", zoo.MODELS)
def test_nothing_is_recorded_unless_asked_and_nothing_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(base, "recording", lambda: called.append(1))
    model = lively(name, SCHEMA, **next((FORMS[f] for f in FORMS if f.split(" ")[0] == name), {}))

    record("anything", lambda: pytest.fail("nobody records"))
    with torch.no_grad():
        model(tensors(example(SCHEMA, U, C)))

    assert not intermediates.is_recording()
    assert called == []


def test_an_explanation_that_fails_leaves_nothing_recorded() -> None:
    class Fails(torch.nn.Module):
        def forward(self, _: Any) -> Tensor:
            record("half", torch.zeros(1))
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        explain(Fails(), {})  # type: ignore[arg-type]

    assert not intermediates.is_recording()


def test_values_are_told_with_the_digits_they_have() -> None:
    shown = Explanation(name="x", axes=(CANDIDATE,), meaning="")
    values = np.array([0.1, 1 / 3, -1234567.8, 0.0, 3e-12, 5e12], dtype=np.float32)

    told = worded(shown, values, request="r", candidates=list("abcdef"), behaviours=[])

    assert told["values"].tolist() == [0.1, 0.3333333, -1234568.0, 0.0, 3e-12, 5e12]


def test_an_axis_is_labelled_from_one_place_only() -> None:
    with pytest.raises(ValueError, match="axis both"):
        Axis(name="both", along="candidate", labels=("a",))
    with pytest.raises(ValueError, match="axis neither"):
        Axis(name="neither")
    assert BEHAVIOUR.labels is None


def test_feseqs_rows_share_out_all_of_their_attention() -> None:
    shown, _ = explained("feseq")

    for name in (
        "interact_attn_history",
        "interact_attn_candidate",
        "interact_attn_query",
        "self_attn",
        "refiner_attn",
    ):
        torch.testing.assert_close(shown[name].sum(dim=-1), torch.ones_like(shown[name][..., 0]), msg=name)


def test_feseqs_first_head_is_shown_first() -> None:
    """Without a query it looks at all events alike; the others do not."""
    model = built("feseq")
    width = model.get_parameter("refiner.query.weight").shape[0] // 4
    for part in ("weight", "bias"):
        model.get_parameter(f"refiner.query.{part}").data[:width] = 0
    arrays = one_request(SCHEMA, 3)
    arrays["hist_mask"][:] = True

    _, shown = shown_by(model, arrays)

    first, *others = shown["refiner_attn"].unbind(dim=1)
    torch.testing.assert_close(first, torch.full_like(first, 1 / (T + 1)))
    assert all((head - 1 / (T + 1)).abs().max() > 1e-3 for head in others)


def test_deepmrs_branches_are_attention_first() -> None:
    model, arrays = built("deepmr"), example(SCHEMA, U, C)

    _, before = shown_by(model, arrays)
    model.get_parameter("attention.blocks.0.ffn.3.bias").data += 1
    _, after = shown_by(model, arrays)

    assert (after["branch_logit"][:, 0] != before["branch_logit"][:, 0]).all()
    assert torch.equal(after["branch_logit"][:, 1], before["branch_logit"][:, 1])


@pytest.mark.parametrize(
    ("form", "name", "neutral"),
    [
        ("dynint", "sigma", 1.0),
        ("dynint da", "gate", 1.0),
        ("dynint dwp", "u", 0.5**0.5),
        ("dynint dwp", "v", 0.5**0.5),
    ],
)
def test_dynints_gates_that_say_nothing_are_shown_as_neutral(form: str, name: str, neutral: float) -> None:
    model = built(form)
    for part in ("gate.excite_LHO", "gate.excite_bias_LO"):
        model.get_parameter(part).data.zero_()

    _, shown = shown_by(model, example(SCHEMA, U, C))

    torch.testing.assert_close(shown[name], torch.full_like(shown[name], neutral))


def test_dwps_left_vectors_are_shown_as_u() -> None:
    model = built("dynint dwp")
    model.get_parameter("gate.excite_LHO").data.zero_()
    bias_LO = model.get_parameter("gate.excite_bias_LO").data.zero_()
    bias_LO[:, : bias_LO.shape[1] // 2] = 5.0

    _, shown = shown_by(model, example(SCHEMA, U, C))

    assert (shown["u"] > 5).all()
    assert (shown["v"] < 1).all()
