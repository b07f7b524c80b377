"""What became of every request of a run, and the figures that sum it up."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

OK = 200
PRIOR = 1  # in the place of a 200 that holds the arm's prior, as the deadline had passed: nothing was scored
REFUSED = (PRIOR, 503, 504)
NO_ANSWER = 0  # in the place of a status: the connection broke, or nothing came until the run was over

MAX_LAG_S = 0.001
MAX_LAG_SHARE = 0.1  # of the p99 that was measured
MAX_BUSY = 0.9  # of a core


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run, a place in every array for each request that was due; times in seconds."""

    due_s: NDArray[np.float64]  # from the start of the run
    lag_s: NDArray[np.float64]  # by which the generator looked at it too late
    latency_s: NDArray[np.float64]  # from when it was due to the last byte of its answer; NaN without one
    status: NDArray[np.int16]
    candidates: NDArray[np.int32]
    degraded: NDArray[np.bool_]
    seconds: float  # that requests were sent for
    busy: float  # share of a core that the busiest generator took
    starved: int = 0  # requests that were due when every connection was in use

    def during(self, spans: Sequence[tuple[float, float]]) -> NDArray[np.bool_]:
        """Which requests were due in any of these spans of time."""
        inside = np.zeros(len(self.due_s), dtype=np.bool_)
        for start, end in spans:
            inside |= (self.due_s >= start) & (self.due_s < end)
        return inside

    def part(self, chosen: NDArray[np.bool_], seconds: float) -> "Outcome":
        """Those requests as a run of their own."""
        arrays: dict[str, Any] = {
            name: value[chosen] for name, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        return replace(self, **arrays, seconds=seconds, starved=0)


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """What several generators sent at the same time."""
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(outcome, name) for outcome in outcomes])
        for name, value in vars(outcomes[0]).items()
        if isinstance(value, np.ndarray)
    }
    return replace(
        outcomes[0],
        **arrays,
        seconds=max(outcome.seconds for outcome in outcomes),
        busy=max(outcome.busy for outcome in outcomes),
        starved=sum(outcome.starved for outcome in outcomes),
    )


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A run in numbers; a percentile of nothing is None. Latencies are those of answers with 200, from the schedule."""

    requests: int
    offered_per_s: float
    goodput_per_s: float  # answers with 200 within the deadline
    candidates_per_s: float  # in answers with 200
    late_per_s: float  # answers with 200 after it
    refused_per_s: float
    refused_p99_ms: float | None
    errors: int  # other statuses, and no answer
    degraded: int
    p50_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    lag_p99_ms: float
    busy: float
    starved: int

    @property
    def excuse(self) -> str | None:
        """Why these numbers are the generator's own and not the service's; None where they are not."""
        if self.busy > MAX_BUSY:
            return f"a generator took {self.busy:.0%} of its core"
        if self.lag_p99_ms > 1000 * MAX_LAG_S:
            return f"one request in a hundred was sent more than {self.lag_p99_ms:.2f} ms late"
        if self.p99_ms is not None and self.lag_p99_ms > MAX_LAG_SHARE * self.p99_ms:
            return f"one request in a hundred was sent {self.lag_p99_ms:.2f} ms late, of a p99 of {self.p99_ms:.2f} ms"
        return None


def figures(outcome: Outcome, deadline_s: float) -> Figures:
    ok = outcome.status == OK
    refused = np.isin(outcome.status, REFUSED)
    with np.errstate(invalid="ignore"):
        in_time = ok & (outcome.latency_s <= deadline_s)
    seconds = max(outcome.seconds, 1e-9)
    p50, p99, p999 = (percentile_ms(outcome.latency_s[ok], share) for share in (0.5, 0.99, 0.999))
    return Figures(
        requests=len(ok),
        offered_per_s=len(ok) / seconds,
        goodput_per_s=int(in_time.sum()) / seconds,
        candidates_per_s=int(outcome.candidates[ok].sum()) / seconds,
        late_per_s=int((ok & ~in_time).sum()) / seconds,
        refused_per_s=int(refused.sum()) / seconds,
        refused_p99_ms=percentile_ms(outcome.latency_s[refused], 0.99),
        errors=int((~ok & ~refused).sum()),
        degraded=int(outcome.degraded.sum()),
        p50_ms=p50,
        p99_ms=p99,
        p999_ms=p999,
        lag_p99_ms=percentile_ms(outcome.lag_s, 0.99) or 0.0,
        busy=outcome.busy,
        starved=outcome.starved,
    )


def percentile_ms(seconds: NDArray[np.float64], share: float) -> float | None:
    """The smallest of the values that at least that share of them does not exceed: one that was measured."""
    if not len(seconds):
        return None
    return 1000 * float(np.quantile(seconds, share, method="inverted_cdf"))


def share_within(outcome: Outcome, seconds: float) -> float:
    """Of all requests that were due, those answered with 200 within that time. Without any request, all of them."""
    if not len(outcome.status):
        return 1.0
    with np.errstate(invalid="ignore"):
        return float(((outcome.status == OK) & (outcome.latency_s <= seconds)).mean())
