"""How a candidate reads what its own request holds; what is different when all of them are of one request."""

# U requests, C candidates, * further dimensions alike on both sides, X rows, K inner dimension, O columns

from collections.abc import Callable

import torch
from torch import Tensor


def matmul_by_request(x: Tensor, matrix: Tensor, user_index_C: Tensor) -> Tensor:
    """Each candidate's x [C, *, X, K] times the matrix of its own request [U, *, K, O]: [C, *, X, O].

    A copy of the matrix for every candidate often costs more than the product; candidates of one request need none.
    """
    return if_one_request(matrix.shape[0], _of_the_only, _of_each, (x, matrix, user_index_C))


def if_one_request(
    num_requests: int, one: Callable[..., Tensor], several: Callable[..., Tensor], operands: tuple[Tensor, ...]
) -> Tensor:
    """`one(*operands)` for a single request, else `several(*operands)`, which holds for any number; both mean the same.

    As the ONNX graph's number of requests is free, it holds both and decides when it runs. TorchScript, traced with
    several requests, holds the latter.
    """
    if torch.compiler.is_exporting():
        # A comparison of the size itself would be false for good: torch.export takes every free size for at least 2.
        is_one = torch.scalar_tensor(num_requests, dtype=torch.int64) == 1
        # Without `detach` torch warns that it looks for the gradients of tensors that have none, and it cannot export
        # what begins in the middle of another tensor; in the graph none does, and `contiguous` costs nothing.
        values = tuple(operand.detach().contiguous() for operand in operands)
        chosen: Tensor = torch.cond(is_one, _plain(one), _plain(several), values)
        return chosen
    if not torch.jit.is_tracing() and num_requests == 1:  # type: ignore[attr-defined, no-untyped-call]  # torch's
        return one(*operands)
    return several(*operands)


def _plain(branch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Laid out row by row, as both branches must be; in the graph every tensor is, and it costs nothing."""
    return lambda *operands: branch(*operands).contiguous()


def _of_the_only(x: Tensor, matrix: Tensor, user_index_C: Tensor) -> Tensor:  # noqa: ARG001  # `_of_each` needs it
    return x @ matrix[0]


def _of_each(x: Tensor, matrix: Tensor, user_index_C: Tensor) -> Tensor:
    return x @ matrix.index_select(0, user_index_C)
