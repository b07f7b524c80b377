"""Latency of each model's exported graph, before and after: an older commit's and this checkout's, run in turns.

    python deploy/bench/graph_latency.py --out OUT [--models mian,stec,...] [--candidates 100,1000] [--repeats N]
        [--baseline REV] [--work DIR]

Both checkouts export each model by their own code over the same fields (workload.py). One request of N candidates is
run in one thread, in this process, by all graphs in turns and in shuffled order:

- before: the baseline's graph, from its encoded tensors to logits;
- composed: this checkout's, from its encoded tensors to logits;
- item rows fed: what the service runs, which keeps the rows that item.onnx makes of its ads.

Every graph's logits are compared with the model's own before anything is timed. The table has medians, and medians of
the ratios to the baseline's run of the same turn with their quartiles; nodes are those of the files. OUT gets
graph_latency.md and graph_latency.json.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from checkouts import ROOT, CheckoutError, Export, checkout, commit_of, export_workload
from engine import BASELINE, say
from inputs import Tensors
from interleaved import Ratio, ratio, run_rounds
from numpy.typing import NDArray
from peers import Graph

MODELS = ("mian", "stec", "deepmr", "dynint", "feseq", "din", "dcnv2")
BEFORE, COMPOSED, ROWS_FED = "before", "composed", "item rows fed"
TOLERANCE = 1e-4  # of a logit, relative to 1 + the largest


class WrongLogitsError(RuntimeError):
    """A graph does not compute what its model does."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """A graph and how it is fed."""

    graph: Graph
    num_nodes: int
    inputs: Callable[[Tensors], Tensors]

    def logits(self, tensors: Tensors) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self.graph.session.run(["logit"], self.inputs(tensors))[0]
        return logits


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One model's graph in one form at one number of candidates."""

    model: str
    form: str
    candidates: int
    num_inputs: int
    num_nodes: int
    median_ms: float
    ratio: Ratio | None  # to the baseline; None of itself


def forms_of(export: Export) -> dict[str, Form]:
    """`composed`, and `item rows fed` where the export has item.onnx."""
    forms = {COMPOSED: _form(export.graph, dict)}
    folder = export.artifact
    if (folder / "item.onnx").exists():
        item = Graph(folder / "item.onnx")

        def with_rows(tensors: Tensors) -> Tensors:
            rows = item.session.run(["items"], {name: tensors[name] for name in item.dtypes})[0]
            return {**{n: a for n, a in tensors.items() if n not in item.dtypes}, "items": rows}

        forms[ROWS_FED] = _form(folder / "model.onnx", with_rows)
    return forms


def _form(file: Path, inputs: Callable[[Tensors], Tensors]) -> Form:
    graph = Graph(file)
    num_nodes = len(onnx.load(str(file)).graph.node)
    return Form(graph=graph, num_nodes=num_nodes, inputs=lambda t: {n: inputs(t)[n] for n in graph.dtypes})


def measure(model: str, exports: Mapping[str, Export], candidates: int, repeats: int) -> list[Latency]:
    """`exports` are those of `before` (may be absent) and `composed`. Raises WrongLogitsError."""
    forms: dict[str, tuple[Form, Export]] = {}
    for name, export in exports.items():
        found = forms_of(export)
        if name == BEFORE:
            found = {BEFORE: found[COMPOSED]}
        forms |= {form_name: (form, export) for form_name, form in found.items()}
    runs: dict[str, Callable[[], Any]] = {}
    for name, (form, export) in forms.items():
        tensors = export.inputs(candidates)[0]
        expected = export.logits(candidates)[0]
        off = np.abs(form.logits(tensors) - expected).max()
        if not off <= TOLERANCE * (1 + np.abs(expected).max()):
            raise WrongLogitsError(
                f"{model}, {name}, {candidates} candidates: logits are up to {off:.3g} off the model's"
            )
        runs[name] = partial(form.graph.session.run, ["logit"], form.inputs(tensors))
    turns = run_rounds(list(runs), lambda name: _seconds(runs[name]), repeats, draw=random.Random(2026))
    latencies = []
    for name, (form, _) in forms.items():
        seconds = [turn[name] for turn in turns]
        compared = None if name == BEFORE or BEFORE not in forms else ratio(seconds, [turn[BEFORE] for turn in turns])
        latencies.append(
            Latency(
                model=model,
                form=name,
                candidates=candidates,
                num_inputs=len(form.graph.dtypes),
                num_nodes=form.num_nodes,
                median_ms=1000 * statistics.median(seconds),
                ratio=compared,
            )
        )
    return latencies


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def markdown(latencies: Sequence[Latency]) -> str:
    lines = [
        "| model | N | graph | inputs | nodes | median ms | of before (quartiles) |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in latencies:
        cells = [one.model, str(one.candidates), one.form, str(one.num_inputs), str(one.num_nodes)]
        lines.append("| " + " | ".join([*cells, f"{one.median_ms:.3f}", str(one.ratio or "")]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="a folder that keeps the exported models for the next time")
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--candidates", type=lambda text: [int(n) for n in text.split(",")], default=[100, 1000])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--baseline", default=BASELINE, metavar="REV", help="a commit, or none (default %(default)s)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    latencies: list[Latency] = []
    try:
        with ExitStack() as stack:
            work = options.work or Path(stack.enter_context(TemporaryDirectory(prefix="clickserve-bench-")))
            trees = {COMPOSED: ROOT}
            if options.baseline != "none":
                trees = {BEFORE: stack.enter_context(checkout(options.baseline)), **trees}
            for model in options.models:
                say(f"exporting {model}")
                exports = {
                    name: export_workload(tree, work, model=model, sizes=options.candidates)
                    for name, tree in trees.items()
                }
                for candidates in options.candidates:
                    latencies += measure(model, exports, candidates, options.repeats)
                    say(markdown(latencies[-len(latencies) :]).splitlines()[-1])
    except (CheckoutError, WrongLogitsError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    text = f"{commit_of(ROOT)} against {options.baseline}, medians of {options.repeats} turns, one thread.\n\n"
    text += markdown(latencies) + "\n"
    print(text)
    (options.out / "graph_latency.md").write_text(text)
    rows = [{**vars(one), "ratio": None if one.ratio is None else vars(one.ratio)} for one in latencies]
    (options.out / "graph_latency.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
