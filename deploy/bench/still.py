"""How still the machine is: what it does to a process that reads the clock and nothing else, on every core at once.

    python deploy/bench/still.py [SECONDS]

A shared machine stops its guests for milliseconds. No latency measured on it can be better than that, whatever is
measured: where a core is stopped 6 times a second for over 2 ms, one in a hundred of 500 requests a second is too late
for a bound of 2 ms before it has been looked at.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

OVER_MS = 2.0  # shorter stops are not told
SECONDS = 4.0


@dataclass(frozen=True, kw_only=True)
class Still:
    """The stops of one core that were longer than OVER_MS."""

    core: int
    per_s: float
    longest_ms: float
    share: float  # of the time

    def __str__(self) -> str:
        often = f"{self.per_s:.1f} stops over {OVER_MS:g} ms a second, the longest {self.longest_ms:.1f} ms"
        return f"core {self.core} with nothing to do: {often}, {self.share:.1%} of the time"


def measured(cores: Sequence[int], seconds: float = SECONDS) -> list[Still]:
    """All of them at the same time, as a service and its load would have them."""
    command = [sys.executable, __file__, "--core"]
    watching = [
        subprocess.Popen([*command, str(core), str(seconds)], stdout=subprocess.PIPE, text=True) for core in cores
    ]
    return [Still(**json.loads(process.communicate()[0])) for process in watching]


def watch(core: int, seconds: float, *, clock: Callable[[], float] = time.perf_counter) -> Still:
    """Every reading that is OVER_MS later than the one before was a stop."""
    stops_ms: list[float] = []
    began = before = clock()
    while before < began + seconds:
        now = clock()
        if 1000 * (now - before) > OVER_MS:
            stops_ms.append(1000 * (now - before))
        before = now
    took_s = before - began
    return Still(
        core=core,
        per_s=len(stops_ms) / took_s,
        longest_ms=max(stops_ms, default=0.0),
        share=sum(stops_ms) / 1000 / took_s,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--core"]:
        only, how_long = int(sys.argv[2]), float(sys.argv[3])
        os.sched_setaffinity(0, [only])
        print(json.dumps(vars(watch(only, how_long))))
    else:
        for core in measured(sorted(os.sched_getaffinity(0)), *map(float, sys.argv[1:2])):
            print(core)
