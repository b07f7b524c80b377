"""The request path against its peers: Clickserve, an older commit of it, and the same graph behind less, in turns.

    python deploy/bench/engine.py --out OUT [--work DIR] [--baseline REV] [--rounds N] [--seconds N] [--quick]
        [--workers 1,2] [--concurrency 1,8,32] [--candidates 100,1000]

One run, one model (MIAN, 30 clicks, d = 16, 8 user, 6 context and 5 item fields), and a real Redis-compatible server
for each checkout. The sides (sides.py):

- Clickserve, this checkout as `python -m service serve` runs it, sent columns and lists, and a copy of it (A/A);
- the baseline: the older commit REV, with an artifact exported by its own code from the same weights;
- FastAPI, a bare ASGI app, and a loop of `session.run` (peers.py), which are handed encoded tensors: once with this
  checkout's graph from encoded tensors to logits, once with the baseline's.

Each side's answers are compared with what the model says offline before anything is timed. Then every side has a burst
of `--seconds` in each of `--rounds` rounds, in shuffled order, for every number of workers, candidates and connections.
Ratios are taken within a round; the table has their median and quartiles, and the copy's say what they are worth. With
one worker a side has the first core to itself, and the sender (wrk where it is installed) and the stores the others.

OUT gets engine.md and engine.json. `--work` keeps exported models for the next time. All of it takes half an hour;
`--quick` is one round of one cell, `--baseline none` leaves the older commit out.
"""

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sides
import workload
from checkouts import ROOT, CheckoutError, Export, checkout, commit_of, export_workload
from interleaved import Ratio, ratio, run_rounds
from senders import Burst, Sender, SenderError, find_sender
from sides import ASGI, COLUMNS, COPY, FASTAPI, LIST, LOOP, OLD_COLUMNS, OLD_GRAPH, OLD_LIST, THIS_GRAPH

BASELINE = "24d456e"
MIN_SPREAD = 1.0  # standard deviation of the logits: with less, a wrong answer could be as good as a right one


