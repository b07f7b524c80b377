"""Criteo display advertising (Kaggle 2014): a click, 13 integers I1..I13 and 26 hashed words C1..C26 per impression.

`train.txt` (or `train.txt.gz`) as Criteo gives it has no header and TABs between columns, the label first. Samples as
CSV with a header that names `label` (or `Label`) and all 39 are read too, in any order, other columns left out.

What a column means is not published, so all fields are the candidate's: nothing tells which belong to the user. There
is no clock; a row's number stands in for its time, and is what the random split is made by.

    split      dynint: 70/10/20 %, as DynInt. x1: 72/18/10 %, the sizes of AFN's and STEC's Criteo_x1, not its very rows
    discretise how an integer becomes a level (`features.values.buckets`), in training and serving alike; none keeps it
               a number, scaled to its range in training, as STEC has it
    min_count  rarer levels are unknown: 20 as DynInt; the x1 set has 10
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import polars as pl

from models.features.field import FieldSpec
from models.features.schema import SchemaSpec
from models.features.values import Discretise
from training.datasets import delimited
from training.datasets.delimited import LABEL, Form
from training.errors import UserError
from training.log import Log, split_by_number

NUMBERS = tuple(f"I{number}" for number in range(1, 14))
WORDS = tuple(f"C{number}" for number in range(1, 27))
# Samples that went through pandas have 2.0 where Criteo has 2.
FORMS = {
    **dict.fromkeys(NUMBERS, Form(r"(?:-?[0-9]{1,15}(?:\.0*)?)?", "a whole number or nothing")),
    **dict.fromkeys(WORDS, Form(r"[0-9A-Za-z_-]*", "a hashed word or nothing")),
}
SHARES = {"dynint": (0.1, 0.2), "x1": (0.18, 0.1)}  # validation, test


@dataclass(frozen=True, kw_only=True)
class CriteoOptions:
    discretise: Literal["winners", "log_square", "ln_square_plus_one", "none"] = "winners"
    min_count: int = 20
    split: Literal["dynint", "x1"] = "dynint"
    seed: int = 2026

    def __post_init__(self) -> None:
        if self.discretise not in (*get_args(Discretise), "none"):
            known = ", ".join((*get_args(Discretise), "none"))
            raise UserError(f"discretise is one of {known}, got {self.discretise}")
        if self.split not in SHARES:
            raise UserError(f"split is one of {', '.join(SHARES)}, got {self.split}")
        if not 1 <= self.min_count <= 10**9 or not 0 <= self.seed < 2**32:
            raise UserError(
                f"min_count is from 1 to 10^9 and seed from 0 to 2^32 - 1, got {self.min_count} and {self.seed}"
            )


def load(source: Path, options: CriteoOptions = CriteoOptions()) -> Log:
    """The training file, or a folder with it; the label of Criteo's own test file is not public."""
    file = _file(source)
    valid, test = SHARES[options.split]
    rows = _read(file).with_columns(
        *(pl.lit(None, dtype=pl.String).alias(key) for key in ("user", "item")),
        pl.col("row").cast(pl.Float64).alias("ts"),
        pl.col("label").cast(pl.Int8),
        split_by_number(pl.col("row"), seed=options.seed, valid=valid, test=test),
        pl.col(NUMBERS).cast(pl.Float64),
    )
    return Log(name="criteo", source=source, spec=_spec(options), rows=rows.drop("row"), files=(file,))


def _spec(options: CriteoOptions) -> SchemaSpec:
    words = [FieldSpec(name=name, kind="categorical", group="item", min_count=options.min_count) for name in WORDS]
    if options.discretise == "none":
        numbers = [
            FieldSpec(name=name, kind="numeric", group="item", normalise="min_max", clip=False) for name in NUMBERS
        ]
    else:
        numbers = [
            FieldSpec(
                name=name,
                kind="categorical",
                group="item",
                min_count=options.min_count,
                discretise=options.discretise,
            )
            for name in NUMBERS
        ]
    return SchemaSpec(fields=(*numbers, *words))


def _file(source: Path) -> Path:
    if not source.is_dir():
        return source
    names = ("train.txt", "train.txt.gz")
    found = next((source / name for name in names if (source / name).is_file()), None)
    if found is None:
        raise UserError(f"{source}: expected {' or '.join(names)} in it, found neither")
    return found


def _read(file: Path) -> pl.LazyFrame:
    first = delimited.header(file)
    if "\t" in first:
        return delimited.read(file, {"label": LABEL, **FORMS}, separator="\t", names=("label", *NUMBERS, *WORDS))
    label = "Label" if "Label" in first.split(",") else "label"
    if label not in first.split(","):
        raise UserError(
            f"{file}, line 1: expected a label and 39 values with TABs between, or the header of a CSV file with"
            f" label, I1..I13 and C1..C26, got {first!r:.120}"
        )
    return delimited.read(file, {label: LABEL, **FORMS}, separator=",").rename({label: "label"})
