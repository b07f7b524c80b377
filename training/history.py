"""Which clicks a row may see: the history rule of `models.encoding.history`, for a whole log at once."""

import numpy as np
import polars as pl
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def clicks_of(rows: pl.DataFrame) -> pl.DataFrame:
    """All clicks of known users in history order: by user, then time, then item id (by code point)."""
    return rows.filter((pl.col("label") == 1) & (pl.col("group") >= 0)).sort("group", "ts", "item")


def windows(rows: pl.DataFrame, clicks: pl.DataFrame) -> tuple[Ints, Ints]:
    """Each row's history as `start:end` into the clicks, which are in history order: its user's, strictly earlier.

    A click of the row's own time is not in it, the row's own least of all.
    """
    users, click_users = rows["group"].to_numpy(), clicks["group"].to_numpy()
    is_click = np.repeat([0, 1], [len(users), len(click_users)])
    times = np.concatenate([rows["ts"].to_numpy(), clicks["ts"].to_numpy()])
    # At equal times a row stands before the clicks, so it counts none of them.
    order = np.lexsort((is_click, times, np.concatenate([users, click_users])))
    seen = np.empty(len(order), dtype=np.int64)
    seen[order] = np.cumsum(is_click[order])
    return np.searchsorted(click_users, users, side="left"), seen[: len(users)]
