"""Recent requests of each arm, to warm a new version with what it is going to meet."""

from collections import defaultdict, deque
from collections.abc import Sequence

from service.scoring.request import ScoringRequest

MAX_REQUESTS = 64  # of an arm: the objects that were there anyway, so keeping one costs no copy


class RecentRequests:
    def __init__(self) -> None:
        self._by_arm: defaultdict[str, deque[ScoringRequest]] = defaultdict(lambda: deque(maxlen=MAX_REQUESTS))

    def add(self, arm: str, request: ScoringRequest) -> None:
        self._by_arm[arm].append(request)

    def of(self, arm: str) -> Sequence[ScoringRequest]:
        """The oldest first."""
        return list(self._by_arm[arm])
