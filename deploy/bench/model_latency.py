"""What it costs to train and to serve each model, and what scoring a request at once saves, in one run.

    python deploy/bench/model_latency.py --data data/ml-1m [--models mian,stec:stec_prod] [--sizes 100,1000] \
        [--repeats 30] \
        [--out DIR]

For each model, freshly initialised by its recipe for that data: parameters, training samples per second, and the
milliseconds of N candidates in two forms of the same exported graph, run as the service runs it:

- request form: the user once, U = 1, C = N;
- row form: what a server sends that scores rows, U = C = N with the user's inputs repeated N times.

One thread; the user and the candidates are rows of the test part; both forms and both runtimes take turns, and medians
are told. Markdown on stdout, and in DIR forms.md, forms.csv (a line for each model, runtime and N) and forms.png. What
cannot be measured is listed with the reason, and the exit code is then 1.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure

from models import zoo
from models.features.arrays import Arrays
from models.layers.base import CTRModel
from service.runtime.backend import Backend, BackendError
from service.runtime.onnx_cpu import OnnxBackend
from service.runtime.torchscript import TorchScriptBackend
from training import recipes
from training.config import Run
from training.data.batches import Prepared, Rows
from training.errors import UserError
from training.export import to_onnx, to_torchscript, used_inputs
from training.fit import loop
from training.progress import say

WARM_UPS = 3  # TorchScript compiles in its second run, and the first run of a size allocates
# Wide sums in float32, added in another order (models.md section 1).
LOGIT_TOLERANCE = 1e-4
RUNTIMES = {"onnx": "ONNX", "torchscript": "TorchScript"}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The median milliseconds of N candidates in one runtime."""

    runtime: str
    candidates: int
    row_ms: float
    request_ms: float

    @property
    def ratio(self) -> float:
        """How many times faster the request form is."""
        return self.row_ms / self.request_ms


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model's line in the table; `error` says why the rest is missing."""

    model: str
    recipe: str
    parameters: int | None = None
    samples_per_s: float | None = None
    speeds: list[Speed] = field(default_factory=list)
    error: str | None = None


def measure(data: Prepared, model: str, recipe: str, *, sizes: Sequence[int], repeats: int, train_s: float) -> Measured:
    """One model. What goes wrong with it is in its `error`."""
    try:
        run = recipes.recipe(recipe, model)
        torch.manual_seed(run.seed)
        built = zoo.build(model, run.model_config, data.schema)
        parameters = sum(p.numel() for p in built.parameters())
        speeds = measure_forms(built.eval(), data, sizes=sizes, repeats=repeats)
        samples_per_s = measure_training(built, data, run, train_s)
    except (UserError, ValueError, RuntimeError) as err:  # torch's exporters raise the last, by many names
        return Measured(model=model, recipe=recipe, error=" ".join(str(err.__cause__ or err).split())[:300])
    return Measured(model=model, recipe=recipe, parameters=parameters, samples_per_s=samples_per_s, speeds=speeds)


def measure_training(model: CTRModel, data: Prepared, run: Run, train_s: float) -> float:
    """Samples per second of the training loop itself, over about `train_s` seconds of the newest training rows."""
    train, valid = data.rows("train"), data.rows("valid")
    valid = _newest(valid, min(len(valid), loop.EVAL_BATCH))  # scored after each pass, outside the time
    once = replace(run, max_epochs=1)
    rows = min(len(train), 3 * run.batch_size)
    with TemporaryDirectory(prefix="clickserve-bench-") as folder:
        for attempt in ("short", "long"):
            within = Path(folder) / attempt
            within.mkdir()
            done = loop.fit(model, _newest(train, rows), valid, once, folder=within, report=lambda _: None)
            speed = rows / done.train_s
            if rows == len(train) or done.train_s >= train_s:
                break
            rows = min(len(train), max(rows, int(train_s * speed)))
    return speed


def _newest(rows: Rows, num: int) -> Rows:
    """The last rows of a part: the first users of a log have no history yet."""
    last = slice(len(rows) - num, None)
    by_row: dict[str, Any] = {name: a[last] for name, a in vars(rows).items() if isinstance(a, np.ndarray)}
    return replace(rows, inputs={name: array[last] for name, array in rows.inputs.items()}, **by_row)


