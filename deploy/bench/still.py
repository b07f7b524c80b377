"""How still the machine is: what it does to a process that reads the clock and nothing else, on every core at once.

    python deploy/bench/still.py [SECONDS]

A shared machine stops its guests for milliseconds. No latency measured on it can be better than that, whatever is
measured: where a core is stopped 6 times a second for over 2 ms, one in a hundred of 500 requests a second is too late
for a bound of 2 ms before it has been looked at.
"""

import argparse
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float, nargs="?", default=SECONDS)
    parser.add_argument("--core", type=int, help="watch this one alone, and tell it as JSON")
    options = parser.parse_args()
    if options.core is not None:
        os.sched_setaffinity(0, [options.core])
        print(json.dumps(vars(watch(options.core, options.seconds))))
    else:
        for core in measured(sorted(os.sched_getaffinity(0)), options.seconds):
            print(core)
