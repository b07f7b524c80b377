"""How candidates read what their requests hold: a gather for many requests, broadcasting for a single one."""

# U requests, C candidates, * further dimensions alike on both sides, X rows, K inner dimension, O columns

import torch.nn.functional as F
from torch import Tensor


def of_request(x_U: Tensor, user_index: Tensor | None, num_candidates: int | None = None) -> Tensor:
    """Each candidate's row of x [U, ...]: [C, ...].

    Without an index all candidates are of one request, and x [1, ...] itself comes back, to be broadcast; it is
    expanded to [C, ...] only where `num_candidates` is given, as a concatenation needs it.
    """
    if user_index is not None:
        return x_U.index_select(0, user_index)
    return x_U if num_candidates is None else x_U.expand(num_candidates, *x_U.shape[1:])


def matmul_by_request(x_C: Tensor, matrix_U: Tensor, user_index: Tensor | None) -> Tensor:
    """Each candidate's x [C, *, X, K] times the matrix of its own request [U, *, K, O]: [C, *, X, O].

    A copy of the matrix for every candidate often costs more than the product; candidates of one request need none.
    """
    return x_C @ (matrix_U.squeeze(0) if user_index is None else matrix_U.index_select(0, user_index))


def vector_by_request(x_CK: Tensor, matrix_U: Tensor, user_index: Tensor | None) -> Tensor:
    """Each candidate's x [C, K] times the matrix of its own request [U, K, O]: [C, O]."""
    if user_index is None:
        return x_CK @ matrix_U.squeeze(0)
    return (x_CK.unsqueeze(1) @ matrix_U.index_select(0, user_index)).squeeze(1)


def dot_by_request(x_CK: Tensor, y_UK: Tensor, user_index: Tensor | None) -> Tensor:
    """Each candidate's x [C, K] and the vector y of its request [U, K], multiplied and summed over K: [C]."""
    if user_index is None:
        return F.linear(y_UK, x_CK).squeeze(0)  # in ONNX Runtime a seventh of the time of x @ y
    return (x_CK * y_UK.index_select(0, user_index)).sum(dim=-1)
