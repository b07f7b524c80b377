"""What a field learns from the training part: how often each value stands there, its vocabulary, its statistics."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.features.values import (
    Columns,
    SchemaError,
    Tally,
    Transform,
    canonical,
    is_null_text,
    transformed,
    without_nulls,
)

if TYPE_CHECKING:
    from models.features.field import FieldSpec

TAIL = 0.005  # of the training part at either end, cut
# A range so many times the width of the middle half leaves that half one point; logarithms have no long tails.
FAR: Mapping[Transform, float] = {"none": 100.0, "log": 20.0, "quantile": 20.0}
FENCE = 3.0  # quartile distances beyond the quartiles, as Tukey's outer fence
STEPS = 256  # of transform quantile


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
    null_values = spec.null_values if spec.discretise is None else ()  # of levels, none is absent
    try:
        for value, count in zip(values, value_counts, strict=True):
            spelling = canonical(value)
            if spelling is not None and not is_null_text(spelling, null_values):
                counts[spelling] += int(count)
    except TypeError as err:
        raise SchemaError(f"field {spec.name}: kind {spec.kind} wants strings or numbers ({err})") from err
    kept = [(value, count) for value, count in counts.items() if count >= spec.min_count]
    return tuple(value for value, _ in sorted(kept, key=lambda item: (-item[1], item[0])))


def numbers_of(spec: "FieldSpec", listed: Sequence[Any] | NDArray[Any]) -> NDArray[np.float64]:
    if isinstance(listed, np.ndarray) and listed.dtype.kind in "iuf":
        values = listed.astype(np.float64)
    else:
        values = _parsed(spec, listed)
    if np.isinf(values).any():
        raise SchemaError(f"field {spec.name}: infinite values in the training part")
    return without_nulls(values, spec.null_values)


def _parsed(spec: "FieldSpec", listed: Sequence[Any] | NDArray[Any]) -> NDArray[np.float64]:
    wrong = next((v for v in listed if isinstance(v, str | bool)), None)  # numpy would take "3.5" and True for numbers
    try:
        values = np.array([math.nan if v is None else v for v in listed], dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as err:
        raise SchemaError(f"field {spec.name}: kind {spec.kind} wants numbers ({err})") from err
    if wrong is not None:
        raise SchemaError(f"field {spec.name}: kind {spec.kind} wants numbers, got {wrong!r:.80}")
    return values


def statistics_of(spec: "FieldSpec", tally: Tally) -> dict[str, Any]:
    """Where a numeric field is cut, moved to and scaled by, all on its transformed scale."""
    listed = numbers_of(spec, tally.values)
    present = ~np.isnan(listed)
    if not present.any():
        raise SchemaError(f"field {spec.name}: no number in the training part")
    weights = np.asarray(tally.counts, dtype=np.float64)[present]
    fitted: dict[str, Any] = {}
    if spec.transform == "quantile":
        fitted["quantiles"] = quantiles_of(*_counted(listed[present], weights))
    on_scale = transformed(spec.transform, listed[present], fitted.get("quantiles"))
    values, counts = _counted(on_scale, weights)
    if spec.clip:
        low, high = bounds_of(values, counts, FAR[spec.transform])
        fitted |= {"low": low, "high": high}
        values = np.clip(values, low, high)
    low, high = float(values[0]), float(values[-1])
    if low == high:  # asked first: the mean of equal numbers may round to another
        return {**fitted, "shift": low, "scale": 1.0}
    shift, scale = (low, high - low) if spec.normalise == "min_max" else _mean_and_deviation(values, counts)
    if not (math.isfinite(shift) and math.isfinite(scale) and scale > 0):
        raise SchemaError(f"field {spec.name}: numbers from {low:g} to {high:g} have no mean and spread in a double")
    return {**fitted, "shift": shift, "scale": scale}


def bounds_of(values: NDArray[np.float64], counts: NDArray[np.float64], far: float) -> tuple[float, float]:
    """Between which numbers a field is kept: the middle 99 % of it, and less where that is mostly empty.

    One price of 1e12, or -999999999 in a tenth of the rows, would make all others the same number. So where the middle
    99 % is more than `far` times as wide as the middle half of what lies inside it, it is cut three widths of that half
    beyond it. Of a column that is mostly one value the other values' middle half counts.
    """
    low, high = _at(values, counts, TAIL), _at(values, counts, 1 - TAIL)
    inside = (values > low) & (values < high)
    first, third = _middle_half(values[inside], counts[inside])
    width = third - first
    if not 0 < far * width < high - low:
        return low, high
    return max(low, first - FENCE * width), min(high, third + FENCE * width)


def _middle_half(values: NDArray[np.float64], counts: NDArray[np.float64]) -> tuple[float, float]:
    if values.size < 2:
        return 0.0, 0.0
    first, third = _at(values, counts, 0.25), _at(values, counts, 0.75)
    if first < third:
        return first, third
    others = values != first
    return _at(values[others], counts[others], 0.25), _at(values[others], counts[others], 0.75)


def quantiles_of(values: NDArray[np.float64], counts: NDArray[np.float64]) -> tuple[float, ...]:
    """At most STEPS + 1 different numbers that part the training part into steps of equal share."""
    return tuple(sorted({_at(values, counts, share) for share in np.linspace(0, 1, STEPS + 1)}))


def _at(values: NDArray[np.float64], counts: NDArray[np.float64], share: float) -> float:
    """The smallest value with at least this share of all at or below it."""
    below = np.cumsum(counts)
    return float(values[min(int(np.searchsorted(below, share * below[-1] - 1e-9)), len(values) - 1)])


def _counted(
    values: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    different, which = np.unique(values, return_inverse=True)
    return different, np.bincount(which, weights=weights).astype(np.float64)


def _mean_and_deviation(values: NDArray[np.float64], counts: NDArray[np.float64]) -> tuple[float, float]:
    # fsum is exact: the same in whatever order and blocks the values were counted.
    num = float(counts.sum())
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            mean = math.fsum(values * counts) / num
            return mean, math.sqrt(math.fsum(np.square(values - mean) * counts) / num)
        except (OverflowError, ValueError):  # sums beyond a double
            return math.nan, math.nan
