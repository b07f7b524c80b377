"""Deadline of a request: when its answer stops being of use."""

import time
from dataclasses import dataclass
from typing import Self

from service.errors import DeadlinePassed


@dataclass(frozen=True, slots=True)
class Deadline:
    """`at` is on the monotonic clock."""

    at: float
    timeout_ms: float

    @classmethod
    def after(cls, timeout_ms: float, *, since: float) -> Self:
        return cls(since + timeout_ms / 1000, timeout_ms)

    @property
    def left_s(self) -> float:
        """Below 0 once it has passed."""
        return self.at - time.monotonic()

    def check(self) -> None:
        """Raises DeadlinePassed once it has."""
        if self.left_s < 0:
            raise DeadlinePassed(self.timeout_ms)
