"""Identity of one worker process: its slot, how many workers there are, and the folder they share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """`slot` is 0 to `workers` - 1 and stays the same when a dead worker is replaced.

    `folder` belongs to all workers of one service, and to nobody else: made before the first starts, removed when the
    last has ended. None where one process serves alone.
    """

    slot: int
    workers: int
    folder: Path | None

    @classmethod
    def alone(cls) -> Self:
        return cls(slot=0, workers=1, folder=None)
