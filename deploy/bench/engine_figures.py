"""The engine's five figures: how each is measured, and how it is told."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.generator_pool import Fleet
from loadtest.request_bodies import Form, Mix, read_schema
from loadtest.results import OK
from loadtest.target import target
from processes import ADMIN_TOKEN, ROOT, Service, bare, service

from models.artifact import folder as artifact
from models.features.schema import Schema

TURN_S = 2.5  # of each side, before the other has its turn
LONG_TURN_S = 4.0  # where a request may take 70 ms
CONNECTIONS = 8  # of a closed loop: enough that the core never waits for a request
PATIENT_MS = 30_000.0  # a deadline that no request of a closed loop meets
STAGES = ("parse", "fetch", "encode", "queue", "infer", "respond")
FORMS: tuple[Form, ...] = ("list", "columnar")
ASKED = {"list": 0.6, "columnar": 0.7}
ASKED_RATIO = {100: 10.0, 1000: 25.0}

Told = tuple[str, dict[str, Any]]
"""A figure as Markdown and as data."""


@dataclass(frozen=True, kw_only=True)
class Stand:
    """What every figure starts from: exported models, a filled store, and the cores to use."""

    folder: Path
    artifacts: Path
    redis_url: str
    first: list[int]
    cores: list[int]
    options: argparse.Namespace

    @property
    def schema_file(self) -> Path:
        return artifact.resolve(self.artifacts, "mian") / "schema.json"

    @property
    def schema(self) -> Schema:
        return read_schema(self.schema_file)

    def service(self, model: str, *, alone: bool) -> Any:
        """On the first core alone, or with a worker on each."""
        cores = self.first if alone else self.cores
        return service(
            model,
            self.artifacts,
            self.folder,
            self.redis_url,
            cores=cores,
            workers=len(cores),
            CLICKSERVE_STORE_TIMEOUT_MS="1000" if alone else "50",
        )


def figure1(stand: Stand) -> Told:
    import bare as bare_script
    from workload import inputs, make_world

    graph = artifact.resolve(stand.artifacts, "mian") / "model.onnx"
    ready = stand.folder / "inputs.npz"
    bare_script.save(inputs(make_world(), stand.schema, 64, 100), ready)
    rounds: list[dict[str, float]] = []
    with ExitStack() as stack:
        alone = stack.enter_context(bare(graph, ready, cores=stand.first))
        served = stack.enter_context(stand.service("mian", alone=True))
        fleets = {form: stack.enter_context(_fleet(stand, served, form, CONNECTIONS)) for form in FORMS}
        for fleet in fleets.values():
            fleet.run(None, TURN_S)
        for number in range(stand.options.rounds):
            found = {}
            for form, fleet in fleets.items():
                found[f"bare, before {form}"] = alone.per_s(TURN_S)
                found[form] = _answered_per_s(fleet)
            rounds.append(found)
            say(f"round {number + 1}: " + ", ".join(f"{name} {per_s:,.0f}/s" for name, per_s in found.items()))
        stages = {}
        for form in FORMS:
            with _fleet(stand, served, form, 1) as one:
                stages[form] = _stages(served, one)
    ratios = {form: statistics.median(r[form] / r[f"bare, before {form}"] for r in rounds) for form in FORMS}
    per_s = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    lines = [
        "| form | bare `session.run`/s | HTTP requests/s | share (median of rounds) | asked |",
        "|---|---|---|---|---|",
    ]
    for form in FORMS:
        numbers = f"{per_s[f'bare, before {form}']:,.0f} | {per_s[form]:,.0f}"
        lines.append(f"| {form} | {numbers} | **{ratios[form]:.1%}** | {ASKED[form]:.0%} |")
    lines += ["", "One request after the other, microseconds of a request:", ""]
    lines += ["| form | " + " | ".join((*STAGES, "all stages", "request, seen from inside", "CPU", "bare run")) + " |"]
    lines += ["|---" * (len(STAGES) + 5) + "|"]
    for form, took in stages.items():
        bare_us = 1e6 / per_s[f"bare, before {form}"]
        cells = [took[stage] for stage in STAGES] + [
            sum(took[s] for s in STAGES),
            took["request"],
            took["cpu"],
            bare_us,
        ]
        lines.append(f"| {form} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |")
    lines += [
        "",
        "`fetch` holds the wait for Redis, `queue` the way to the model's thread. CPU less the stages' own work is",
    ]
    lines += ["what uvicorn, the event loop and the store's client take."]
    return "\n".join(lines), {"rounds": rounds, "ratios": ratios, "microseconds": stages, "per_s": per_s}


def _stages(served: Service, one: Fleet) -> dict[str, float]:
    """Microseconds of a request by stage, when it is the only one."""
    one.run(None, 0.5)
    before = served.samples()
    outcome = one.run(None, TURN_S)
    after = served.samples()
    num = int((outcome.status == OK).sum())

    def each(key: str) -> float:
        return 1e6 * (after.get(key, 0) - before.get(key, 0)) / num

    took = {stage: each(f"clickserve_stage_seconds_sum stage={stage}") for stage in STAGES}
    took["request"] = each("clickserve_request_seconds_sum arm=one route=/predict")
    took["cpu"] = each("process_cpu_seconds_total")
    return took


def figure2(stand: Stand) -> Told:
    rounds: list[dict[str, float]] = []
    sizes = tuple(ASKED_RATIO)
    with ExitStack() as stack:
        services = {model: stack.enter_context(stand.service(model, alone=True)) for model in ("mian", "rows")}
        fleets = {
            (model, size): stack.enter_context(_fleet(stand, served, "list", CONNECTIONS // 2, candidates=size))
            for model, served in services.items()
            for size in sizes
        }
        for fleet in fleets.values():
            fleet.run(None, TURN_S)
        for number in range(stand.options.rounds):
            found = {f"{m} {size}": size * _answered_per_s(fleet, LONG_TURN_S) for (m, size), fleet in fleets.items()}
            rounds.append(found)
            say(f"round {number + 1}: " + ", ".join(f"{name}: {per_s:,.0f}/s" for name, per_s in found.items()))
    ratios = {size: statistics.median(r[f"mian {size}"] / r[f"rows {size}"] for r in rounds) for size in sizes}
    per_s = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    lines = ["| N | row by row, candidates/s | request form, candidates/s | ratio (median of rounds) | asked |"]
    lines += ["|---|---|---|---|---|"]
    for size in sizes:
        numbers = f"{per_s[f'rows {size}']:,.0f} | {per_s[f'mian {size}']:,.0f}"
        lines.append(f"| {size} | {numbers} | **{ratios[size]:.1f}** | {ASKED_RATIO[size]:g} |")
    return "\n".join(lines), {"rounds": rounds, "ratios": ratios, "per_s": per_s}


def figure3(stand: Stand) -> Told:
    with stand.service("mian", alone=False) as served:
        told, text = _bench(stand, served)
    runs = {run["label"]: run for run in told["runs"]}
    at_80, beyond = runs["80% of the knee"], runs["150% of the knee"]
    peak = max(run["goodput_per_s"] for run in told["runs"])
    lines = [
        text,
        "",
        f"- p99 at 80 % of the knee: **{at_80['p99_ms']:.2f} ms** (asked: at most 10)",
        f"- goodput at 150 %, of its peak: **{beyond['goodput_per_s'] / peak:.1%}** (asked: at least 90 %)",
        f"- refusals at 150 %, p99: **{beyond['refused_p99_ms'] or 0:.2f} ms** (asked: within 2)",
        f"- errors in all runs: **{sum(run['errors'] for run in told['runs'])}**",
    ]
    return "\n".join(lines), told


def figure4(stand: Stand) -> Told:
    versions = sorted(path.name for path in (stand.artifacts / "mian").iterdir() if path.is_dir())
    swap = ["--swap", f"one:{','.join(versions)}", "--swaps", "6", "--admin-token", ADMIN_TOKEN, "--seconds", "30"]
    with stand.service("mian", alone=False) as served:
        rate = stand.options.knee or _bench(stand, served)[0]["knee_per_s"]
        told, text = _bench(stand, served, "--rate", str(0.8 * rate), *swap)
        steady, during = told["runs"][-2:]
        aim = target(served.url, pid=None)
        memory = [served.rss_mb()]
        for number in range(24):
            aim.swap("one", versions[number % len(versions)], ADMIN_TOKEN)
            if number in (3, 23):  # the previous versions that are kept are there from the fourth on
                time.sleep(1)  # the old one drains, then its memory goes back
                memory.append(served.rss_mb())
    failures = sum(run["errors"] for run in (steady, during))
    refused = ", ".join(f"{run['refused_per_s']:.1f} {name}" for name, run in (("steady", steady), ("during", during)))
    lines = [
        text,
        "",
        f"- p99 during swaps over steady: **{during['p99_ms'] / steady['p99_ms']:.2f}** (asked: at most 1.2)",
        f"- failed requests: **{failures}**; refused a second: {refused}",
        f"- resident memory: {memory[0]:.0f} MB, {memory[1]:.0f} after 4 swaps, **{memory[2]:.0f}** after 20 more",
    ]
    return "\n".join(lines), {**told, "rss_mb": memory}


def figure5(stand: Stand) -> Told:
    seconds = 60 * stand.options.minutes
    with stand.service("mian", alone=False) as served:
        rate = stand.options.knee or _bench(stand, served)[0]["knee_per_s"]
        memory: list[tuple[float, float]] = []
        started = time.monotonic()

        def look() -> None:
            memory.append((round(time.monotonic() - started, 1), round(served.rss_mb(), 1)))

        told, text = _bench(stand, served, "--rate", str(0.8 * rate), "--seconds", str(seconds), look=look)
    marks = [memory[int(share * (len(memory) - 1))] for share in (0, 0.1, 0.25, 0.5, 0.75, 1)]
    lines = [text, "", "| second | " + " | ".join(f"{at:.0f}" for at, _ in marks) + " |", "|---" * 7 + "|"]
    lines += ["| resident MB | " + " | ".join(f"{mb:.0f}" for _, mb in marks) + " |"]
    return "\n".join(lines), {**told, "rss_mb": memory}


def _fleet(stand: Stand, served: Service, form: Form, connections: int, *, candidates: int = 100) -> Fleet:
    mix = Mix(form=form, candidates=candidates, timeout_ms=PATIENT_MS, schema=stand.schema)
    return Fleet(served.address, mix, processes=1, connections=connections, seed=2026)


def _answered_per_s(fleet: Fleet, seconds: float = TURN_S) -> float:
    outcome = fleet.run(None, seconds)
    if not (outcome.status == OK).all() or outcome.degraded.any():
        say(f"  {int((outcome.status != OK).sum())} not answered, {int(outcome.degraded.sum())} degraded")
    if outcome.busy > 0.9:
        say(f"  the generator was busy for {outcome.busy:.0%}: this is its number, not the service's")
    return float((outcome.status == OK).sum()) / outcome.seconds


def _bench(
    stand: Stand, served: Service, *more: str, look: Callable[[], None] | None = None
) -> tuple[dict[str, Any], str]:
    """`load.py` with a hundred candidates: its JSON and what it printed."""
    file = stand.folder / "bench.json"
    fixed = ["--url", served.url, "--candidates", "100", "--schema", str(stand.schema_file), "--json", str(file)]
    command = [sys.executable, str(ROOT / "deploy" / "bench" / "load.py"), *fixed, *more]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        while look is not None and process.poll() is None:
            look()
            time.sleep(5)  # often enough to see memory grow over minutes
        assert process.stdout is not None
        text = process.stdout.read().decode()
    if process.returncode != 0:
        sys.exit(f"stopped at: {' '.join(command[1:])}")
    told: dict[str, Any] = json.loads(file.read_text())
    return told, text.strip()


FIGURES: dict[int, Callable[[Stand], Told]] = {1: figure1, 2: figure2, 3: figure3, 4: figure4, 5: figure5}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