def measure_forms(model: CTRModel, data: Prepared, *, sizes: Sequence[int], repeats: int) -> list[Speed]:
    """Each runtime's speed at each size. Raises BackendError where the two forms answer differently."""
    with TemporaryDirectory(prefix="clickserve-bench-") as folder:
        backends = _backends(model, data, Path(folder))
        speeds = []
        for size in sizes:
            request = request_form(data.rows("test"), size)
            forms = {"request": request, "row": row_form(request)}
            took = _take_turns(backends, forms, repeats)
            for runtime in backends:
                ms = {form: 1000 * statistics.median(took[runtime, form]) for form in forms}
                speeds.append(Speed(runtime=runtime, candidates=size, row_ms=ms["row"], request_ms=ms["request"]))
        for backend in backends.values():
            backend.close()
    return speeds


def _backends(model: CTRModel, data: Prepared, folder: Path) -> dict[str, Backend]:
    (folder / "model.onnx").write_bytes(to_onnx(model, data.schema))
    (folder / "model.ts").write_bytes(to_torchscript(model, data.schema))
    used = [i.name for i in used_inputs(model, data.schema)]
    return {
        "onnx": OnnxBackend(folder / "model.onnx", fed=[i.name for i in data.schema.inputs]),
        "torchscript": TorchScriptBackend(folder / "model.ts", inputs=used),
    }


def request_form(rows: Rows, num_candidates: int) -> Arrays:
    """The part's request with the longest history, with that many of the part's candidates, drawn at random."""
    drawn = np.random.default_rng(num_candidates).integers(len(rows), size=num_candidates)
    longest = int(np.argmax(rows.end - rows.start)) if rows.events else 0
    user = rows.take(np.array([longest])).inputs
    items = rows.take(drawn).inputs
    arrays = {n: (items if n.startswith("item.") else user)[n].numpy() for n in user if n != "user_index"}
    return {**arrays, "user_index": np.zeros(num_candidates, dtype=np.int64)}


def row_form(request: Arrays) -> Arrays:
    """The same as rows that know nothing of each other: every candidate brings its own copy of the user."""
    num = len(request["user_index"])
    arrays = {n: a if n.startswith("item.") else np.repeat(a, num, axis=0) for n, a in request.items()}
    return {**arrays, "user_index": np.arange(num)}


def _take_turns(
    backends: dict[str, Backend], forms: dict[str, Arrays], repeats: int
) -> dict[tuple[str, str], list[float]]:
    """Seconds of every run; what slows the machine down for a moment hits all alike."""
    took: dict[tuple[str, str], list[float]] = {(runtime, form): [] for runtime in backends for form in forms}
    for runtime, backend in backends.items():
        logits = [backend.run(arrays) for arrays in forms.values() for _ in range(WARM_UPS)]
        if not np.allclose(logits[0], logits[-1], rtol=LOGIT_TOLERANCE, atol=LOGIT_TOLERANCE):
            raise BackendError(f"{runtime}: the forms differ by up to {np.abs(logits[0] - logits[-1]).max():.3g}")
    for _ in range(repeats):
        for (runtime, form), seconds in took.items():
            started = time.perf_counter()
            backends[runtime].run(forms[form])
            seconds.append(time.perf_counter() - started)
    return took


def markdown(lines: Sequence[Measured], sizes: Sequence[int]) -> str:
    """A line for each measured model, then those that were not, with the reason."""
    columns = [(runtime, size) for size in sizes for runtime in RUNTIMES]
    titles = ["model", "parameters", "training samples/s", *(f"{RUNTIMES[r]}, N = {n}" for r, n in columns)]
    text = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for line in lines:
        if line.error is None:
            found = {(s.runtime, s.candidates): s for s in line.speeds}
            told = [f"{s.row_ms:.2f} → {s.request_ms:.2f} ({s.ratio:.1f}×)" for s in map(found.__getitem__, columns)]
            cells = [line.recipe, f"{line.parameters:,}", f"{line.samples_per_s:,.0f}", *told]
            text.append("| " + " | ".join(cells) + " |")
    text += ["", "Milliseconds in row form → in request form (row / request); one thread, medians."]
    text += [f"Not measured: {line.recipe}: {line.error}" for line in lines if line.error is not None]
    return "\n".join(text)


