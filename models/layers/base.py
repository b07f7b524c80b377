"""Base class of every model: the two halves of a click model, and the tensors it can be made to show.

No fused attention and no einsum in any model: each disagrees between runtimes, or runs slower, once exported
(models.md section 9).
"""

# U requests, C candidates

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from models.artifact.explanation import Explanation
from models.layers.intermediates import recording

Inputs: TypeAlias = Mapping[str, Tensor]
"""A model's inputs by name, as `Schema.inputs` lists them."""
UserState: TypeAlias = dict[str, Tensor]
"""What a model knows of each request before it sees a candidate: tensors whose first dimension is U."""


class CTRModel(nn.Module):
    """A click model in two halves: what depends on the request alone, and what needs a candidate.

    One request with N candidates is U = 1, C = N; a training batch is U = C with `user_index = arange`.
    Both give a candidate the same logit: nothing but its own request and itself enters it.
    """

    def encode_user(self, inputs: Inputs) -> UserState:
        """Everything that depends only on user, context and history: once per request."""
        raise NotImplementedError

    def score(self, state: UserState, inputs: Inputs) -> Tensor:
        """Logits [C]; reads the `item.*` inputs and `user_index`, which names each candidate's request."""
        raise NotImplementedError

    def forward(self, inputs: Inputs) -> Tensor:
        return self.score(self.encode_user(inputs), inputs)

    def penalty(self) -> Tensor:
        """The L2 terms the model's config asks for, to be added to the mean loss; 0 where it asks for none."""
        raise NotImplementedError

    def auxiliary_loss(self, state: UserState, inputs: Inputs) -> Tensor:  # noqa: ARG002  # some models read it
        """What the model learns beside the labels, of a training batch and what `encode_user` made of it; 0 by default.

        Scalar, to be added to the mean loss.
        """
        return inputs["user_index"].new_zeros((), dtype=torch.get_default_dtype())

    def explanations(self) -> tuple[Explanation, ...]:
        """What the model records of itself (see `layers.intermediates`), in reading order; nothing by default."""
        return ()


def explain(
    model: CTRModel, inputs: Mapping[str, Tensor], explanations: Sequence[Explanation] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits [C] and, by name, the tensors that `model.explanations()` promises.

    Ask the model for those beforehand where it is traced: then nothing can be read from its tensors.

    Where the declared axes are one more than a recorded tensor has, the second counts the records (blocks, layers).
    """
    with recording() as recorded:
        logit_C: Tensor = model(inputs)
    shown = {}
    for explanation in model.explanations() if explanations is None else explanations:
        values = recorded[explanation.name]
        if values[0].dim() < len(explanation.axes):
            shown[explanation.name] = torch.stack(values, dim=1)
        else:
            (shown[explanation.name],) = values
    return logit_C, shown
