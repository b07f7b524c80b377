"""Scoring a request at once over scoring it row by row, through HTTP: candidates/s of the same model in both forms.

    python deploy/bench/row_form.py --out OUT [--rounds N] [--seconds N] [--candidates 100,1000]

Two services of this checkout on one core, with the same MIAN: one as it is, one whose graph gives every candidate its
own copy of the request and encodes each, as a server does that scores rows. The copies are made inside the graph, where
they cost next to nothing, so everything around it is the same. Both answer the same before anything is timed, and take
turns.
OUT gets row_form.md and row_form.json. Asked: 10x at 100 candidates, 25x at 1000.
"""

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import sides
import torch
import workload
from checkouts import sigmoid
from engine import say
from interleaved import Ratio, ratio, run_rounds
from numpy.typing import NDArray
from processes import service
from senders import Burst, SenderError, find_sender
from torch import Tensor

from models.features.encoder import Encoder
from models.layers.base import CTRModel, Inputs, UserState

REQUEST_FORM, ROW_FORM = "request form", "row form"
ASKED = {100: 10.0, 1000: 25.0}
CONNECTIONS = 4
HEADING = """# Request form over row form, through HTTP

Scoring a request at once over scoring it row by row: MIAN, candidates per second, in turns.

"""


class RowForm(CTRModel):
    """A model that encodes the request anew for each candidate, and gives the same logits."""

    def __init__(self, model: CTRModel) -> None:
        super().__init__()
        self.model = model

    def encode_user(self, inputs: Inputs) -> UserState:
        """The request's inputs themselves."""
        return {name: inputs[name] for name in inputs if not name.startswith("item") and name != "user_index"}

    def encode_items(self, inputs: Inputs) -> Tensor:
        return self.model.encode_items(inputs)

    def score(self, state: UserState, items_CW: Tensor, user_index: Tensor | None) -> Tensor:
        if user_index is None:
            num = items_CW.shape[0]
            rows_C = torch.arange(num)
            copies = {name: value.expand(num, *value.shape[1:]) for name, value in state.items()}
        else:  # counted, not read off a shape: a traced size is that of the ads' ids, which a scoring graph has not
            rows_C = (user_index * 0 + 1).cumsum(0) - 1
            copies = {name: value.index_select(0, user_index) for name, value in state.items()}
        return self.model.score(self.model.encode_user(copies), items_CW, rows_C)


def export(out: Path, world: workload.World) -> CTRModel:
    """Artifacts `mian` and `rows` of the same weights; returns the model."""
    schema = workload.fit(world)
    encoder = Encoder(schema)
    sample = [encoder.encode(request) for request in workload.requests(world, 8, 50)]
    model, _ = workload.build("mian", schema, sample)
    workload.export_model("mian", model, world, schema, out)
    workload.export_model("rows", RowForm(model).eval(), world, schema, out)
    return model


def measure(sizes: Sequence[int], rounds: int, seconds: float, folder: Path) -> dict[int, list[dict[str, Burst]]]:
    """The rounds of each number of candidates. Raises WrongAnswerError and SenderError."""
    world = workload.make_world()
    say("exporting both forms")
    model = export(folder / "artifacts", world)
    encoder = Encoder(workload.fit(world))
    bodies: dict[int, Path] = {}
    probabilities: dict[int, NDArray[np.float64]] = {}
    for num in sizes:
        requests = workload.requests(world, workload.NUM_REQUESTS, num)
        bodies[num] = folder / f"columns-{num}.jsonl"
        bodies[num].write_bytes(b"\n".join(workload.body(request, columnar=True) for request in requests))
        logits = np.stack([workload.logits(model, encoder.encode(request)) for request in requests])
        probabilities[num] = sigmoid(logits)
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, cores)
        os.sched_setaffinity(0, cores[1:])  # the store and the sender inherit it
        store = sides.filled_store(stack, world, folder)
        sender = stack.enter_context(find_sender())
        forms: dict[str, sides.HTTPSide] = {}
        for name, artifact in ((REQUEST_FORM, "mian"), (ROW_FORM, "rows")):
            server = stack.enter_context(
                service(
                    artifact,
                    folder / "artifacts",
                    folder,
                    store.url,
                    cores=cores[:1],
                    CLICKSERVE_STORE_TIMEOUT_MS="1000",
                )
            )
            forms[name] = sides.service_side(name, server, sender, bodies, probabilities, columnar=True)
            forms[name].check()
        measured = {}
        for num in sizes:
            burst = partial(_burst, forms, num, seconds)
            measured[num] = run_rounds(list(forms), burst, rounds, draw=random.Random(2026))
        return measured


def _burst(forms: Mapping[str, sides.HTTPSide], candidates: int, seconds: float, name: str) -> Burst:
    return forms[name].burst(candidates=candidates, concurrency=CONNECTIONS, seconds=seconds)


def ratio_of(rounds: Sequence[dict[str, Burst]]) -> Ratio:
    return ratio([found[REQUEST_FORM].per_s for found in rounds], [found[ROW_FORM].per_s for found in rounds])


def markdown(measured: dict[int, list[dict[str, Burst]]]) -> str:
    lines = ["| N | row form, candidates/s | request form, candidates/s | ratio (quartiles) | asked |"]
    lines += ["|---|---|---|---|---|"]
    for num, rounds in measured.items():
        rates = [num * statistics.median(found[name].per_s for found in rounds) for name in (ROW_FORM, REQUEST_FORM)]
        asked = f">= {ASKED[num]:g}" if num in ASKED else ""
        lines.append(f"| {num} | {rates[0]:,.0f} | {rates[1]:,.0f} | {ratio_of(rounds)} | {asked} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--candidates", type=lambda text: [int(n) for n in text.split(",")], default=list(ASKED))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of a burst: a request in row form may take 70 ms")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix="clickserve-bench-") as folder:
            measured = measure(options.candidates, options.rounds, options.seconds, Path(folder))
    except (SenderError, sides.WrongAnswerError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    text = markdown(measured)
    print(text)
    (options.out / "row_form.md").write_text(f"{HEADING}{text}")
    rows = {num: [{n: vars(b) for n, b in found.items()} for found in rounds] for num, rounds in measured.items()}
    (options.out / "row_form.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
