"""Results of a run: the outcome of every request, and the statistics that sum it up."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

OK = 200
PRIOR = 1  # in place of a 200 that holds the arm's prior, as the deadline had passed: nothing was scored
REFUSED = (PRIOR, 503, 504)
NO_ANSWER = 0  # in place of a status: the connection broke, or no answer came until the run was over

MAX_LAG_S = 0.001
MAX_LAG_SHARE = 0.1  # of the p99 that was measured
MAX_BUSY = 0.9  # of a core


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run; every array has an element for each request that was due. Times in seconds."""

    due_s: NDArray[np.float64]  # from the start of the run
    lag_s: NDArray[np.float64]  # from when it was due to when the generator noticed
    latency_s: NDArray[np.float64]  # from when it was due to the last byte of its answer; NaN without one
    status: NDArray[np.int16]
    candidates: NDArray[np.int32]
    degraded: NDArray[np.bool_]
    seconds: float  # that requests were sent for
    busy: float  # share of a core that the busiest generator took
    num_connection_waits: int = 0  # requests that were due when every connection was in use

    def due_within(self, spans: Sequence[tuple[float, float]]) -> NDArray[np.bool_]:
        """Mask of the requests that were due in any of these time spans."""
        inside = np.zeros(len(self.due_s), dtype=np.bool_)
        for start, end in spans:
            inside |= (self.due_s >= start) & (self.due_s < end)
        return inside

    def subset(self, mask: NDArray[np.bool_], seconds: float) -> "Outcome":
        """The masked requests as a separate run."""
        arrays: dict[str, Any] = {
            name: value[mask] for name, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        return replace(self, **arrays, seconds=seconds, num_connection_waits=0)


def merge(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcomes of several generators that ran at the same time, as one."""
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
        num_connection_waits=sum(outcome.num_connection_waits for outcome in outcomes),
    )


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Statistics of a run. Latencies are of answers with 200 and from the schedule; a percentile of nothing is None."""

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
    num_connection_waits: int

    @property
    def invalid_reason(self) -> str | None:
        """Why the figures say nothing of the service: the generator was the limit. None where they are valid."""
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
        num_connection_waits=outcome.num_connection_waits,
    )


def percentile_ms(seconds: NDArray[np.float64], share: float) -> float | None:
    """The smallest of the values that at least that share of them does not exceed: one that was measured."""
    if not len(seconds):
        return None
    return 1000 * float(np.quantile(seconds, share, method="inverted_cdf"))


def share_within(outcome: Outcome, seconds: float) -> float:
    """The share of the requests that were due which got a 200 within that time; 1 where there was none."""
    if not len(outcome.status):
        return 1.0
    with np.errstate(invalid="ignore"):
        return float(((outcome.status == OK) & (outcome.latency_s <= seconds)).mean())
