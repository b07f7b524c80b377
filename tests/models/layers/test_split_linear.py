"""The parts of a split linear layer against the undivided one."""

import pytest
import torch
from torch import nn

from models.layers.split_linear import SplitLinear, item_product, request_product


def parts(request: int, item: int, cross: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    return tuple(torch.randn(4, n, generator=draw, dtype=torch.float64) for n in (request, item, cross))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [(3, 2, 4), (3, 2, 0), (0, 2, 1), (3, 0, 1)])
def test_the_parts_add_up_to_the_layer(widths, bias):
    layer = SplitLinear(widths[0], widths[1], 5, cross_width=widths[2], bias=bias).double()
    request, item, cross = parts(*widths)

    total = layer.request(request) + layer.item(item) + layer.cross(cross)

    torch.testing.assert_close(total, layer(torch.cat([request, item, cross], dim=1)), rtol=0, atol=1e-12)


def test_layers_that_read_the_same_parts_stand_side_by_side_in_one_product():
    one, two = SplitLinear(3, 2, 5).double(), SplitLinear(3, 2, 4, bias=False).double()
    request, item, _ = parts(3, 2, 0)

    requests, items = request_product(request, one, two), item_product(item, one, two)

    torch.testing.assert_close(requests, torch.cat([one.request(request), two.request(request)], dim=1))
    torch.testing.assert_close(items, torch.cat([one.item(item), two.item(item)], dim=1))


def test_a_split_layer_starts_as_the_undivided_one_does():
    torch.manual_seed(3)
    split = SplitLinear(3, 2, 5, cross_width=1).state_dict()
    torch.manual_seed(3)
    whole = nn.Linear(6, 5).state_dict()

    assert list(split) == list(whole)
    assert all(torch.equal(split[name], whole[name]) for name in whole)
