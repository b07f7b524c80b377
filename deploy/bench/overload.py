"""Capacity and overload: the knee, 80 % and 150 % of it, swaps and minutes of load, beside an older commit's, in turns.

    python deploy/bench/overload.py --out OUT [--rounds N] [--minutes N] [--seconds N] [--baseline REV] [--work DIR]

Two services with a worker a core, this checkout and the baseline, take turns under the open-loop load generator
(load.py): MIAN, 100 candidates in columns, a deadline of 20 ms. The knee is the highest rate at which 99 % of the
answers come within 10 ms of their schedule. In each of `--rounds` rounds, both:

1. search their knee, then run at 50, 80, 100 and 150 % of it for `--seconds`;
2. run at 80 % of it for three times as long while six versions are loaded one after the other.

Then this checkout runs for `--minutes` at 80 % of its median knee while its memory is read, and loads 24 versions.
OUT gets overload.md and overload.json. Half an hour with two rounds and ten minutes.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sides
import workload
from checkouts import ROOT, CheckoutError, Export, checkout, commit_of, export_workload
from engine import BASELINE, say
from loadtest.target import target
from processes import ADMIN_TOKEN, Server, service

CANDIDATES = 100
NUM_BODIES = 512
NUM_SWAPS = 6  # in a run
NUM_LOADS = 24  # while memory is read
FIRST_LOADS = 4  # after them the earlier versions that stay loaded are all there
THIS, OLD = "this checkout", "baseline"
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Service:
    """One of the two, running, and the load it gets."""

    name: str
    server: Server
    versions: Sequence[str]
    bodies: Path
    folder: Path
    bounds: Sequence[str]  # options of load.py: of p99 and of the deadline

    def load(self, *options: str, meanwhile: Callable[[], None] | None = None) -> tuple[Json, str]:
        """load.py with these options: its JSON, and its table. Exits where it fails."""
        file = self.folder / "load.json"
        fixed = ["--url", self.server.url, "--requests", str(self.bodies), *self.bounds, "--json", str(file)]
        command = [sys.executable, str(ROOT / "deploy" / "bench" / "load.py"), *fixed, *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
            while meanwhile is not None and process.poll() is None:
                meanwhile()
                time.sleep(5)
            assert process.stdout is not None
            text = process.stdout.read().decode()
        if process.returncode != 0:
            sys.exit(f"{self.name}: stopped at {' '.join(options)}; the reason stands above")
        document: Json = json.loads(file.read_text())
        return document, text.strip()

    def swap(self, number: int) -> None:
        aim = target(self.server.url, pid=None)
        aim.swap("one", self.versions[number % len(self.versions)], ADMIN_TOKEN)


def measure_round(services: Sequence[Service], *, seconds: int) -> dict[str, Json]:
    """The knee, the runs around it, and the swaps of each service; the order is drawn."""
    found: dict[str, Json] = {}
    for one in random.sample(services, len(services)):
        say(f"{one.name}: the knee")
        knee, text = one.load("--seconds", str(seconds))
        say(text)
        swaps = [f"one:{','.join(one.versions)}", "--swaps", str(NUM_SWAPS), "--admin-token", ADMIN_TOKEN]
        rate = str(0.8 * knee["knee_per_s"])
        swapped, swap_text = one.load("--rate", rate, "--seconds", str(3 * seconds), "--swap", *swaps)
        say(swap_text)
        found[one.name] = {
            "knee_per_s": knee["knee_per_s"],
            "runs": knee["runs"] + swapped["runs"],
            "text": f"{text}\n\n{swap_text}",
        }
    return found


def measure_memory(one: Service, rate: float, *, minutes: float) -> Json:
    """Minutes at that rate, then loads: latencies, and resident MB by second and after the loads."""
    memory: list[tuple[float, float]] = []
    started = time.monotonic()

    def look() -> None:
        memory.append((round(time.monotonic() - started, 1), round(one.server.rss_mb(), 1)))

    document, text = one.load("--rate", str(rate), "--seconds", str(60 * minutes), meanwhile=look)
    loaded = [one.server.rss_mb()]
    for number in range(NUM_LOADS):
        one.swap(number)
        if number in (FIRST_LOADS - 1, NUM_LOADS - 1):
            time.sleep(1)  # the version before drains, then its memory goes back
            loaded.append(one.server.rss_mb())
    return {"runs": document["runs"], "text": text, "rss_mb": memory, "rss_mb_after_loads": loaded}


def report(rounds: Sequence[dict[str, Json]], long: Json | None) -> str:
    """Markdown: the bounds, then every table."""
    lines = ["| | " + " | ".join(rounds[0]) + " |", "|---" * (1 + len(rounds[0])) + "|"]
    for title, figure in FIGURES.items():
        cells = [", ".join(figure(found[name]) for found in rounds) for name in rounds[0]]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    if OLD in rounds[0]:
        ratios = [found[THIS]["knee_per_s"] / found[OLD]["knee_per_s"] for found in rounds]
        lines += ["", "Knee over the baseline's, by round: " + ", ".join(f"{ratio:.2f}" for ratio in ratios)]
    if long is not None:
        (run,) = long["runs"]
        marks = [long["rss_mb"][int(share * (len(long["rss_mb"]) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)]
        before, first, last = long["rss_mb_after_loads"]
        lines += [
            "",
            f"{run['requests']:,} requests at 80 % of the knee: p99 **{run['p99_ms']:.2f} ms** (asked: at most 10)",
            f"Errors: {run['errors']}, degraded: {run['degraded']}",
            "Resident MB by second: " + ", ".join(f"{mb:.0f} ({second:.0f} s)" for second, mb in marks),
            f"Resident MB: {before:.0f}, {first:.0f} after {FIRST_LOADS} loads, {last:.0f} after {NUM_LOADS}",
        ]
    for number, found in enumerate(rounds, start=1):
        for name, one in found.items():
            lines += ["", f"Round {number}, {name}", "", one["text"]]
    return "\n".join(lines) + "\n" + ("" if long is None else f"\n{long['text']}\n")


def _run(found: Json, label: str) -> Json:
    (run,) = (run for run in found["runs"] if run["label"].startswith(label) or label in run["label"])
    run_: Json = run
    return run_


def _peak(found: Json) -> float:
    return max(float(run["goodput_per_s"]) for run in found["runs"] if "knee" in run["label"])


FIGURES: dict[str, Callable[[Json], str]] = {
    "knee, requests/s": lambda found: f"{found['knee_per_s']:.0f}",
    "p99 at 80 %, ms (asked: at most 10)": lambda found: f"{_run(found, '80%')['p99_ms']:.2f}",
    "goodput at 150 %, of its peak (asked: at least 90 %)": lambda found: (
        f"{_run(found, '150%')['goodput_per_s'] / _peak(found):.1%}"
    ),
    "refusals at 150 %, p99 ms (asked: within 2)": lambda found: f"{_run(found, '150%')['refused_p99_ms'] or 0:.2f}",
    "p99 during swaps over steady (asked: at most 1.2)": lambda found: (
        f"{_run(found, 'during')['p99_ms'] / _run(found, 'steady')['p99_ms']:.2f}"
    ),
    "errors": lambda found: f"{sum(run['errors'] for run in found['runs'])}",
    "runs in which the generator was the limit": lambda found: (
        f"{sum(run['invalid_reason'] is not None for run in found['runs'])}"
    ),
}


def _start(
    stack: ExitStack,
    name: str,
    tree: Path,
    export: Export,
    *,
    folder: Path,
    world: workload.World,
    bounds: Sequence[str],
) -> Service:
    say(f"starting {name}")
    store = sides.filled_store(stack, world, folder, tree)
    cores = sorted(os.sched_getaffinity(0))
    server = stack.enter_context(
        service(
            export.facts["model"],
            export.artifacts,
            folder,
            store.url,
            cores=cores,
            workers=len(cores),
            checkout=tree,
        )
    )
    bodies = folder / "bodies.jsonl"
    requests = workload.requests(world, NUM_BODIES, CANDIDATES)
    bodies.write_bytes(b"\n".join(workload.body(request, columnar=True) for request in requests))
    return Service(name=name, server=server, versions=export.versions, bodies=bodies, folder=folder, bounds=bounds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="a folder that keeps the exported models for the next time")
    parser.add_argument("--baseline", default=BASELINE, metavar="REV", help="a commit, or none (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=10, help="of a run")
    parser.add_argument("--p99-ms", default="10", help="the knee's bound")
    parser.add_argument("--timeout-ms", default="20", help="of each request")
    parser.add_argument("--minutes", type=float, default=10.0, help="at 80 %% of the knee; 0: none")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="clickserve-bench-")))
            work, world = options.work or folder, workload.make_world()
            trees = {THIS: ROOT}
            if options.baseline != "none":
                trees[OLD] = stack.enter_context(checkout(options.baseline))
            bounds = ["--p99-ms", options.p99_ms, "--timeout-ms", options.timeout_ms]
            services = [
                _start(
                    stack,
                    name,
                    tree,
                    export_workload(tree, work, sizes=(CANDIDATES,), versions=2),
                    folder=folder,
                    world=world,
                    bounds=bounds,
                )
                for name, tree in trees.items()
            ]
            rounds = [measure_round(services, seconds=options.seconds) for _ in range(options.rounds)]
            long = None
            if options.minutes:
                knee = statistics.median(found[THIS]["knee_per_s"] for found in rounds)
                long = measure_memory(services[0], 0.8 * knee, minutes=options.minutes)
    except CheckoutError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    text = f"{commit_of(ROOT)} against {options.baseline}\n\n{report(rounds, long)}"
    print(text)
    (options.out / "overload.md").write_text(text)
    (options.out / "overload.json").write_text(json.dumps({"rounds": rounds, "long": long}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
