"""What must hold of every model's three parts, `encode_user`, `encode_items` and `score`."""

import numpy as np
import torch
from torch import Tensor

from models.features.arrays import Arrays
from models.layers.base import CTRModel, Inputs
from tests.models.small import rows_of, tensors


def check_parts(model: CTRModel, request: Arrays) -> None:
    """One request's candidates are scored as rows of their own, with `user_index` None or all zeros, in any order.

    The request's part is made without the items, and theirs without the request.
    """
    inputs, rows = tensors(request), tensors(rows_of(request))
    of_user = {name: value for name, value in inputs.items() if not name.startswith("item.")}
    of_items = {name: value for name, value in inputs.items() if name.startswith("item.") or name == "user_index"}

    with torch.no_grad():
        state, items_CW = model.encode_user(of_user), model.encode_items(of_items)
        alone, indexed = (model.score(state, items_CW, index) for index in (None, inputs["user_index"]))
        by_row, shuffled = model(rows), model.score(state, items_CW.flip(0), None).flip(0)

    assert items_CW.dim() == 2
    assert np.std(by_row.numpy()) > 1e-4
    for logits_C in (alone, indexed, shuffled):
        np.testing.assert_allclose(logits_C.numpy(), by_row.numpy(), rtol=1e-10, atol=1e-10)


def score_alone(model: CTRModel, inputs: Inputs) -> Tensor:
    """The logits as the serving graph has them: all candidates are of the one request."""
    return model.score(model.encode_user(inputs), model.encode_items(inputs), None)
