"""Which clicks a row may see: the history rule of `models.features.encoder.history`, for a whole log at once."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from training.data.time_order import BLOCK

Ints = NDArray[np.int64]


def clicks_of(rows: pl.LazyFrame, history: Literal["clicks", "impressions"] = "clicks") -> pl.DataFrame:
    """All clicks (or all rows) of known users in history order: by user, then time, then item id (by code point)."""
    is_past = pl.col("label") == 1 if history == "clicks" else pl.lit(value=True)
    past = rows.filter(is_past & (pl.col("group") >= 0)).collect(engine="streaming")
    return past.sort("group", "ts", "item", maintain_order=True)


def in_blocks(clicks: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """All clicks in order; without any, one block of none, as the files of their arrays must be there too."""
    for first in range(0, max(clicks.height, 1), BLOCK):
        yield clicks[first : first + BLOCK]


class Windows:
    """Each row's history as `start:end` into the clicks, which are in history order: its user's, strictly earlier.

    A click of the row's own time is not in it, the row's own least of all.
    """

    def __init__(self, clicks: pl.DataFrame) -> None:
        self._users = clicks["group"].to_numpy()
        self._times, rank = np.unique(clicks["ts"].to_numpy(), return_inverse=True)
        # One whole number that orders the clicks by user, then time.
        self._moments = self._users * (len(self._times) + 1) + rank

    def __call__(self, rows: pl.DataFrame) -> tuple[Ints, Ints]:
        users = rows["group"].to_numpy()
        starts = np.searchsorted(self._users, users, side="left")
        # A click of the row's own time has the row's own rank, so it is not counted.
        rank = np.searchsorted(self._times, rows["ts"].to_numpy(), side="left")
        return starts, np.searchsorted(self._moments, users * (len(self._times) + 1) + rank, side="left")
