"""Partitions on disk: clicks cut by their users into parts that fit in memory, for a load that can go on later.

A part is a folder with a piece of each block that was added; it is removed when it is done. So what is left of an
interrupted load are the parts that were not.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from service.errors import LoadError

ROWS_A_PART = 200_000
_STATE = "state.json"
_PART = " part"


class Partitions:
    """Clicks of one user are in one part, in the order in which they were added."""

    def __init__(self, folder: Path, num_clicks: int) -> None:
        self._folder = folder
        self._sizes = [0] * max(-(-num_clicks // ROWS_A_PART), 1)
        self._num_pieces = 0
        self.is_complete = False
        """Whether all clicks were added."""
        state = folder / _STATE
        if state.exists():
            self._sizes = json.loads(state.read_text())
            self.is_complete = True

    @property
    def num_clicks(self) -> int:
        return sum(self._sizes)

    @property
    def num_done(self) -> int:
        return sum(size for part, size in enumerate(self._sizes) if not self._part(part).exists())

    def add(self, clicks: pl.DataFrame) -> None:
        parts = clicks.with_columns((pl.col("user").hash(seed=0) % len(self._sizes)).cast(pl.Int64).alias(_PART))
        for (part,), piece in parts.partition_by(_PART, include_key=False, as_dict=True).items():
            with _writing(self._folder):
                self._part(part).mkdir(exist_ok=True)
                piece.write_ipc(self._part(part) / f"{self._num_pieces:06d}.arrow")
            self._sizes[part] += piece.height
        self._num_pieces += 1

    def complete(self) -> None:
        """Says that all was added: from here on the load can go on after an interruption."""
        unfinished = self._folder / "unfinished"
        with _writing(self._folder):
            unfinished.write_text(json.dumps(self._sizes))
            unfinished.rename(self._folder / _STATE)
        self.is_complete = True

    def parts(self, shrink: Callable[[pl.DataFrame], pl.DataFrame]) -> Iterator[tuple[pl.DataFrame, int]]:
        """The clicks of each part that is left, and how many were added; it is done when the next one is asked for.

        A part that grows too large, as of a user who clicks without end, is made smaller by `shrink` as it is read.
        """
        for part, size in enumerate(self._sizes):
            if not self._part(part).exists():
                continue
            clicks = pl.DataFrame()
            for piece in sorted(self._part(part).glob("*.arrow")):
                more = pl.read_ipc(piece)
                clicks = pl.concat([clicks, more]) if clicks.width else more
                if clicks.height > 2 * ROWS_A_PART:
                    clicks = shrink(clicks)
            yield clicks, size
            shutil.rmtree(self._part(part))

    def _part(self, part: int) -> Path:
        return self._folder / f"{part:06d}"


@contextmanager
def opened(folder: Path, num_clicks: int, *, resume: bool) -> Iterator[Partitions]:
    """Partitions in a folder, which goes when all is done, and when it could not go on from there.

    Without `resume`, and where there is nothing to go on with, they are empty. Raises LoadError where another load is
    at work in the folder, and where it cannot be written.
    """
    with _writing(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise LoadError(f"{folder}: the folder of this load belongs to another user; set TMPDIR to another place")
        lock = (folder / "lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LoadError(f"{folder}: another load of the same file into the same store is under way") from None
        if not (resume and (folder / _STATE).exists()):
            _empty(folder)
        partitions = Partitions(folder, num_clicks)
        try:
            yield partitions
        except BaseException:
            if not partitions.is_complete:
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def _empty(folder: Path) -> None:
    # The state first: what is left of a deletion that was interrupted is nothing to go on with.
    (folder / _STATE).unlink(missing_ok=True)
    for part in folder.iterdir():
        if part.is_dir():
            shutil.rmtree(part)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as err:
        raise LoadError(
            f"{folder}: the clicks cannot be kept there meanwhile: {err}; TMPDIR names another place"
        ) from err
