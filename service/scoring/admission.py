"""Admission control: reject a request on arrival if the work already admitted would make it miss its deadline."""

from service.deadline import Deadline
from service.errors import WouldBeLate


class AdmissionController:
    """Requests under way, in seconds that they are expected to keep the process busy.

    Under overload a process would otherwise spend itself on requests whose scores come too late for anybody.
    """

    def __init__(self) -> None:
        self._num_admitted = 0
        self._backlog_s = 0.0

    @property
    def backlog_s(self) -> float:
        """How long a request that comes now has to wait, at most: those under way may be half done."""
        return self._backlog_s

    def check(self, deadline: Deadline) -> None:
        """Raises WouldBeLate where no request could be scored before the deadline, however small."""
        if self._num_admitted and self._backlog_s > deadline.left_s:
            raise WouldBeLate(self._backlog_s)

    def admit(self, expected_s: float, deadline: Deadline) -> None:
        """Counts a request in until `release`. Raises WouldBeLate where it would be scored after its deadline.

        With nothing under way it is let in all the same: only answers can show that the process has become faster.
        """
        if self._num_admitted and self._backlog_s + expected_s > deadline.left_s:
            raise WouldBeLate(self._backlog_s)
        self._num_admitted += 1
        self._backlog_s += expected_s

    def release(self, expected_s: float) -> None:
        """The request is answered, refused or gone."""
        self._num_admitted -= 1
        self._backlog_s = self._backlog_s - expected_s if self._num_admitted else 0.0  # no rounding is left over
