"""How a model shows tensors from inside its forward pass, without a second forward pass to keep in step.

    weights = scores.softmax(dim=-1)
    tap("field_attn", weights)

is nothing at all unless somebody records, so that what is trained, exported and served does not change. What a name
means, its axes and its caveat, the model says in `CTRModel.explanations`; a tap that it does not name there is dropped.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.explanation import Explanation

if TYPE_CHECKING:
    from models.blocks import CTRModel

_recorded: ContextVar[dict[str, list[Tensor]] | None] = ContextVar("recorded", default=None)


def tap(name: str, value: Tensor | Callable[[], Tensor]) -> None:
    """Shows a tensor under a name. Give a function where showing costs something: it is called only if recorded.

    A layer that occurs several times taps the same name each time; `explain` stacks what came.
    """
    recorded = _recorded.get()
    if recorded is not None:
        recorded.setdefault(name, []).append(value if isinstance(value, Tensor) else value())


def tapped() -> bool:
    """Whether somebody records: for what has to be kept until it can be shown."""
    return _recorded.get() is not None


def explain(
    model: "CTRModel", inputs: Mapping[str, Tensor], explanations: Sequence[Explanation] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits [C] and, by name, the tensors that `model.explanations()` promises.

    Ask the model for those beforehand where it is traced: then nothing can be read from its tensors.

    Where the declared axes are one more than a tapped tensor has, the second of them counts the taps (blocks, layers).
    """
    with _recording() as recorded:
        logit_C: Tensor = model(inputs)
    shown = {}
    for explanation in model.explanations() if explanations is None else explanations:
        values = recorded[explanation.name]
        if values[0].dim() < len(explanation.axes):
            shown[explanation.name] = torch.stack(values, dim=1)
        else:
            (shown[explanation.name],) = values
    return logit_C, shown


@contextmanager
def _recording() -> Iterator[dict[str, list[Tensor]]]:
    recorded: dict[str, list[Tensor]] = {}
    token = _recorded.set(recorded)
    try:
        yield recorded
    finally:
        _recorded.reset(token)
