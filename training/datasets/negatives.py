"""What a user did not choose, drawn for each thing that it did choose: negatives for logs that hold positives only."""

from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from training.errors import UserError

Ints = NDArray[np.int64]
Sampling = Literal["uniform", "popularity"]

ROUNDS = 20  # after so many tries, only users that know nearly every item are left


def with_negatives(
    positives: pl.DataFrame, known: pl.DataFrame, *, each: int, seed: int, sampling: Sampling = "uniform"
) -> pl.DataFrame:
    """Every positive (label 1) followed by its `each` negatives (label 0), alike in all columns but the `item`.

    A negative is an item that the user has nowhere in `known`, whose pairs (user, item) hold the positives' and maybe
    more. It is drawn from all items of `known` alike, or (popularity) from the positives' items by how many positives
    each has; every draw is on its own, so a positive may get the same one twice. The same seed and pairs give the same
    negatives in any order of `known`. Raises UserError where a user has every item.
    """
    pool = known["item"] if sampling == "uniform" else positives["item"]
    ids = pool.unique().sort()
    weights = np.ones(len(ids))
    if sampling == "popularity":
        weights = positives["item"].value_counts(sort=False).sort("item")["count"].to_numpy().astype(np.float64)
    names = known["user"].unique().sort()
    pairs = known.select("user", "item").unique().filter(pl.col("item").is_in(ids.implode()))
    taken = np.sort(_codes(pairs["user"], names) * len(ids) + _codes(pairs["item"], ids))
    full = np.bincount(taken // len(ids), minlength=len(names)) == len(ids)
    owners = np.repeat(_codes(positives["user"], names), each)
    if full[owners].any():
        user = names[int(owners[full[owners].argmax()])]
        raise UserError(f"no negative can be drawn for user {user}: all {len(ids)} items are among its positives")
    items = ids[draw(owners, taken, weights, np.random.default_rng(seed))]
    labels = np.tile([1, *[0] * each], positives.height).astype(np.int8)
    rows = positives[np.repeat(np.arange(positives.height), each + 1)]
    at = np.cumsum(labels == 0) - 1  # a row's place among the negatives, of use where it is one
    chosen = pl.when(pl.col("label") == 0).then(items[np.maximum(at, 0)] if each else None).otherwise(pl.col("item"))
    return rows.with_columns(pl.Series("label", labels)).with_columns(chosen.alias("item"))


def draw(owners: Ints, taken: Ints, weights: NDArray[np.float64], rng: np.random.Generator) -> Ints:
    """One item number for every owner, with the odds of its weight among the items that the owner has not.

    `taken` are the pairs that may not be drawn, each as user * number of items + item, sorted.
    """
    ladder = np.cumsum(weights) / weights.sum()
    drawn = np.empty(len(owners), dtype=np.int64)
    missing = np.arange(len(owners))
    for _ in range(ROUNDS):
        # The last sum may round to a little under 1, and a draw fall beyond it.
        tries = np.minimum(np.searchsorted(ladder, rng.random(len(missing)), side="right"), len(weights) - 1)
        drawn[missing] = tries
        missing = missing[_holds(taken, owners[missing] * len(weights) + tries)]
    for user in np.unique(owners[missing]).tolist():
        mine = missing[owners[missing] == user]
        first, last = np.searchsorted(taken, [user * len(weights), (user + 1) * len(weights)])
        free = np.setdiff1d(np.arange(len(weights)), taken[first:last] % len(weights), assume_unique=True)
        drawn[mine] = rng.choice(free, size=len(mine), p=weights[free] / weights[free].sum())
    return drawn


def _codes(values: pl.Series, ids: pl.Series) -> Ints:
    return ids.search_sorted(values).to_numpy().astype(np.int64)


def _holds(taken: Ints, pairs: Ints) -> NDArray[np.bool_]:
    places = np.minimum(np.searchsorted(taken, pairs), len(taken) - 1)
    found: NDArray[np.bool_] = taken[places] == pairs
    return found
