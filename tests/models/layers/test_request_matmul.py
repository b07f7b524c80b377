"""What a candidate reads of its own request, with one request and with several, against a loop over the candidates."""

import numpy as np
import pytest
import torch

from models.layers.request_matmul import matmul_by_request


def operands(num_requests: int, num_candidates: int, between: tuple[int, ...] = ()) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(num_candidates, *between, 2, 3, generator=draw, dtype=torch.float64)
    matrix = torch.randn(num_requests, *between, 3, 4, generator=draw, dtype=torch.float64)
    return x, matrix, torch.randint(num_requests, (num_candidates,), generator=draw)


def one_by_one(x, matrix, user_index):
    return np.stack([x[c].numpy() @ matrix[user].numpy() for c, user in enumerate(user_index.tolist())])


@pytest.mark.parametrize("between", [(), (5,)])
@pytest.mark.parametrize(("num_requests", "num_candidates"), [(1, 1), (1, 7), (4, 7), (7, 1)])
def test_each_candidate_is_multiplied_by_the_matrix_of_its_own_request(num_requests, num_candidates, between):
    given = operands(num_requests, num_candidates, between)

    product = matmul_by_request(*given)

    np.testing.assert_allclose(product.numpy(), one_by_one(*given), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_was_traced_with_several_requests_holds_for_one():
    traced = torch.jit.trace(matmul_by_request, operands(3, 5))
    given = operands(1, 7)

    np.testing.assert_allclose(traced(*given).numpy(), one_by_one(*given), rtol=0, atol=1e-12)
