"""Base class of every model: the three parts of a click model, and the tensors it can be made to show.

No fused attention and no einsum in any model: each disagrees between runtimes, or runs slower, once exported
(models.md section 9).
"""

# U requests, C candidates, T history length, W width of an item row

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from models.artifact.explanation import Explanation
from models.layers.intermediates import recording

Inputs: TypeAlias = Mapping[str, Tensor]
"""A model's inputs by name: the encoder's arrays (`Schema.inputs`), or the packed ones (`PackedLayout.inputs`)."""
UserState: TypeAlias = dict[str, Tensor]
"""What a model knows of each request before it sees a candidate: tensors whose first dimension is U."""


class CTRModel(nn.Module):
    """A click model in three parts: what the request alone decides, what the ad alone decides, and their meeting.

    One request with N candidates is U = 1, C = N; a training batch is U = C with `user_index = arange`.
    Both give a candidate the same logit: nothing but its own request and itself enters it.
    """

    def encode_user(self, inputs: Inputs) -> UserState:
        """Everything that depends on user, context and history alone: once per request."""
        raise NotImplementedError

    def encode_items(self, inputs: Inputs) -> Tensor:
        """Item rows [C, W]: all that depends on the ad alone, so once per ad and model version.

        The embeddings and every product linear in them. Reads the item fields only, and each row is its own ad's:
        whoever keeps the rows may feed them to `score` beside any others.
        """
        raise NotImplementedError

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        """Logits [C]. `user_index` [C] names each candidate's request; None: all are of the only one (U = 1)."""
        raise NotImplementedError

    def forward(self, inputs: Inputs) -> Tensor:
        return self.score(self.encode_user(inputs), self.encode_items(inputs), inputs["user_index"])

    def penalty(self) -> Tensor:
        """The L2 terms the model's config asks for, to be added to the mean loss; 0 where it asks for none."""
        raise NotImplementedError

    def auxiliary_loss(self, state: UserState, inputs: Inputs) -> Tensor:  # noqa: ARG002  # some models read it
        """What the model learns beside the labels, of a training batch and what `encode_user` made of it; 0 by default.

        Scalar, to be added to the mean loss.
        """
        return inputs["user_index"].new_zeros((), dtype=torch.get_default_dtype())

    def logged_scalars(self) -> dict[str, float]:
        """Numbers of the model's own by name, which the training log shows after each epoch; none by default."""
        return {}

    def explanations(self) -> tuple[Explanation, ...]:
        """What the model records of itself (see `layers.intermediates`), in reading order; nothing by default."""
        return ()


def explain(model: CTRModel, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits [C] and, by name, the tensors that `model.explanations()` promises."""
    with recording() as recorded:
        logit_C: Tensor = model(inputs)
    return logit_C, shown(recorded, model.explanations())


def shown(recorded: Mapping[str, Sequence[Tensor]], explanations: Sequence[Explanation]) -> dict[str, Tensor]:
    """Of what was recorded the tensors that these explanations promise, in their order.

    Where the declared axes are one more than a recorded tensor has, the second counts the records (blocks, layers).
    """
    tensors = {}
    for explanation in explanations:
        values = recorded[explanation.name]
        if values[0].dim() < len(explanation.axes):
            tensors[explanation.name] = torch.stack(list(values), dim=1)
        else:
            (tensors[explanation.name],) = values
    return tensors


def history_mask(inputs: Inputs) -> Tensor:
    """[U, T]: true where the history holds a click."""
    return inputs["history_mask"] if "history_mask" in inputs else inputs["hist_mask"]


def history_age(inputs: Inputs) -> Tensor:
    """[U, T]: whole seconds since each click, 0 where there is none."""
    return inputs["history_age"] if "history_age" in inputs else inputs["hist_age"]
