"""The requests that each arm answered last, to show a new version what it is going to meet."""

from collections import defaultdict, deque
from collections.abc import Sequence

from service.scoring.feature_merge import Given

KEPT = 64  # requests of an arm: the objects that were there anyway, so keeping one costs no copy


class Recent:
    def __init__(self) -> None:
        self._by_arm: defaultdict[str, deque[Given]] = defaultdict(lambda: deque(maxlen=KEPT))

    def add(self, arm: str, given: Given) -> None:
        self._by_arm[arm].append(given)

    def of(self, arm: str) -> Sequence[Given]:
        """The oldest first."""
        return list(self._by_arm[arm])
