"""The scoring engine's five figures, each by one command, on this machine.

    python deploy/bench/engine.py --figure 1 [--figure 2 ...] --out OUT [--work DIR] [--rounds N] [--minutes N] \
        [--knee R]

1. Requests/s over HTTP (Redis and JSON included) against bare `session.run` on the same graph and core; where the
   microseconds go. 100 s with 5 rounds. Whoever makes the request path faster repeats this one: `--work` keeps the
   exported models, and `--rounds 2` is over in 40 s.
2. Candidates/s over HTTP of the request form against the row-by-row graph, N = 100 and 1000. 2 minutes.
3. The knee with a worker a core, the latency at 80 % of it and what becomes of 150 %. 3 minutes.
4. Swaps at 80 % load: latency meanwhile, failures; memory after twenty. 3 minutes, of which 2 look for the knee.
5. `--minutes` (default 10) at 80 % load: memory over time, errors.

Before each of 3 to 5 it tells how still the machine is (still.py): on a shared one that bounds every latency.
For 1 and 2 the service and the bare graph have the first core to themselves and everything else is on the others, and
both sides take turns. `--knee`, where it is known, saves 4 and 5 the search. The model is MIAN as models/papers/mian.py
has it, T = 30, d = 16, with 8 user, 6 context and 5 item fields, untrained: its speed does not depend on its weights.
Of each figure OUT holds figureN.md and figureN.json.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import still
from engine_figures import FIGURES, Stand, say

from service.store import local_server


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=int, choices=FIGURES, action="append", help="default: 1 to 4")
    parser.add_argument("--out", type=Path, required=True, help="a folder for figureN.md and figureN.json")
    parser.add_argument("--work", type=Path, help="a folder that keeps the exported models for the next time")
    parser.add_argument("--rounds", type=int, default=5, help="turns of both sides in figures 1 and 2")
    parser.add_argument("--minutes", type=float, default=10.0, help="of figure 5")
    parser.add_argument("--knee", type=float, help="requests/s, for figures 4 and 5")
    options = parser.parse_args(arguments)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("error: the engine's figures need two cores, one for the service and one for the load", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="clickserve-bench-") as temporary:
        folder = Path(temporary)
        artifacts = (options.work or folder) / "artifacts"
        _prepare(artifacts)
        for figure in options.figure or (1, 2, 3, 4):
            # What is started from here inherits it: generators and store leave the first core to the service.
            os.sched_setaffinity(0, cores[1:] if figure in (1, 2) else cores)
            with local_server.start() as server:
                _fill(folder, server.url)
                stand = Stand(
                    folder=folder,
                    artifacts=artifacts,
                    redis_url=server.url,
                    first=cores[:1],
                    cores=cores,
                    options=options,
                )
                started = time.monotonic()
                stillness = still.measured(cores) if figure in (3, 4, 5) else []
                text, data = FIGURES[figure](stand)
                text = "\n".join([text, "", *(f"- {core}" for core in stillness)])
                data["still"] = [vars(core) for core in stillness]
            print(f"\nFigure {figure} ({time.monotonic() - started:.0f} s)\n\n{text}", flush=True)
            (options.out / f"figure{figure}.md").write_text(text + "\n")
            (options.out / f"figure{figure}.json").write_text(json.dumps(data, indent=1) + "\n")
    return 0


def _prepare(artifacts: Path) -> None:
    if (artifacts / "rows" / "current.json").exists():
        return
    from workload import export_all, fit, make_world

    say("exporting the models")
    world = make_world()
    export_all(world, fit(world), artifacts)


def _fill(folder: Path, redis_url: str) -> None:
    from workload import load, make_world

    say("filling the store")
    load(make_world(), folder, redis_url)


if __name__ == "__main__":
    sys.exit(main())
