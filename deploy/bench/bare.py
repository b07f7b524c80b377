"""Runs a graph with its inputs ready, in turns with a service: told `SECONDS` on stdin, answers `RUNS SECONDS`.

    python deploy/bench/bare.py GRAPH.onnx INPUTS.npz

What engine.py sets the service against. One thread, one request a run, as the service's own backend has it, but without
that: nothing but `session.run`.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

CHECKED = 16  # runs between two looks at the clock


def main(graph: Path, inputs: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph.read_bytes(), options, providers=["CPUExecutionProvider"])
    wanted = [i.name for i in session.get_inputs()]
    fed = itertools.cycle([{name: request[name] for name in wanted} for request in _requests(inputs)])
    for _ in range(100):
        session.run(["logit"], next(fed))
    print("ready", flush=True)
    for line in sys.stdin:
        runs, started = 0, time.perf_counter()
        while (took := time.perf_counter() - started) < float(line):
            for _ in range(CHECKED):
                session.run(["logit"], next(fed))
            runs += CHECKED
        print(runs, took, flush=True)


def save(requests: list[dict[str, Any]], file: Path) -> None:
    """Each request's arrays under its number."""
    np.savez(
        file,
        allow_pickle=False,
        **{f"{n} {name}": a for n, request in enumerate(requests) for name, a in request.items()},
    )


def _requests(file: Path) -> Iterator[dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {}
    with np.load(file) as arrays:
        for key in arrays:
            number, _, name = key.partition(" ")
            made.setdefault(number, {})[name] = arrays[key]
    yield from made.values()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
