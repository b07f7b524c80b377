"""The `load.py` command: its options, and the runs they stand for, in order."""

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from loadtest import report
from loadtest.capacity import find_knee
from loadtest.errors import BenchError
from loadtest.generator_pool import GeneratorPool, Interrupted
from loadtest.report import Row
from loadtest.request_bodies import RequestMix, read_requests, read_schema
from loadtest.results import OK, Outcome, figures, share_within
from loadtest.target import Target, run_command, stall, target

from service.process import cpu_count

SHARES = (0.5, 0.8, 1.0, 1.5)  # of the knee
EVENT_SHARE = 0.8  # at which a swap or a stall is looked at
WARM_CONNECTIONS = 2  # a core: few enough that their requests keep their deadline
WARM_UP_S = 2.0  # a closed loop before the search, from whose rate it starts
STALL_S = 2.0
SETTLE_S = 0.25  # after a swap or a stall, in which requests still count as due during it


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", required=True, help="of a running service: http://HOST:PORT")
    add("--rate", type=_positive, help="requests a second of one run; without it the knee is searched")
    add("--saturate", action="store_true", help="one run as a closed loop over all --connections: the most it can take")
    add("--seconds", type=_positive, default=10.0, help="of each run (default 10)")
    add("--window", type=_positive, default=3.0, help="seconds at each rate while the knee is searched (default 3)")
    add("--p99-ms", type=_positive, default=10.0, help="the knee: at most one request in 100 takes longer (default 10)")
    add("--timeout-ms", type=_positive, default=20.0, help="each request's deadline, which goodput keeps (default 20)")
    add("--form", choices=("list", "columnar"), default="list", help="of the candidates")
    add("--candidates", type=_positive_int, help="in every request; default: lognormal, median 100, at most 1000")
    add("--users", type=_positive_int, help="how many there are, drawn by Zipf (default: the schema's, or 10,000)")
    add("--items", type=_positive_int, help="the same of items")
    add("--zipf", type=_positive, default=1.0, help="exponent of both (default 1)")
    add("--schema", type=Path, help="an artifact's schema.json, to draw ids and values from its vocabularies")
    add(
        "--send", type=_groups, default="context", help="values to send: context, user, item or some of them, by commas"
    )
    add("--requests", type=Path, help="JSON bodies to send instead, one a line")
    add("--processes", type=_positive_int, help="generators (default: one for every two cores, at most 4)")
    add("--connections", type=_positive_int, default=256, help="at most, of all generators together (default 256)")
    add("--seed", type=_positive_int, default=2026)
    add("--pid", type=_positive_int, help="the service's process, to count its CPU and its children's from /proc")
    swap = "load a version, of several one after the other (default: current), at 80 %% of the knee, or at --rate"
    add("--swap", metavar="ARM[:VERSION,...]", help=swap)
    add("--swaps", type=_positive_int, default=1, help="how often, in one run (default 1)")
    add("--admin-token", default=os.environ.get("CLICKSERVE_ADMIN_TOKEN"), help="for --swap; or CLICKSERVE_ADMIN_TOKEN")
    add(
        "--store-pid",
        type=_positive_int,
        help="freeze that process, the store's, for 2 s at 80 %% of the knee, or at --rate",
    )
    add("--stall-store", metavar="COMMAND", help="run this then instead; the stall lasts as long as it does")
    add("--json", type=Path, metavar="FILE", help="write all figures there too")