def table(lines: Sequence[Measured]) -> pl.DataFrame:
    """A line for each model, runtime and number of candidates; one line with the error for what was not measured."""
    rows = []
    for line in lines:
        told = {name: getattr(line, name) for name in ("model", "recipe", "parameters", "samples_per_s")}
        speeds = [{**vars(speed), "ratio": speed.ratio} for speed in line.speeds]
        rows += [{**told, **speed, "error": line.error} for speed in speeds or [{}]]
    schema = {"model": pl.String, "recipe": pl.String, "parameters": pl.Int64, "samples_per_s": pl.Float64}
    schema |= {"runtime": pl.String, "candidates": pl.Int64, "row_ms": pl.Float64, "request_ms": pl.Float64}
    return pl.DataFrame(rows, schema=schema | {"ratio": pl.Float64, "error": pl.String})


def plot(lines: Sequence[Measured], size: int, file: Path) -> None:
    """Both forms of each model at one size in ONNX Runtime, the fastest request first."""
    found = {line.recipe: s for line in lines for s in line.speeds if (s.runtime, s.candidates) == ("onnx", size)}
    names = sorted(found, key=lambda name: found[name].request_ms, reverse=True)
    figure = Figure(figsize=(8, 1 + 0.3 * len(names)), dpi=120, layout="constrained")
    axes = figure.subplots()
    row, request = ([getattr(found[name], form) for name in names] for form in ("row_ms", "request_ms"))
    axes.hlines(names, request, row, color="#8b949e", lw=1)
    axes.plot(row, names, "o", color="#b35900", label="row form")
    axes.plot(request, names, "o", color="#1f5fbf", label="request form")
    axes.set_xscale("log")
    axes.set_xlabel("ms", fontsize=9)
    axes.set_title(f"{size} candidates, ONNX Runtime, one thread", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def chosen(text: str | None, dataset: str) -> Iterator[tuple[str, str]]:
    """Model and recipe for each `name` or `name:recipe`. Raises UserError for what there is not."""
    for entry in text.split(",") if text else zoo.MODELS:
        model, _, recipe = entry.partition(":")
        if model not in zoo.MODELS:
            raise UserError(f"--models {entry}: no such model; there are {', '.join(zoo.MODELS)}")
        recipe = recipe or recipes.default(model, dataset)
        recipes.recipe(recipe, model)
        yield model, recipe


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:12]) <= 10**6 or len(text) > 12:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 10^6, got {text!r:.60}")
    return int(text)


def _sizes(text: str) -> list[int]:
    return list(dict.fromkeys(map(_count, text.split(","))))


def _seconds(text: str) -> float:
    try:
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r:.60}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder written by `python -m training prepare`")
    parser.add_argument("--models", metavar="NAME[:RECIPE],...", help="default: every model")
    parser.add_argument("--sizes", type=_sizes, default="100,1000", help="numbers of candidates")
    parser.add_argument("--repeats", type=_count, default=30, help="timed runs of each form, runtime and size")
    parser.add_argument("--train-s", type=_seconds, default=5.0, help="seconds of training to time")
    parser.add_argument("--out", type=Path, help="a folder for forms.md, forms.csv and forms.png")
    torch.set_num_threads(1)
    try:
        options = parser.parse_args(arguments)
        data, sizes = Prepared.open(options.data), options.sizes
        asked = list(chosen(options.models, data.name))
        for part in ("train", "valid", "test"):
            data.rows(part)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)  # now, not when all is measured
    except UserError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    except OSError as err:
        print(f"error: --out {options.out}: {err.strerror}", file=sys.stderr)
        return 2
    lines = []
    for number, (model, recipe) in enumerate(asked, start=1):
        say(f"{number}/{len(asked)} {recipe}")
        lines.append(measure(data, model, recipe, sizes=sizes, repeats=options.repeats, train_s=options.train_s))
        say(f"  {lines[-1].error or f'{lines[-1].samples_per_s:,.0f} samples/s'}")
    print(markdown(lines, sizes))
    if options.out is not None:
        (options.out / "forms.md").write_text(markdown(lines, sizes) + "\n")
        table(lines).write_csv(options.out / "forms.csv")
        plot(lines, sizes[-1], options.out / "forms.png")
    return int(any(line.error for line in lines))


if __name__ == "__main__":
    sys.exit(main())
