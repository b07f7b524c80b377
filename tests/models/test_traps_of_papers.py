"""The traps of models.md section 11 that are one paper's own: a law, the model it holds for, the mistake it catches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models import zoo
from models.layers.attention import masked_softmax
from models.layers.base import CTRModel
from models.papers.dynint import DynInt
from tests.models.flat import fields_of
from tests.models.small import lively, tensors
from tests.models.traps import SCHEMA, assert_equal, caught
from training.export import example

# --- MIAN -------------------------------------------------------------------------------------------------------------


def r_ibim(model: Any, inputs: Any) -> Any:
    """R_ibim, read off a model whose logit is a linear map of all groups: one column of the map at a time."""
    first, columns = model.gim.head.first, model.gim.columns["ibim"]
    first.bias.data.zero_()
    numbers = []
    for column in range(columns.start, columns.stop):
        first.weight.data.zero_()
        first.weight.data[0, column] = 1
        numbers.append(model(inputs))
    return torch.stack(numbers, dim=1)


def r_ibim_as_written(model: Any, inputs: Any) -> Any:
    """Eq. (8) and (9), sum_t alpha_t [e_i; h_t]: nothing at all where there is no click."""
    index, mask_UT = inputs["user_index"], inputs["hist_mask"]
    item_CI = model.fields.item(inputs).flatten(1)
    clicks_UTB = model.transformer(model.fields.history(inputs).flatten(2), mask_UT)
    both_CTX = torch.cat([item_CI.unsqueeze(1).expand(-1, clicks_UTB.shape[1], -1), clicks_UTB[index]], dim=-1)
    kernel = model.local["ibim"].kernel
    scores_CT = torch.tanh((both_CTX * kernel.weight).sum(dim=-1) + kernel.bias)
    return (masked_softmax(scores_CT, mask_UT[index]).unsqueeze(1) @ both_CTX).squeeze(1)


def check_r_ibim(read: Callable[[Any, Any], Any]) -> None:
    """[e_i; what the candidate finds], and [e_i; 0] where there is nothing to find."""
    model: Any = lively("mian", SCHEMA, emb_dim=4, heads=2, gim=False, hidden=())
    inputs = tensors(example(SCHEMA, 3, 20))
    inputs["hist_mask"] = torch.tensor([[False] * 4, [False, True, True, True], [True] * 4])
    empty = inputs["user_index"] == 0
    assert empty.any()

    with torch.no_grad():
        found, written = read(model, inputs), r_ibim_as_written(model, inputs)

    item = model.fields.item(inputs).flatten(1).detach()
    assert_equal(found[:, : item.shape[1]], item)
    assert not found[empty, item.shape[1] :].any()
    assert_equal(found[~empty], written[~empty])


def test_mians_click_attention_keeps_the_candidate_itself():
    check_r_ibim(r_ibim)
    caught(check_r_ibim, r_ibim_as_written)


# --- DynInt -----------------------------------------------------------------------------------------------------------


class ReadsItself(DynInt):
    """X_l = X_{l-1} * (W_l X_{l-1}) + X_{l-1}: each layer maps the one before it, and not the input."""

    def _terms(self, read: Any) -> Any:
        x_CWP, terms = read["rows"], []
        assert self.maps is not None
        for kernel_PP in self.maps.get_parameter("kernel_LPP"):
            terms.append(x_CWP @ kernel_PP.T)
            x_CWP = x_CWP * (1 + terms[-1])
        return tuple(terms)


def check_closed_form(model: Any) -> None:
    """X_L = X_0 * prod_l (1 + W_l X_0), which is what the loop comes to."""
    inputs = tensors(example(SCHEMA, 3, 12))
    x_CFD = torch.from_numpy(fields_of(model, inputs))
    start_CPW = torch.cat(x_CFD.chunk(model.config.subspaces, dim=-1), dim=1)
    closed, loop = start_CPW, start_CPW
    for kernel_PP in model.maps.kernel_LPP:
        closed = closed * (1 + kernel_PP @ start_CPW)
        loop = loop * (kernel_PP @ start_CPW) + loop
    weights_P = model.out.weight[0].repeat(model.config.subspaces)

    for last_CPW in (closed, loop):
        expected = last_CPW.sum(dim=-1) @ weights_P + model.out.bias
        assert_equal(model(inputs).detach(), expected.detach())


def test_pins_loop_is_its_closed_form():
    model = lively("dynint", SCHEMA, mode="pin", emb_dim=6, subspaces=2)

    check_closed_form(model)
    model.__class__ = ReadsItself
    caught(check_closed_form, model)


def check_dwp_starts_near_one(**options: Any) -> None:
    """The mean over rows of G = sum_p u_p v_p^T, with which the static weights are multiplied."""
    torch.manual_seed(0)
    model: Any = zoo.build("dynint", {"mode": "dwp", **options}, SCHEMA)
    u, v = model.maps.factors(model.gate(0.1 * torch.randn(50, *model.gate.squeeze_bias_LH.shape)))

    assert (u.transpose(-1, -2) @ v).mean().item() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("rank", [2, 4])
def test_dwp_starts_as_pin(rank):
    check_dwp_starts_near_one(latent_rank=rank)
    caught(check_dwp_starts_near_one, latent_rank=rank, dwp_offset="inv")


# --- DeepMR -----------------------------------------------------------------------------------------------------------


def check_alpha_learns(**options: Any) -> None:
    """From the first step on, every alpha of the attention branch has a gradient."""
    torch.manual_seed(0)
    model: Any = zoo.build("deepmr", {"emb_dim": 8} | options, SCHEMA).double()
    model(tensors(example(SCHEMA, 3, 12))).sum().backward()

    for block in model.attention.blocks:
        assert block.alphas[0].grad.abs() > 1e-6


def test_deepmrs_alpha_learns_from_the_first_step():
    check_alpha_learns()
    check_alpha_learns(sa_blocks=2, sa_rezero="mult_res")
    caught(check_alpha_learns, sa_final_ln=True)  # R6: a sum over what was normalised is a constant


# --- STEC -------------------------------------------------------------------------------------------------------------


def check_levels(model: CTRModel, *, blocks: int, fields: int, width: int) -> None:
    """N blocks make N + 1 levels of interactions, each of every pair i < j once, and the head reads them all."""
    kernel = model.get_parameter("head.first.weight")
    model(tensors(example(SCHEMA, 2, 6))).square().sum().backward()

    assert kernel.shape == (1, (blocks + 1) * fields * (fields - 1) // 2 * width)
    assert kernel.grad is not None
    assert kernel.grad.all()


def test_n_blocks_of_stec_make_n_plus_one_levels_of_all_pairs():
    sizes: dict[str, int] = {"blocks": 2, "fields": 8, "width": 4}

    def stec(**options: Any) -> CTRModel:
        return lively("stec", SCHEMA, **{"blocks": 2, "emb_dim": 4} | options)

    check_levels(stec(), **sizes)
    for mistake in ({"blocks": 1}, {"blocks": 3}, {"fusion": "last"}, {"pairs": "all"}, {"pairs": "upper_diag"}):
        caught(check_levels, stec(**mistake), **sizes)


# --- FESeq ------------------------------------------------------------------------------------------------------------


def check_causality(model: Any) -> None:
    """A refined click knows neither the candidate nor a later click."""
    inputs = tensors(example(SCHEMA, 2, 2))
    inputs |= {"user_index": torch.arange(2), "hist_mask": torch.ones(2, 4, dtype=torch.bool)}
    inputs["item.movie"], inputs["hist.movie"] = torch.tensor([2, 3]), torch.full((2, 4), 4)
    newest = inputs["hist.movie"].clone()
    newest[:, -1] = 5

    refined = _refined(model, inputs)

    assert_equal(_refined(model, inputs | {"item.movie": torch.tensor([6, 7])}), refined)
    changed = _refined(model, inputs | {"hist.movie": newest}) != refined
    assert changed[:, -1].any()
    assert not changed[:, :-1].any()


def _refined(model: Any, inputs: Any) -> Tensor:
    """The clicks [2, T, M] as the refiner leaves them."""
    left: list[Tensor] = []
    with torch.no_grad(), model.refiner.register_forward_hook(lambda _module, _given, out: left.append(out)):
        model(inputs)
    return left[0][:, :4]


def test_feseqs_clicks_see_no_later_event():
    check_causality(lively("feseq", SCHEMA))
    caught(check_causality, lively("feseq", SCHEMA, causal=False))
    blind: Any = lively("feseq", SCHEMA)
    blind.earlier[:] = True
    caught(check_causality, blind)
