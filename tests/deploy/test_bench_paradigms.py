"""DynInt's paradigms and the weights written out: the same terms, and bytes that can be counted by hand."""

import paradigms
import pytest
import torch

F, S, ROWS = 3, 2, 5
P, H = F * S, F * paradigms.WIDTH // paradigms.REDUCTION
L, K, R = paradigms.LAYERS, paradigms.KERNEL_SIZE, paradigms.RANK


@pytest.mark.parametrize("mode", ["dgp", "dwp"])
def test_weights_written_out_give_the_paradigms_terms_and_gradients(mode):
    found = paradigms.sides(mode, F, S, ROWS)
    paradigms.check(found)
    gradients = []
    for name in (paradigms.PARADIGM, paradigms.WRITTEN_OUT):
        found[name].step_s()
        gradients.append([parameter.grad for parameter in found[name].parameters])

    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_terms_that_differ_are_refused():
    found = paradigms.sides("dgp", F, S, ROWS)
    off = paradigms.Side(
        terms=lambda: tuple(term + 0.1 for term in found[paradigms.PARADIGM].terms()),
        parameters=found[paradigms.PARADIGM].parameters,
    )

    with pytest.raises(paradigms.WrongTermsError, match="layer 1: expected the paradigm's terms"):
        paradigms.check(found | {paradigms.WRITTEN_OUT: off})


@pytest.mark.parametrize(("mode", "maps", "out"), [("dgp", 2 * K * P, K), ("dwp", P * P, 2 * R * P)])
def test_parameters_are_those_of_the_maps_and_of_a_net_as_wide_as_what_it_gives(mode, maps, out):
    found = paradigms.sides(mode, F, S, ROWS)

    net = H * F * paradigms.WIDTH + H
    assert found[paradigms.PARADIGM].parameter_bytes() == 4 * L * (maps + net + (H + 1) * out)
    static = maps if mode == "dwp" else 0
    assert found[paradigms.GENERATED].parameter_bytes() == 4 * L * (static + net + (H + 1) * P * P)


@pytest.mark.parametrize("mode", ["dgp", "dwp"])
def test_only_the_paradigm_keeps_no_matrix_for_each_row(mode):
    small, large = (paradigms.sides(mode, 12, 4, rows) for rows in (ROWS, 2 * ROWS))

    grown = {name: large[name].activation_bytes() - small[name].activation_bytes() for name in small}

    matrices = 4 * ROWS * L * (12 * 4) ** 2
    assert min(grown[paradigms.WRITTEN_OUT], grown[paradigms.GENERATED]) >= matrices
    assert 0 < grown[paradigms.PARADIGM] < matrices


def test_the_table_has_a_row_for_each_form():
    costs = paradigms.measure("small", "dwp", paradigms.sides("dwp", F, S, ROWS), 3)

    lines = paradigms.markdown(costs).splitlines()

    assert len(lines) == 2 + 3
    assert "| 1.00 (1.00 to 1.00) |" in lines[2]
