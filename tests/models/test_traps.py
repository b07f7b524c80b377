"""The traps of models.md section 11. Each law is written once, holds for the models, and catches the classic mistake.

What must fail has exactly one thing wrong. Laws of all models are held to each in contract/test_forms_agree.py.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models import zoo
from models.features.arrays import Arrays
from models.layers import attention
from models.layers.attention import masked_softmax
from models.layers.base import CTRModel
from models.layers.embeddings import FieldEmbeddings
from tests.models.small import lively, one_request, rows_of, tensors, without_history
from tests.models.traps import SCHEMA, assert_equal, caught, logits_of
from training.config import Run
from training.export import example, used_inputs
from training.fit import optimizers
from training.fit.optimizers import FTRL

READERS = [
    n for n in zoo.MODELS if "hist_mask" in [i.name for i in used_inputs(zoo.build(n, {}, SCHEMA).eval(), SCHEMA)]
]


def only(arrays: Arrays, rows: Any) -> Arrays:
    """The request's or requests' arrays with these candidates."""
    return {n: a[rows] if n.startswith("item.") or n == "user_index" else a for n, a in arrays.items()}


class Changed(CTRModel):
    """A model with one thing wrong: what it is given, what it knows of the requests, or what it answers."""

    def __init__(
        self,
        model: CTRModel,
        *,
        given: Callable[[Any], Any] = lambda inputs: inputs,
        state: Callable[[Any], Any] = lambda state: state,
        logits: Callable[[Tensor], Tensor] = lambda logits: logits,
    ) -> None:
        super().__init__()
        self.model, self.given, self.state, self.logits = model, given, state, logits

    def forward(self, inputs: Any) -> Tensor:
        inputs = self.given(inputs)
        state, items_CW = self.state(self.model.encode_user(inputs)), self.model.encode_items(inputs)
        return self.logits(self.model.score(state, items_CW, inputs["user_index"]))


# --- An empty history -------------------------------------------------------------------------------------------------


def check_empty_history(model: CTRModel) -> None:
    """Its score is a number, so are its gradients, and what stands in the padding is not read."""
    request = one_request(SCHEMA, 5, history=False)
    littered = {n: np.full_like(a, 3) if n.startswith("hist.") or n == "hist_age" else a for n, a in request.items()}
    model = copy.deepcopy(model)

    logits = model(tensors(request))
    logits.sum().backward()

    assert torch.isfinite(logits).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert_equal(logits_of(model, littered), logits.detach())


@pytest.mark.parametrize("name", READERS)
def test_an_empty_history_is_a_history(name):
    model = lively(name, SCHEMA)

    check_empty_history(model)
    caught(check_empty_history, Changed(model, given=lambda i: i | {"hist_mask": torch.ones_like(i["hist_mask"])}))


@pytest.mark.parametrize("name", ["mian", "dien", "dmr"])
def test_an_empty_history_under_a_softmax_of_minus_infinity_is_caught(name, monkeypatch):
    monkeypatch.setattr(attention, "mask_bias", lambda mask, dtype: torch.where(mask, 0.0, -torch.inf).to(dtype))

    caught(check_empty_history, lively(name, SCHEMA))


@pytest.mark.parametrize("name", [n for n in READERS if n not in {"mian", "feseq", "din", "dien", "dmr", "bst"}])
def test_the_mean_of_no_clicks_divided_by_their_number_is_caught(name, monkeypatch):
    def divided(self: FieldEmbeddings, inputs: Any) -> Tensor:
        count_U: Tensor = inputs["hist_mask"].sum(dim=1)
        return self.history(inputs).sum(dim=1) / count_U.unsqueeze(-1).unsqueeze(-1)

    monkeypatch.setattr(FieldEmbeddings, "pooled_history", divided)

    caught(check_empty_history, lively(name, SCHEMA))


# --- Attention --------------------------------------------------------------------------------------------------------


def check_weights(softmax: Callable[[Tensor, Tensor], Tensor]) -> None:
    """They sum to 1, or to 0 where there is nothing; what is not there has none."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 6, generator=draw, dtype=torch.float64) * 5
    mask = torch.rand(50, 6, generator=draw) < 0.4
    assert 0 < (~mask.any(dim=1)).sum() < 50

    alpha = softmax(scores, mask)

    assert_equal(alpha.sum(dim=1), mask.any(dim=1).double())
    assert not alpha[~mask].any()


def test_the_weights_of_attention_sum_to_one_or_to_nothing():
    check_weights(masked_softmax)
    caught(check_weights, lambda scores, mask: scores.masked_fill(~mask, -torch.inf).softmax(-1))
    caught(check_weights, lambda scores, mask: scores.masked_fill(~mask, -1e9).softmax(-1))
    caught(check_weights, lambda scores, mask: (scores * mask).softmax(-1) * mask)


