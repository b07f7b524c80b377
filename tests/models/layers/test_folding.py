"""What depends on weights alone: computed anew as they change, and once under `folded_weights`."""

import pytest
import torch
from torch import Tensor, nn

from models.layers.folding import folded_weights, of_weights


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))
        self.calls = 0

    @of_weights
    def times(self, factor: int) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return factor * self.weight, self.weight.T

    def forward(self, x: Tensor) -> Tensor:
        scaled, transposed = self.times(2)
        return x @ scaled @ transposed


def test_in_training_it_follows_the_weights_and_passes_gradients():
    model = Doubled()

    before = model(torch.ones(1, 2))
    model.weight.data += 1
    after = model(torch.ones(1, 2))
    after.sum().backward()

    assert after[0, 0] == 4 * before[0, 0]
    assert model.weight.grad is not None


def test_folded_it_is_computed_once_for_each_module_and_argument_and_forgotten_afterwards():
    model, other = Doubled(), Doubled()

    with folded_weights():
        first, again = model.times(2), model.times(2)
        model.times(3), other.times(2)
    model.times(2)

    assert first[0] is again[0]
    assert not first[0].requires_grad
    assert first[1].is_contiguous()
    assert (model.calls, other.calls) == (3, 1)


def test_an_error_inside_ends_the_folding():
    model = Doubled()

    def fail() -> None:
        with folded_weights():
            model.times(2)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    model.times(2)
    assert model.calls == 2


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_trace_of_folded_weights_holds_their_result_and_not_its_making():
    model = Doubled().eval()
    x = torch.randn(4, 2)

    with folded_weights(), torch.no_grad():
        expected = model(x)
        traced = torch.jit.trace(model, x)

    operators = [node.kind() for node in traced.inlined_graph.nodes()]
    assert operators.count("aten::matmul") == 2
    assert "aten::mul" not in operators
    torch.testing.assert_close(traced(x), expected)
