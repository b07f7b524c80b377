"""What a user may choose about a data set: `--set key=value` to a checked dataclass."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from pydantic import TypeAdapter, ValidationError

from training.errors import UserError
from training.log import Log


def parse(dataset: str, load: Callable[..., Log], assignments: Sequence[str]) -> Any | None:
    """The options of a loader `load(source, options)`, its defaults changed as told; None for one that has none.

    Raises UserError for an unknown key and for a value that the option cannot have.
    """
    parameter = inspect.signature(load).parameters.get("options")
    if parameter is None:
        if assignments:
            raise UserError(f"--set {assignments[0]}: {dataset} has no options")
        return None
    kind: type[Any] = parameter.annotation
    known = [f.name for f in fields(kind)]
    values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set wants key=value, got {assignment!r}")
        if key not in known:
            close = get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise UserError(f"--set {key}: {dataset} has no such option; {hint}")
        values[key] = text
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "options"
        raise UserError(
            f"--set {key}: {first['msg'].removeprefix('Value error, ')}, got {first['input']!r:.60}"
        ) from err
