"""How many files a warm POST /predict passes through, and how often it steps from one to another.

    python deploy/bench/path_steps.py --work W [--baseline 24d456e]

Counts calls into the project's files while the service of a checkout answers requests one after the other: a step
is a call into another file than the one that was called into before. Of both checkouts, with MIAN and a warm cache.
"""

import argparse
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory

import sides
import workload
from checkouts import ROOT, Export, checkout, export_workload
from processes import service

REQUESTS = 200
HOOK = """
import atexit, json, os, signal, sys, threading
TREE = {tree!r}
counted = {{}}

def profile(frame, event, _):
    if event != "call":
        return
    name = frame.f_code.co_filename
    if name.startswith(TREE) and "/site-packages/" not in name:
        state = counted.setdefault("state", [None, 0, {{}}])
        if name != state[0]:
            state[0] = name
            state[1] += 1
        state[2][name] = state[2].get(name, 0) + 1

def dump(*_):
    state = counted.get("state", [None, 0, {{}}])
    with open({out!r}, "w") as file:
        json.dump([state[1], state[2]], file)
    counted.clear()

signal.signal(signal.SIGUSR1, dump)
threading.setprofile(profile)
sys.setprofile(profile)
"""


def steps(tree: Path, export: Export, world: workload.World, folder: Path) -> tuple[float, list[str]]:
    """Steps of one request, and the files that every request passes through."""
    out = folder / f"steps-{tree.name}.json"
    hooks = folder / f"hooks-{tree.name}"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(HOOK.format(tree=str(tree), out=str(out)))
    bodies = [workload.body(r, columnar=True) for r in workload.requests(world, 4, 100)]
    with ExitStack() as stack:
        store = sides.filled_store(stack, world, folder, tree)
        path = os.pathsep.join([str(hooks), str(tree)])
        server = stack.enter_context(
            service(
                export.facts["model"],
                export.artifacts,
                folder,
                store.url,
                cores=sorted(os.sched_getaffinity(0)),
                workers=1,
                checkout=tree,
                PYTHONPATH=path,
                CLICKSERVE_ITEM_CACHE_S="3600",
            )
        )
        connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
        (pid,) = server.pids

        def ask(times: int) -> None:
            for number in range(times):
                connection.request("POST", "/predict", bodies[number % len(bodies)])
                answer = connection.getresponse()
                content = answer.read()
                if answer.status != 200 or json.loads(content)["degraded"]:
                    raise SystemExit(f"{tree}: {answer.status}: {content[:300]!r}")

        ask(3 * len(bodies))
        _dump(pid, out)
        ask(REQUESTS)
        num_steps, calls = _dump(pid, out)
        every = sorted(name.removeprefix(f"{tree}/") for name, count in calls.items() if count >= REQUESTS)
        return num_steps / REQUESTS, every


def _dump(pid: int, out: Path) -> tuple[int, dict[str, int]]:
    out.unlink(missing_ok=True)
    subprocess.run(["kill", "-USR1", str(pid)], check=True)
    while True:
        try:
            num_steps, calls = json.loads(out.read_text())
        except (FileNotFoundError, ValueError):
            continue
        return num_steps, calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="keeps exported models for the next time")
    parser.add_argument("--baseline", default="24d456e")
    options = parser.parse_args()
    world = workload.make_world()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        this = export_workload(ROOT, options.work, sizes=(100, 1000))
        tree = stack.enter_context(checkout(options.baseline))
        older = export_workload(tree, options.work, sizes=(100, 1000), weights=this.weights)
        for name, root, export in ((options.baseline, tree, older), ("this checkout", ROOT, this)):
            num_steps, files = steps(root, export, world, folder)
            print(f"{name}: {len(files)} files, {num_steps:.0f} steps between files a request")
            print("  " + " ".join(files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
