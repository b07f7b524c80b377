"""What a field learns from the training part: how often each value stands there, its vocabulary, its statistics."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.features.values import Columns, SchemaError, Tally, canonical

if TYPE_CHECKING:
    from models.features.field import FieldSpec


def tally_of(spec: "FieldSpec", columns: Columns) -> Tally:
    if spec.name not in columns:
        raise SchemaError(f"field {spec.name}: no such column; there are {', '.join(sorted(columns))}")
    column = columns[spec.name]
    values = column.tolist() if isinstance(column, np.ndarray) else list(column)
    if spec.kind == "numeric" or spec.discretise is not None:
        return Tally(values=values, counts=np.ones(len(values), dtype=np.int64))
    longest = 1
    if spec.kind == "multi":
        rows: list[Any] = [row if row is not None else () for row in values]
        if any(isinstance(row, str) or not isinstance(row, Iterable) for row in rows):
            raise SchemaError(f"field {spec.name}: kind multi wants a list of values in every row")
        longest = max((len(row) for row in rows), default=1)
        values = list(chain.from_iterable(rows))
    try:
        counted = Counter(values)
    except TypeError as err:
        raise SchemaError(f"field {spec.name}: kind {spec.kind} wants strings or numbers ({err})") from err
    return Tally(values=list(counted), counts=list(counted.values()), most_values=longest)


def vocabulary_of(
    spec: "FieldSpec", values: Sequence[Any], value_counts: Sequence[int] | NDArray[np.int64]
) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    try:
        for value, count in zip(values, value_counts, strict=True):
            spelling = canonical(value)
            if spelling is not None:
                counts[spelling] += int(count)
    except TypeError as err:
        raise SchemaError(f"field {spec.name}: kind {spec.kind} wants strings or numbers ({err})") from err
    kept = [(value, count) for value, count in counts.items() if count >= spec.min_count]
    return tuple(value for value, _ in sorted(kept, key=lambda item: (-item[1], item[0])))


def numbers_of(spec: "FieldSpec", listed: Sequence[Any]) -> NDArray[np.float64]:
    wrong = next((v for v in listed if isinstance(v, str | bool)), None)  # numpy would take "3.5" and True for numbers
    try:
        values = np.array([math.nan if v is None else v for v in listed], dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as err:
        raise SchemaError(f"field {spec.name}: kind {spec.kind} wants numbers ({err})") from err
    if wrong is not None:
        raise SchemaError(f"field {spec.name}: kind {spec.kind} wants numbers, got {wrong!r:.80}")
    if np.isinf(values).any():
        raise SchemaError(f"field {spec.name}: infinite values in the training part")
    return values


def statistics_of(spec: "FieldSpec", tally: Tally) -> dict[str, float]:
    listed = numbers_of(spec, tally.values)
    values, which = np.unique(listed[~np.isnan(listed)], return_inverse=True)
    if values.size == 0:
        raise SchemaError(f"field {spec.name}: no number in the training part")
    weights = np.asarray(tally.counts, dtype=np.float64)[~np.isnan(listed)]
    counts: NDArray[np.float64] = np.bincount(which, weights=weights).astype(np.float64)
    low, high = float(values[0]), float(values[-1])
    if low == high:  # asked first: the mean of equal numbers may round to another
        return {"shift": low, "scale": 1.0}
    shift, scale = (low, high - low) if spec.normalise == "min_max" else _mean_and_deviation(values, counts)
    if not (math.isfinite(shift) and math.isfinite(scale) and scale > 0):
        raise SchemaError(f"field {spec.name}: numbers from {low:g} to {high:g} have no mean and spread in a double")
    return {"shift": shift, "scale": scale}


def _mean_and_deviation(values: NDArray[np.float64], counts: NDArray[np.float64]) -> tuple[float, float]:
    # fsum is exact: the same in whatever order and blocks the values were counted.
    num = float(counts.sum())
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            mean = math.fsum(values * counts) / num
            return mean, math.sqrt(math.fsum(np.square(values - mean) * counts) / num)
        except (OverflowError, ValueError):  # sums beyond a double
            return math.nan, math.nan
