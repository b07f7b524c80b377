"""How fast a process gets through its requests as a whole: who would come too late is told before any work for it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.deadline import Deadline
from service.errors import predicted_late

EVENT = 200  # what a request takes of the event loop beside its candidates, in candidates
FADE = 0.02  # of what is known, by each answer
CAP = 4.0  # a page of metrics or of events in between is no part of a prediction: at most so many times what is known


class Pace:
    """Requests under way, in seconds that they take of the event loop and of the model.

    The line before the model sees a request only after it was parsed, fetched and encoded, which takes longer than
    most models: under overload a process would spend itself on requests that it then refuses. The event loop's part is
    learnt from its thread's processor time between answers, in which waiting for the store does not count.
    """

    def __init__(self, *, spent: Callable[[], float] = time.thread_time) -> None:
        self._spent = spent
        self._candidate_s: float | None = None  # of the event loop
        self._before = 0.0
        self._candidates = 0
        self._model_s = 0.0

    @property
    def ahead_s(self) -> float:
        """How long a request that comes now has to wait, at most: those under way may be half done."""
        return self._candidates * (self._candidate_s or 0.0) + self._model_s

    def check(self, deadline: Deadline) -> None:
        """Raises Problem (503) where no request could be scored before the deadline, however small."""
        if self._candidates and self.ahead_s > deadline.left_s:
            raise predicted_late(self.ahead_s)

    @contextmanager
    def admitted(self, num_candidates: int, model_s: float, deadline: Deadline) -> Iterator[None]:
        """Around all the work for a request, of which the model is expected to take `model_s`.

        Raises Problem (503) where it would be scored after its deadline. With nothing under way it is let in all the
        same: only answers can show that the process has become faster.
        """
        candidates = EVENT + num_candidates
        own_s = candidates * (self._candidate_s or 0.0) + model_s
        if self._candidates and self.ahead_s + own_s > deadline.left_s:
            raise predicted_late(self.ahead_s)
        if not self._candidates:
            self._before = self._spent()
        self._candidates += candidates
        self._model_s += model_s
        try:
            yield
            self._answered(candidates)
        finally:
            self._candidates -= candidates
            self._model_s = self._model_s - model_s if self._candidates else 0.0  # no rounding is left over

    def _answered(self, candidates: int) -> None:
        """What the loop spent since the last answer, or since it had nothing to do, it spent for this one."""
        now = self._spent()
        took_s = (now - self._before) / candidates
        self._before = now
        known = took_s if self._candidate_s is None else self._candidate_s
        self._candidate_s = known + FADE * (min(took_s, CAP * known) - known)