@dataclass(frozen=True, kw_only=True)
class Plan:
    workers: Sequence[int] = (1, 2)
    candidates: Sequence[int] = (100, 1000)
    concurrency: Sequence[int] = (1, 8, 32)
    rounds: int = 5
    seconds: float = 2  # of a burst; wrk takes whole ones


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination, and each side's burst in every round."""

    workers: int
    candidates: int
    concurrency: int
    rounds: list[dict[str, Burst]]

    @property
    def sides(self) -> list[str]:
        return list(self.rounds[0])

    def per_s(self, side: str) -> list[float]:
        return [bursts[side].per_s for bursts in self.rounds]

    def p50_ms(self, side: str) -> list[float | None]:
        return [bursts[side].p50_ms for bursts in self.rounds]

    def rate_ratio(self, side: str, other: str) -> Ratio | None:
        """None where one of them was not measured."""
        if not {side, other} <= set(self.sides):
            return None
        return ratio(self.per_s(side), self.per_s(other))

    def latency_ratio(self, side: str, other: str) -> Ratio | None:
        if not {side, other} <= set(self.sides):
            return None
        latencies = [[ms for ms in self.p50_ms(name) if ms is not None] for name in (side, other)]
        return ratio(*latencies)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound on a ratio of Clickserve to another side, with one worker."""

    text: str
    columns_over: str
    list_over: str
    candidates: int = 100
    concurrency: int = 8
    at_least: float | None = None  # of requests/s
    at_most: float | None = None  # of latencies

    def ratio(self, cells: Sequence[Cell], side: str) -> Ratio | None:
        """None where it was not measured."""
        other = self.columns_over if side == COLUMNS else self.list_over
        for cell in cells:
            if (cell.workers, cell.candidates, cell.concurrency) == (1, self.candidates, self.concurrency):
                found = cell.rate_ratio if self.at_most is None else cell.latency_ratio
                return found(side, other)
        return None

    def is_met(self, found: Ratio) -> bool:
        return found.median >= (self.at_least or 0.0) if self.at_most is None else found.median <= self.at_most


def _over_peer(peer: str, graph: str, **bounds: Any) -> Target:
    other = f"{peer}, {graph}"
    return Target(text=other, columns_over=other, list_over=other, **bounds)


TARGETS = (
    Target(text="the baseline", columns_over=OLD_COLUMNS, list_over=OLD_LIST, at_least=2.2),
    *(_over_peer(FASTAPI, graph, at_least=1.3) for graph in (THIS_GRAPH, OLD_GRAPH)),
    *(_over_peer(ASGI, graph, at_least=0.8) for graph in (THIS_GRAPH, OLD_GRAPH)),
    *(_over_peer(LOOP, graph, at_least=0.5) for graph in (THIS_GRAPH, OLD_GRAPH)),
    *(_over_peer(ASGI, graph, at_most=1.5, concurrency=1) for graph in (THIS_GRAPH, OLD_GRAPH)),
    *(_over_peer(FASTAPI, graph, at_least=2.0, candidates=1000) for graph in (THIS_GRAPH, OLD_GRAPH)),
)


def measure(
    plan: Plan,
    this: Export,
    baseline: tuple[Path, Export] | None,
    *,
    world: workload.World,
    folder: Path,
    sender: Sender,
) -> list[Cell]:
    """Every cell of the plan; `baseline` is its checkout and its export. Raises WrongAnswerError and SenderError."""
    cores = sorted(os.sched_getaffinity(0))
    cells = []
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, cores)
        starter = _starter(stack, plan, this, baseline, world=world, folder=folder, sender=sender)
        stores = [c.store.pid for c in (starter.this, starter.baseline) if c is not None]
        for workers in plan.workers:
            # The sender is a child of this process and inherits its cores.
            sides.bind([0, *stores], cores[1:] if workers == 1 else cores)
            with starter.start(workers=workers, cores=cores[:1] if workers == 1 else cores) as started:
                for side in started:
                    side.check()
                    say(f"{side.name}: answers as the model does offline ({workers} workers)")
                for candidates in plan.candidates:
                    for concurrency in plan.concurrency:
                        cell = _measure_cell(plan, started, workers, candidates, concurrency)
                        say("\n" + cell_table(cell))
                        cells.append(cell)
    return cells


def _starter(
    stack: ExitStack,
    plan: Plan,
    this: Export,
    baseline: tuple[Path, Export] | None,
    *,
    world: workload.World,
    folder: Path,
    sender: Sender,
) -> sides.SideStarter:
    say("filling the stores")
    older = None
    if baseline is not None:
        tree, export = baseline
        older = sides.Checkout(tree=tree, export=export, store=sides.filled_store(stack, world, folder, tree))
    return sides.SideStarter(
        folder=folder,
        sender=sender,
        world=world,
        candidates=plan.candidates,
        this=sides.Checkout(tree=ROOT, export=this, store=sides.filled_store(stack, world, folder)),
        baseline=older,
    )


def _measure_cell(plan: Plan, started: Sequence[sides.Side], workers: int, candidates: int, concurrency: int) -> Cell:
    def burst_of(side: sides.Side) -> Burst:
        return side.burst(candidates=candidates, concurrency=concurrency, seconds=plan.seconds)

    degraded = {side.name: side.num_degraded() for side in started}
    by_name = {side.name: side for side in started}
    rounds = run_rounds(list(by_name), lambda name: burst_of(by_name[name]), plan.rounds, draw=random.Random(2026))
    for side in started:
        if more := side.num_degraded() - degraded[side.name]:
            raise sides.WrongAnswerError(f"{side.name}: {more:g} degraded answers")
    return Cell(workers=workers, candidates=candidates, concurrency=concurrency, rounds=rounds)


def cell_table(cell: Cell) -> str:
    """Markdown: each side's medians, and Clickserve's requests/s over it."""
    head = f"Workers {cell.workers}, candidates {cell.candidates}, connections {cell.concurrency}"
    lines = [head, "", f"| side | requests/s | p50 ms | {COLUMNS} / it | {LIST} / it |", "|---|---|---|---|---|"]
    for side in cell.sides:
        latencies = [ms for ms in cell.p50_ms(side) if ms is not None]
        p50 = f"{statistics.median(latencies):.2f}" if latencies else ""
        ratios = [cell.rate_ratio(name, side) if name != side else None for name in (COLUMNS, LIST)]
        cells = [
            side,
            f"{statistics.median(cell.per_s(side)):,.0f}",
            p50,
            *("" if r is None else str(r) for r in ratios),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def target_table(cells: Sequence[Cell]) -> str:
    """Markdown: each target with what was measured, and the A/A spread of the same cell."""
    lines = [
        f"| Clickserve over | candidates, connections | asked | {COLUMNS} | {LIST} | a copy of itself |",
        "|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        found = [target.ratio(cells, side) for side in (COLUMNS, LIST)]
        if found == [None, None]:
            continue
        copy = _over_copy(target).ratio(cells, COLUMNS)
        bound = f">= {target.at_least:g}x" if target.at_most is None else f"latency <= {target.at_most:g}x"
        verdicts = ["" if r is None else f"{r} {'met' if target.is_met(r) else '**missed**'}" for r in found]
        where = f"{target.candidates}, {target.concurrency}"
        lines.append("| " + " | ".join([target.text, where, bound, *verdicts, str(copy or "")]) + " |")
    return "\n".join(lines)


def _over_copy(target: Target) -> Target:
    return Target(
        text=COPY,
        columns_over=COPY,
        list_over=COPY,
        candidates=target.candidates,
        concurrency=target.concurrency,
        at_least=target.at_least,
        at_most=target.at_most,
    )


def report(cells: Sequence[Cell], facts: dict[str, Any]) -> str:
    graphs = [
        f"{name}: {export['inputs']} inputs, {export['nodes']} nodes, logits of deviation "
        + ", ".join(f"{spread:.2f} (N = {num})" for num, spread in export["logit_spread"].items())
        for name, export in facts["graphs"].items()
    ]
    text = [f"Clickserve {facts['commit']}, baseline {facts['baseline']}, sender {facts['sender']}.", ""]
    text += [*(f"- {graph}" for graph in graphs), "", "One worker, medians of per-round ratios (quartiles):", ""]
    text += [target_table(cells), ""]
    for cell in cells:
        text += [cell_table(cell), ""]
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    plan = Plan(
        workers=options.workers,
        candidates=options.candidates,
        concurrency=options.concurrency,
        rounds=options.rounds,
        seconds=options.seconds,
    )
    if options.quick:
        plan = Plan(workers=(1,), candidates=plan.candidates[:1], concurrency=(8,), rounds=1, seconds=1)
    if len(os.sched_getaffinity(0)) < 2:
        print("error: expected two cores, one for a side and one for the sender; this process has one", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="clickserve-bench-")))
            work = options.work or folder
            say("exporting the models")
            this = export_workload(ROOT, work, sizes=plan.candidates)
            baseline = None
            if options.baseline != "none":
                tree = stack.enter_context(checkout(options.baseline))
                baseline = (tree, export_workload(tree, work, sizes=plan.candidates, weights=this.weights))
            for export in (this, *(() if baseline is None else (baseline[1],))):
                _check_spread(export)
            sender = stack.enter_context(find_sender())
            cells = measure(plan, this, baseline, world=workload.make_world(), folder=folder, sender=sender)
            facts = {
                "commit": commit_of(ROOT),
                "baseline": options.baseline,
                "sender": type(sender).__name__,
                "graphs": {THIS_GRAPH: this.facts} | ({} if baseline is None else {OLD_GRAPH: baseline[1].facts}),
            }
    except (CheckoutError, SenderError, sides.WrongAnswerError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    text = report(cells, facts)
    print(text)
    (options.out / "engine.md").write_text(f"# The request path against its peers\n\n{text}")
    document = {**facts, "plan": asdict(plan), "cells": [asdict(cell) for cell in cells]}
    (options.out / "engine.json").write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _check_spread(export: Export) -> None:
    spread = export.facts["logit_spread"]
    if min(spread.values()) < MIN_SPREAD:
        raise CheckoutError(f"{export.folder}: expected logits of deviation {MIN_SPREAD:g} or more, got {spread}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for engine.md and engine.json")
    parser.add_argument("--work", type=Path, help="a folder that keeps the exported models for the next time")
    parser.add_argument("--baseline", default=BASELINE, metavar="REV", help="a commit, or none (default %(default)s)")
    parser.add_argument("--workers", type=_numbers, default=(1, 2))
    parser.add_argument("--candidates", type=_numbers, default=(100, 1000))
    parser.add_argument("--concurrency", type=_numbers, default=(1, 8, 32))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="of a burst; wrk takes whole ones")
    parser.add_argument("--quick", action="store_true", help="one round of one cell")
    return parser.parse_args(arguments)


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if not all(1 <= number <= 1000 for number in numbers):
        raise argparse.ArgumentTypeError(f"expected numbers from 1 to 1000, got {text!r:.60}")
    return numbers


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
