"""How a model shows tensors from inside its forward pass, without a second forward pass to keep in step.

    weights = scores.softmax(dim=-1)
    record("field_attn", weights)

is nothing at all unless somebody records, so that what is trained, exported and served does not change. What a name
means, its axes and its caveat, the model says in `CTRModel.explanations`; what it does not name there is dropped.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_recorded: ContextVar[dict[str, list[Tensor]] | None] = ContextVar("recorded", default=None)


def record(name: str, value: Tensor | Callable[[], Tensor]) -> None:
    """Shows a tensor under a name. Give a function where showing costs something: it is called only if recorded.

    A layer that occurs several times records the same name each time; `explain` stacks what came.
    """
    recorded = _recorded.get()
    if recorded is not None:
        recorded.setdefault(name, []).append(value if isinstance(value, Tensor) else value())


def is_recording() -> bool:
    """Whether somebody records: for what has to be kept until it can be shown."""
    return _recorded.get() is not None


@contextmanager
def recording() -> Iterator[dict[str, list[Tensor]]]:
    recorded: dict[str, list[Tensor]] = {}
    token = _recorded.set(recorded)
    try:
        yield recorded
    finally:
        _recorded.reset(token)
