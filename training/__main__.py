"""The door to everything offline: `python -m training COMMAND`, from simulate and prepare to compare and explain."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from training.errors import ConstantModelError, UserError
from training.progress import say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from training.data.batches import Prepared
    from training.fit.run_folder import Trained

# torch, polars and matplotlib take seconds to load: only the command that needs them imports them.
MODELS = (
    *("mian", "stec", "dynint", "deepmr", "feseq"),
    *("deepfm", "lr", "fm", "widedeep", "dcn", "dcnv2", "xdeepfm", "autoint", "finalmlp", "din", "dien", "dmr", "bst"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the user's mistake, 3 a useless model, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    options = argparse.Namespace()
    try:
        options = _parser().parse_args(argv)
        options.line = shlex.join(["python", "-m", "training", *argv])
        options.command(options)
    except UserError as err:
        print(f"error: {' '.join(str(err).split())}", file=sys.stderr)
        return 3 if isinstance(err, ConstantModelError) else 2
    except OSError as err:  # a disk that is full, a folder that may not be written
        where = err.filename or getattr(options, "out", None)
        print(f"error: {f'{where}: ' if where else ''}{err.strerror or err}", file=sys.stderr)
        return 2
    except MemoryError as err:
        print(f"error: not enough memory: {err or 'ask for less'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; {_how_to_go_on(argv)}", file=sys.stderr)
        return 130
    return 0


def _simulate(options: argparse.Namespace) -> None:
    from training.simulator.simulate import simulate

    simulate(options.out, options.users, options.items, options.rows, options.seed)
    _next("prepare", "simulated", "--source", options.out, "--out", "DIR")


def _prepare(options: argparse.Namespace) -> None:
    from training.data.prepare import prepare

    prepared = prepare(options.dataset, options.source, options.out, options.schema, options.settings)
    print((options.out / "data.txt").read_text("utf-8"))
    _use_threads(None)
    from training.data.batches import Prepared
    from training.recipes.suggestion import suggested

    model, settings = suggested(Prepared.open(options.out).schema, prepared["name"])
    if settings:
        say(f"{model} with {', '.join(settings)}: the data have no fields for what that leaves out")
    words = ("--set", *settings) if settings else ()
    _next("train", model, "--data", options.out, "--out", "RUN", *words)


def _train(options: argparse.Namespace) -> None:
    _use_threads(options.threads)
    from training.data.batches import Prepared
    from training.evaluation import run_report
    from training.fit import run_folder

    data = Prepared.open(options.data)
    run = run_folder.begin(options.out, data, options.model, options.recipe, options.settings, resume=options.resume)
    figures = run_folder.train(options.out, data, run)
    print(run_report.table({part: figures[part] for part in ("valid", "test")}))
    print(
        f"{figures['parameters']:,} parameters, {figures['epochs']} epochs in {figures['train_seconds']:.0f} s,"
        f" {figures['samples_per_s']:,.0f} samples/s"
    )
    _next("export", options.out, "--out", "artifacts")


def _evaluate(options: argparse.Namespace) -> None:
    _use_threads(options.threads)
    from training.data.batches import Prepared
    from training.evaluation import run_report
    from training.fit import run_folder

    trained = run_folder.read(options.run)
    data = Prepared.open(options.data or trained.data)
    logits = run_folder.score(trained, data, options.part)
    if options.predictions is not None:
        _write_predictions(options.predictions, trained, data, options.part, logits)
        say(f"wrote {options.predictions}: row, label, logit and calibrated ctr of {len(logits):,} rows")
    print(run_report.table({options.part: run_folder.measure(data, options.part, logits, trained.calibration)}))


def _plot(options: argparse.Namespace) -> None:
    from training.evaluation import run_report
    from training.fit import run_folder

    run_report.plot_curves(run_folder.logs(options.runs), options.out)
    print(f"wrote {options.out}: AUC and log loss of {len(options.runs)} runs against steps")


def _export(options: argparse.Namespace) -> None:
    from training.fit import run_folder
    from training.run_export import export_run

    trained = run_folder.read(options.run)
    say(f"exporting {trained.run.model} to ONNX and TorchScript")
    print(f"wrote {export_run(trained, options.out)}, read back and verified")


def _compare(options: argparse.Namespace) -> None:
    if not options.report_only and (options.seeds is None or not (options.models or options.variants)):
        raise UserError("compare wants --seeds and --models or --variant, or else --report-only")
    _use_threads(options.threads)
    from training.comparison import compare
    from training.data.batches import Prepared

    data, failed = Prepared.open(options.data), []
    if not options.report_only:
        variants = compare.variants(options.models, options.variants)
        failed = compare.compare(
            options.out, data, variants, options.seeds, options.settings, command=options.line, against=options.against
        )
    print(compare.report(options.out, data, options.against))
    say(f"wrote {options.out}/compare.md, compare.csv, compare.png and runs.csv")
    if failed:
        raise UserError(f"{len(failed)} of the runs failed, the others are done: {'; '.join(failed)}")


def _explain(options: argparse.Namespace) -> None:
    _use_threads(options.threads)
    from training.data.batches import Prepared
    from training.explanation import explain
    from training.fit import run_folder

    trained = run_folder.read(options.run)
    data = Prepared.open(options.data or trained.data)
    num = options.requests or 3
    files = explain.explain(trained, data, options.part, options.out, rows=options.rows, num_requests=num)
    print(f"wrote {files[0]} and {len(files) - 1} heat maps beside it")


def _spectrum(options: argparse.Namespace) -> None:
    from training.explanation import spectrum
    from training.fit import run_folder

    files = spectrum.spectrum(run_folder.read(options.run), options.out)
    print(f"wrote {' and '.join(map(str, files))}")


def _write_predictions(
    file: Path, trained: "Trained", data: "Prepared", part: str, logits: "NDArray[np.float32]"
) -> None:
    import polars as pl

    from training.log import write_parquet

    columns = {
        "row": range(len(logits)),
        "label": data.rows(part).label,
        "logit": logits,
        "ctr": trained.calibration(logits),
    }
    frame = pl.DataFrame(columns)
    if file.suffix == ".csv":
        frame.write_csv(file)
    else:
        write_parquet(frame, file)


def _use_threads(threads: int | None) -> None:
    """To be called before anything loads torch, which reads the environment once."""
    # Where others use the cores too, threads that spin while they wait cost most of the time: steps of stec_simulated
    # on two threads beside another training ran at 750 to 1,060 rows/s, with PASSIVE at 2,560 to 5,130.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _next(*words: object) -> None:
    print(f"next: {shlex.join(['python', '-m', 'training', *map(str, words)])}")


def _how_to_go_on(argv: Sequence[str]) -> str:
    resume = [] if argv[0] != "train" or "--resume" in argv else ["--resume"]
    again = shlex.join(["python", "-m", "training", *argv, *resume])
    return f"{'go on' if argv[0] in ('train', 'compare') else 'start again'} with: {again}"


class _Parser(argparse.ArgumentParser):
    appendix: Callable[[], str] | None = None
    """Made only when help is asked for, as it may take what is slow to load."""

    def format_help(self) -> str:
        return super().format_help() + (f"\n{self.appendix()}\n" if self.appendix else "")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _recipes() -> str:
    from training import recipes

    return recipes.listing()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m training", description="From raw files to a verified artifact.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    simulate = commands.add_parser("simulate", help="draw an ad log with known true click probabilities")
    simulate.set_defaults(command=_simulate)
    simulate.add_argument("--out", type=Path, required=True, metavar="DIR")
    simulate.add_argument("--users", type=_count, required=True, metavar="N")
    simulate.add_argument("--items", type=_count, required=True, metavar="N")
    simulate.add_argument("--rows", type=_count, required=True, metavar="N", help="impressions")
    simulate.add_argument("--seed", type=int, required=True, metavar="S")

    prepare = commands.add_parser("prepare", help="read raw files, fit the schema, encode the parts")
    prepare.set_defaults(command=_prepare)
    prepare.add_argument("dataset", nargs="?", metavar="DATASET", help="a known data set; else give --schema")
    prepare.add_argument("--schema", type=Path, metavar="FILE.yaml", help="what the columns of any CSV or Parquet mean")
    prepare.add_argument("--source", type=Path, required=True, metavar="PATH")
    prepare.add_argument("--out", type=Path, required=True, metavar="DIR")
    _add_settings(prepare, "choose among the data set's options: discretise=winners min_count=20 split=dynint, ...")

    train = commands.add_parser("train", help="train a model on prepared data")
    train.set_defaults(command=_train)
    train.appendix = _recipes
    train.add_argument("model", choices=MODELS, metavar="MODEL", help=", ".join(MODELS))
    train.add_argument("--data", type=Path, required=True, metavar="DIR", help="what prepare wrote")
    train.add_argument("--out", type=Path, required=True, metavar="RUN", help="a new folder for the run")
    train.add_argument("--recipe", metavar="NAME", help="one of those below")
    _add_settings(train, "change the recipe: lr=0.01, model.emb_dim=16, ...")
    train.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    _add_threads(train)

    evaluate = commands.add_parser("evaluate", help="measure a finished run again")
    _add_evaluate(evaluate)

    plot = commands.add_parser("plot", help="draw the AUC and log loss of several runs against steps in one picture")
    _add_plot(plot)

    compare = commands.add_parser("compare", help="train several models with several seeds, judge them in one table")
    compare.set_defaults(command=_compare)
    compare.add_argument("--data", type=Path, required=True, metavar="DIR", help="what prepare wrote")
    compare.add_argument("--models", metavar="A,B:RECIPE", help=f"one row of the table each: {', '.join(MODELS)}")
    compare.add_argument(
        "--variant",
        action="append",
        nargs="+",
        default=[],
        dest="variants",
        metavar=("NAME=MODEL[:RECIPE]", "KEY=VALUE"),
        help="one more row, with settings of its own: mian-no-ibim=mian model.ibim=false; may be repeated",
    )
    compare.add_argument("--seeds", type=_few, metavar="N", help="train each with N seeds: 2026, 2027, ...")
    compare.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a new folder, or one to add models or seeds to"
    )
    _add_settings(compare, "change every recipe: max_epochs=3, ...")
    compare.add_argument("--against", metavar="NAME", help="test against this row; default: the best baseline")
    compare.add_argument(
        "--report-only", action="store_true", help="write the table of all that is finished in --out, train nothing"
    )
    _add_threads(compare)

    explain = commands.add_parser("explain", help="draw what a finished run's model attends to")
    _add_explain(explain)

    _add_spectrum(commands.add_parser("spectrum", help="draw the singular values of a finished dynint's weights"))

    export = commands.add_parser("export", help="make the artifact that the service loads")
    export.set_defaults(command=_export)
    export.add_argument("run", type=Path, metavar="RUN")
    export.add_argument("--out", type=Path, required=True, metavar="ARTIFACTS")
    return parser


def _add_settings(parser: argparse.ArgumentParser, description: str) -> None:
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], dest="settings", metavar="KEY=VALUE", help=description
    )


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_explain)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="DIR", help="default: what it was trained on")
    parser.add_argument("--part", choices=("test", "valid"), default="test")
    chosen = parser.add_mutually_exclusive_group()  # without defaults: argparse takes one of them for not given
    chosen.add_argument("--rows", type=_rows, metavar="N,N,...", help="these rows of the part, by request")
    chosen.add_argument("--requests", type=_count, metavar="N", help="or so many requests; default: 3")
    _add_threads(parser)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_evaluate)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path, metavar="DIR", help="default: what it was trained on")
    parser.add_argument("--part", choices=("test", "valid"), default="test")
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="write every row's score, as Parquet or .csv")
    _add_threads(parser)


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_plot)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="finished or still in training")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .png, .svg or .pdf")


def _add_spectrum(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(command=_spectrum)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=_few, metavar="N", help="CPU threads; default: OMP_NUM_THREADS, else every core"
    )


def _rows(text: str) -> list[int]:
    rows = text.split(",")
    if not all(row.isdecimal() and len(row) <= 12 for row in rows):
        raise argparse.ArgumentTypeError(f"expected row numbers from 0 on, as 0,5,9, got {text!r}")
    return list(map(int, rows))


def _count(text: str) -> int:
    return _at_most(text, 10**12 - 1)


def _few(text: str) -> int:
    return _at_most(text, 1000)


def _at_most(text: str, most: int) -> int:
    if not text.isdecimal() or len(text) > len(str(most)) or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {most:,}, got {text!r:.60}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