# --- Candidates and requests ------------------------------------------------------------------------------------------


def check_permutation(model: CTRModel) -> None:
    """Permuting the candidates permutes the logits."""
    arrays = example(SCHEMA, 3, 20)
    order = np.random.default_rng(0).permutation(20)

    assert_equal(logits_of(model, only(arrays, order)), logits_of(model, arrays)[order])


def check_chunks(model: CTRModel, size: int) -> None:
    """One call for N candidates gives what calls for a few of them give."""
    request = one_request(SCHEMA, 12)
    chunks: Iterator[Arrays] = (only(request, slice(n, n + size)) for n in range(0, 12, size))

    assert_equal(np.concatenate([logits_of(model, chunk) for chunk in chunks]), logits_of(model, request))


def check_row_form(model: CTRModel) -> None:
    """A candidate's own copy of its request gives what the shared one gives, in float64 to 1e-10."""
    arrays = example(SCHEMA, 3, 20)

    assert_equal(logits_of(model, rows_of(arrays)), logits_of(model, arrays))


def in_slots(inputs: Any) -> Any:
    """Takes the candidates to stand grouped by their request, alike many of each."""
    index = inputs["user_index"]
    return inputs | {"user_index": index.sort().values}


def centred(state: Any) -> Any:
    """What batch normalisation does to a user's half that is left in training mode."""
    return {n: s - s.mean(dim=0) if s.is_floating_point() else s for n, s in state.items()}


@pytest.mark.parametrize("name", ["mian", "deepfm", "dcnv2"])
def test_candidates_and_requests_do_not_influence_each_other(name):
    model = lively(name, SCHEMA)

    check_permutation(model)
    check_chunks(model, 1)
    check_row_form(model)
    caught(check_permutation, Changed(model, given=in_slots))
    caught(check_chunks, Changed(model, logits=lambda logits: logits - logits.mean()), 1)
    caught(check_row_form, Changed(model, state=centred))


def test_batch_normalisation_left_in_training_mode_is_caught():
    model = lively("deepfm", SCHEMA, batch_norm=True)

    check_chunks(model, 4)
    caught(check_chunks, model.train(), 4)


def test_half_the_precision_is_not_the_same_algebra():
    model = lively("mian", SCHEMA)

    def single(inputs: Any) -> Any:
        return {n: v.float() if v.is_floating_point() else v for n, v in inputs.items()}

    caught(check_row_form, Changed(copy.deepcopy(model).float(), given=single))


# --- FTRL -------------------------------------------------------------------------------------------------------------

RUN = Run(
    model="fm", batch_size=64, lr=0.05, max_epochs=1, patience=1, optimizer="ftrl", table_l1=0.5, table_l2=0.3
)  # fmt: skip


def check_scaling(build: Callable[[CTRModel, Run], torch.optim.Optimizer]) -> None:
    """With the gradients of the mean loss it comes to the weights that the published form has with those of the sum."""
    torch.manual_seed(0)
    mean = lively(RUN.model, without_history())
    summed = copy.deepcopy(mean)
    known = {id(p) for m in summed.modules() if isinstance(m, FieldEmbeddings) for p in m.parameters()}
    tables, rest = ([p for p in summed.parameters() if (id(p) in known) == wanted] for wanted in (True, False))
    groups = [
        {"params": tables, "by_row": True, "l1": RUN.table_l1, "l2": RUN.table_l2},
        {"params": rest, "by_row": False, "l1": RUN.dense_l1, "l2": RUN.dense_l2},
    ]
    moving = build(mean, RUN), FTRL(groups, lr=RUN.lr, beta=1.0, n_start=0.1, init_z_from_w=True)

    for _ in range(5):
        for own, other in zip(mean.parameters(), summed.parameters(), strict=True):
            other.grad = torch.randn_like(other)
            own.grad = other.grad / RUN.batch_size
        for optimizer in moving:
            optimizer.step()

    for own, other in zip(mean.parameters(), summed.parameters(), strict=True):
        np.testing.assert_allclose(own.detach(), other.detach(), rtol=1e-8, atol=1e-12)


def test_ftrl_on_the_mean_loss_is_the_published_one_on_the_sum():
    b = RUN.batch_size
    undivided = replace(RUN, **{f"{n}_l{k}": b * getattr(RUN, f"{n}_l{k}") for n in ("table", "dense") for k in (1, 2)})

    def unscaled_start(model: CTRModel, run: Run) -> torch.optim.Optimizer:
        optimizer = optimizers.build(model, run)
        for group in optimizer.param_groups:
            group["n_start"] *= b  # divided by B, and not by its square
        return optimizer

    check_scaling(optimizers.build)
    caught(check_scaling, lambda model, _: optimizers.build(model, undivided))
    caught(check_scaling, unscaled_start)
