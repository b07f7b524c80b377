"""What a candidate reads of its own request, with one request and with several, against a loop over the candidates."""

import numpy as np
import pytest
import torch

from models.layers.request_matmul import dot_by_request, matmul_by_request, of_request, vector_by_request


def operands(num_requests: int, num_candidates: int, between: tuple[int, ...] = ()) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(num_candidates, *between, 2, 3, generator=draw, dtype=torch.float64)
    matrix = torch.randn(num_requests, *between, 3, 4, generator=draw, dtype=torch.float64)
    return x, matrix, torch.randint(num_requests, (num_candidates,), generator=draw)


def one_by_one(x, matrix, user_index):
    return np.stack([x[c].numpy() @ matrix[user].numpy() for c, user in enumerate(user_index.tolist())])


def assert_same(found, expected):
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("between", [(), (5,)])
@pytest.mark.parametrize(("num_requests", "num_candidates"), [(1, 1), (1, 7), (4, 7), (7, 1)])
def test_each_candidate_is_multiplied_by_the_matrix_of_its_own_request(num_requests, num_candidates, between):
    x, matrix, index = operands(num_requests, num_candidates, between)

    assert_same(matmul_by_request(x, matrix, index), one_by_one(x, matrix, index))
    if num_requests == 1:
        assert_same(matmul_by_request(x, matrix, None), one_by_one(x, matrix, index))


@pytest.mark.parametrize("num_requests", [1, 4])
def test_a_vector_meets_the_matrix_or_the_vector_of_its_own_request(num_requests):
    x, matrix, index = operands(num_requests, 7)
    x_CK, y_UK = x[:, 0], matrix[..., 0]
    products = np.stack([x_CK[c].numpy() @ matrix[user].numpy() for c, user in enumerate(index.tolist())])

    for user_index in (index, None) if num_requests == 1 else (index,):
        assert_same(vector_by_request(x_CK, matrix, user_index), products)
        assert_same(dot_by_request(x_CK, y_UK, user_index), products[:, 0])


def test_without_an_index_the_only_request_is_broadcast_and_copied_to_every_candidate_where_asked():
    x = torch.randn(1, 2, 3)

    assert of_request(x, None) is x
    assert torch.equal(of_request(x, None, 5), x.repeat(5, 1, 1))
    assert torch.equal(of_request(x, torch.zeros(5, dtype=torch.int64)), x.repeat(5, 1, 1))
    assert torch.equal(of_request(torch.arange(3), torch.tensor([2, 0])), torch.tensor([2, 0]))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_was_traced_with_several_requests_holds_for_one():
    traced = torch.jit.trace(matmul_by_request, operands(3, 5))
    given = operands(1, 7)

    assert_same(traced(*given), one_by_one(*given))
