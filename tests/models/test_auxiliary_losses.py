"""The auxiliary losses of DIEN and DMR against their sums, written click by click."""

from collections.abc import Callable
from math import log
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.flat import sigmoid
from tests.models.small import lively, tensors, with_history
from training.export import example

SCHEMA = with_history(3)
DRAWN = [1, 2, 0]  # whose clicks stand for those that request 0, 1, 2 did not make
MASK = torch.tensor([[False, True, True], [True, True, True], [True, True, True]])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def perm(n: int, **_: object) -> torch.Tensor:
        return torch.tensor(DRAWN[:n])

    monkeypatch.setattr(torch, "randperm", perm)


def batch(name: str, **options: Any) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model, the inputs of 3 requests, and what the model made of the requests."""
    model: Any = lively(name, SCHEMA, emb_dim=4, hidden=(6, 5), **options)
    inputs = tensors(example(SCHEMA, 3, 8, history=True))
    inputs["hist_mask"][:] = MASK
    inputs["hist.movie"][:] = torch.tensor([[2, 3, 4], [5, 6, 4], [3, 2, 5]])
    # The newest clicks of requests 0 and 1 are the same.
    inputs["hist.genres"][:2, 2] = inputs["hist.genres"][0, 2]
    return model, inputs, model.encode_user(inputs)


def binary(scores: list[float], missed: list[float], *, negatives: int = 1) -> float:
    """Of the products with clicks that were made, and with others, so many to each."""
    found = -float(np.mean([log(sigmoid(np.array(s))) for s in scores]))
    return found - negatives * float(np.mean([log(1 - sigmoid(np.array(s))) for s in missed]))


@pytest.mark.usefixtures("drawn")
def test_dien_tells_the_next_click_from_one_of_another_request() -> None:
    model, inputs, state = batch("dien", aux_weight=0.5)

    loss = model.auxiliary_loss(state, inputs).item()

    clicks, interests = state["clicks"].detach().numpy(), state["interests"].detach().numpy()
    scores, missed = [], []
    for u, other in enumerate(DRAWN):
        for t in range(2):
            if MASK[u, t] and MASK[u, t + 1]:
                scores.append(float(interests[u, t] @ clicks[u, t + 1]))
                same = bool((clicks[u, t + 1] == clicks[other, t + 1]).all())
                if MASK[other, t] and not same:
                    missed.append(float(interests[u, t] @ clicks[other, t + 1]))
    assert (len(scores), len(missed)) == (5, 3)
    assert loss == pytest.approx(0.5 * binary(scores, missed), rel=1e-12)


@pytest.mark.usefixtures("drawn")
def test_dmr_finds_the_newest_click_by_those_before_it_and_adds_up_the_negatives() -> None:
    model, inputs, state = batch("dmr", aux_weight=0.1, aux_negatives=2)

    loss = model.auxiliary_loss(state, inputs).item()

    tables = model.output_fields
    newest_items = {f"item.{name}": inputs[f"hist.{name}"][:, -1] for name in ("movie", "genres")}
    newest = tables.item(newest_items).flatten(1)
    user = []
    for u in range(3):
        kept = [t for t in range(2) if MASK[u, t]]
        weights = torch.softmax(state["scores"][u, kept], dim=0)
        user.append(model.user_out(sum(w * state["clicks"][u, t] for w, t in zip(weights, kept, strict=True))))
    scores = [(user[u] @ newest[u]).item() for u in range(3)]
    missed = [(user[u] @ newest[o]).item() for u, o in enumerate(DRAWN) if {u, o} != {0, 1}]  # which clicked the same
    assert len(missed) == 2
    assert loss == pytest.approx(0.1 * binary(scores, missed, negatives=2), rel=1e-12)


@pytest.mark.parametrize("name", ["dien", "dmr"])
def test_the_auxiliary_loss_reads_no_click_that_is_not_there(name: str) -> None:
    def lost(change: Callable[[dict[str, torch.Tensor]], object]) -> float:
        torch.manual_seed(1)
        model, inputs, _ = batch(name, aux_weight=1.0)
        change(inputs)
        loss: float = model.auxiliary_loss(model.encode_user(inputs), inputs).item()
        return loss

    padded = lost(lambda inputs: inputs["hist.movie"][:1, :1].fill_(6))
    seen = lost(lambda inputs: inputs["hist.movie"][:1, 1:2].fill_(6))
    empty = lost(lambda inputs: inputs["hist_mask"].fill_(value=False))
    single = lost(lambda inputs: inputs["hist_mask"][:, :2].fill_(value=False))

    assert padded == lost(lambda _: None)
    assert seen != padded
    assert empty == single == 0


@pytest.mark.parametrize("name", ["dien", "dmr"])
def test_the_auxiliary_loss_is_off_unless_asked_for_and_changes_no_score(name: str) -> None:
    plain, inputs, state = batch(name)
    taught, _, _ = batch(name, aux_weight=1.0)

    assert plain.auxiliary_loss(state, inputs).item() == 0
    assert torch.equal(plain(inputs), taught(inputs))
    taught.auxiliary_loss(taught.encode_user(inputs), inputs).backward()
    learns = {n.split(".")[0] for n, p in taught.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert (
        learns
        == {
            "dien": {"fields", "extraction"},
            "dmr": {"fields", "output_fields", "positions", "user_read", "user_score", "user_out"},
        }[name]
    )


@pytest.mark.parametrize("name", ["dien", "dmr"])
def test_a_history_of_one_click_has_no_next_one(name: str) -> None:
    schema = with_history(1)
    model: Any = lively(name, schema, emb_dim=4, aux_weight=1.0)
    inputs = tensors(example(schema, 3, 8, history=True))

    assert model.auxiliary_loss(model.encode_user(inputs), inputs).item() == 0