def run(options: argparse.Namespace) -> int:
    """Measures and prints. 130 after Ctrl-C, with what there was until then. Raises BenchError in one sentence."""
    if options.swap is not None and not options.admin_token:
        raise BenchError("--swap needs --admin-token, or CLICKSERVE_ADMIN_TOKEN in the environment")
    service = target(options.url, pid=options.pid)
    mix = _mix(options)
    service.check(mix.draw(1, np.random.default_rng(options.seed))[0].content)
    processes = options.processes or min(4, max(1, cpu_count.usable() // 2))
    test = LoadTest(service, options)
    with GeneratorPool(
        service.address, mix, processes=processes, connections=options.connections, seed=options.seed
    ) as test.pool:
        try:
            test.measure()
        except Interrupted as cut:
            test.add("interrupted", cut.outcome)
            return 130
        except KeyboardInterrupt:
            return 130
        finally:
            test.print_results()
    return 0


class LoadTest:
    """Makes the runs and collects a row for each."""

    pool: GeneratorPool

    def __init__(self, service: Target, options: argparse.Namespace) -> None:
        self._target = service
        self._options = options
        self._rows: list[Row] = []
        self._knee: float | None = None

    def measure(self) -> None:
        rate, seconds = self._options.rate, self._options.seconds
        if self._options.saturate:
            self._run("closed loop", None, seconds)
            return
        if rate is None:
            self._knee = self._search()
            for share in SHARES:
                self._run(f"{share:.0%} of the knee", share * self._knee, seconds)
            rate = EVENT_SHARE * self._knee
        events = self._events()
        for name, actions in events.items():
            self._run_meanwhile(name, actions, rate, seconds)
        if self._options.rate is not None and not events:
            self._run(f"{rate:g}/s", rate, seconds)

    def add(self, label: str, outcome: Outcome, *, cpu_s: float | None = None, closed: bool = False) -> None:
        measured = figures(outcome, self._options.timeout_ms / 1000)
        answered = measured.candidates_per_s * outcome.seconds
        per_1000 = None if cpu_s is None or not answered else 1000 * cpu_s / answered
        self._rows.append(Row(label=label, figures=measured, cpu_s_per_1000=per_1000, closed=closed))

    def print_results(self) -> None:
        if self._knee is not None:
            bound, seconds = self._options.p99_ms, self._options.seconds
            print(f"knee: {self._knee:,.1f} requests/s, 99 % within {bound:g} ms of their schedule for {seconds:g} s")
        if self._rows:
            print(report.table(self._rows))
        for note in report.notes(self._rows):
            print(note)
        if self._options.json is not None:
            options = {name: str(v) if isinstance(v, Path) else v for name, v in vars(self._options).items()}
            options = {name: sorted(v) if isinstance(v, frozenset) else v for name, v in options.items()}
            del options["admin_token"]
            results = {"options": options, "knee_per_s": self._knee, "runs": [row.to_json() for row in self._rows]}
            try:
                self._options.json.write_text(json.dumps(results, indent=1) + "\n")
            except OSError as err:
                raise BenchError(f"--json {self._options.json}: {err.strerror}") from None

    def _run(self, label: str, rate: float | None, seconds: float) -> None:
        _say(f"{label} for {seconds:g} s")
        before = self._target.cpu_s()
        outcome = self.pool.run(rate, seconds)
        after = self._target.cpu_s()
        # A worker that was replaced takes its seconds with it.
        cpu_s = None if before is None or after is None or after < before else after - before
        self.add(label, outcome, cpu_s=cpu_s, closed=rate is None)

    def _search(self) -> float:
        bound_s = self._options.p99_ms / 1000
        _say(f"warming up, as a closed loop, for {WARM_UP_S:g} s")
        warm = self.pool.run(None, WARM_UP_S, connections=WARM_CONNECTIONS * cpu_count.usable())
        answered_per_s = float((warm.status == OK).sum()) / warm.seconds

        def holds(rate: float, seconds: float) -> bool:
            outcome = self.pool.run(rate, seconds)
            share = share_within(outcome, bound_s)
            found = figures(outcome, self._options.timeout_ms / 1000)
            p99 = "none" if found.p99_ms is None else f"{found.p99_ms:.2f} ms"
            note = f"; {found.invalid_reason}" if found.invalid_reason else ""
            _say(f"  {rate:,.1f}/s for {seconds:g} s: {share:.2%} within the bound, p99 of the answers {p99}{note}")
            return (1 - share) * found.requests <= max(0.01 * found.requests, 1)

        window, seconds = self._options.window, self._options.seconds
        return find_knee(
            lambda rate: holds(rate, window), lambda rate: holds(rate, seconds), start=0.6 * answered_per_s
        )

    def _events(self) -> dict[str, Sequence[Callable[[], None]]]:
        """Actions in the middle of a run, by name; several are spread over it."""
        options = self._options
        events: dict[str, Sequence[Callable[[], None]]] = {}
        if options.swap is not None:
            arm, _, versions = options.swap.partition(":")
            cycle = itertools.cycle((versions or "current").split(","))
            swaps = [partial(self._target.swap, arm, next(cycle), options.admin_token) for _ in range(options.swaps)]
            events[f"{options.swaps} swaps of {arm}"] = swaps
        if options.store_pid is not None:
            events["store frozen"] = [partial(stall, options.store_pid, STALL_S)]
        if options.stall_store is not None:
            events["store stalled"] = [partial(run_command, options.stall_store)]
        return events

    def _run_meanwhile(self, name: str, actions: Sequence[Callable[[], None]], rate: float, seconds: float) -> None:
        """A row for the requests that were due during an action, and one for the others."""
        _say(f"{name} at {rate:,.1f}/s")
        spans: list[tuple[float, float]] = []

        def meanwhile(start: float) -> None:
            for number, act in enumerate(actions, start=1):
                time.sleep(max(start + seconds * number / (len(actions) + 1) - time.monotonic(), 0))
                begun = time.monotonic()
                act()
                spans.append((begun - start, time.monotonic() - start + SETTLE_S))

        outcome = self.pool.run(rate, seconds, meanwhile=meanwhile)
        inside = outcome.due_within(spans)
        took = sum(min(end, seconds) - begun for begun, end in spans if begun < seconds)
        self.add(f"{name}: steady", outcome.subset(~inside, seconds - took))
        self.add(f"{name}: during ({took:.1f} s)", outcome.subset(inside, took))


def _mix(options: argparse.Namespace) -> RequestMix:
    return RequestMix(
        form=options.form,
        candidates=options.candidates,
        users=options.users,
        items=options.items,
        zipf=options.zipf,
        timeout_ms=options.timeout_ms,
        schema=None if options.schema is None else read_schema(options.schema),
        sent=options.send,
        replayed=() if options.requests is None else read_requests(options.requests, options.timeout_ms),
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _positive(text: str) -> float:
    try:
        if 0 < (number := float(text)) < math.inf:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r:.60}")


def _positive_int(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r:.60}")
    return int(text)


def _groups(text: str) -> frozenset[Any]:
    names = frozenset(filter(None, text.split(",")))
    if unknown := names - {"context", "user", "item"}:
        raise argparse.ArgumentTypeError(f"expected context, user or item, got {', '.join(sorted(unknown))}")
    return names
