"""Avazu mobile ads (Kaggle 2014): `train.csv` or `train.gz` with the header id,click,hour,C1,banner_pos,...,C21.

The 21 fields of DynInt: all but id and hour. Where the ad is shown and on what device is context, and so is C1, which
nobody explains; C14..C21 are taken for the ad's own (C15 and C16 are plainly its width and height). There is no user:
`device_ip` and `device_id` name one badly, and are the fields with millions of values. A row's time is the beginning of
its hour (YYMMDDHH, UTC). The split is random by the row's number, 70/10/20 %, which is DynInt's law and the sizes of
AFN's and STEC's Avazu_x1, not their very rows.

    min_count  rarer levels are unknown: 20 as DynInt
    clock      whether hour and weekday of the request are fields too; DynInt leaves the time out
"""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from models.features.field import FieldSpec
from models.features.schema import SchemaSpec
from training.datasets import delimited
from training.datasets.delimited import LABEL, Form
from training.errors import UserError
from training.log import Log, split_by_number

CONTEXT = (
    *("C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model", "device_type", "device_conn_type"),
)
ITEM = tuple(f"C{number}" for number in range(14, 22))
FORMS = {
    "click": LABEL,
    "hour": Form(r"[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])(?:[01][0-9]|2[0-3])", "a time as YYMMDDHH"),
    **dict.fromkeys((*CONTEXT, *ITEM), Form("[0-9A-Za-z_-]*", "a code or nothing")),
}
CLOCK = (
    FieldSpec(name="hour_of_day", kind="time", group="context", part="hour"),
    FieldSpec(name="weekday", kind="time", group="context", part="weekday"),
)


@dataclass(frozen=True, kw_only=True)
class AvazuOptions:
    min_count: int = 20
    clock: bool = False
    seed: int = 2026

    def __post_init__(self) -> None:
        if not 1 <= self.min_count <= 10**9 or not 0 <= self.seed < 2**32:
            raise UserError(
                f"min_count is from 1 to 10^9 and seed from 0 to 2^32 - 1, got {self.min_count} and {self.seed}"
            )


def load(source: Path, options: AvazuOptions = AvazuOptions()) -> Log:
    """The training file, or a folder with it; the clicks of Avazu's own test file are not public."""
    file = _file(source)
    read = delimited.read(file, FORMS, separator=",")
    hour = (pl.col("hour") + "00").str.to_datetime("%y%m%d%H%M", strict=False)
    delimited.check_times(file, read, "hour", hour)
    rows = read.with_columns(
        *(pl.lit(None, dtype=pl.String).alias(key) for key in ("user", "item")),
        (hour.dt.epoch("s")).cast(pl.Float64).alias("ts"),
        pl.col("click").cast(pl.Int8).alias("label"),
        split_by_number(pl.col("row"), seed=options.seed, valid=0.1, test=0.2),
    ).drop("row", "click", "hour")
    return Log(name="avazu", source=source, spec=_spec(options), rows=rows, files=(file,))


def _spec(options: AvazuOptions) -> SchemaSpec:
    fields = [
        FieldSpec(name=name, kind="categorical", group="context", min_count=options.min_count) for name in CONTEXT
    ]
    fields += CLOCK if options.clock else ()
    fields += [FieldSpec(name=name, kind="categorical", group="item", min_count=options.min_count) for name in ITEM]
    return SchemaSpec(fields=tuple(fields))


def _file(source: Path) -> Path:
    if not source.is_dir():
        return source
    names = ("train.csv", "train.csv.gz", "train.gz")
    found = next((source / name for name in names if (source / name).is_file()), None)
    if found is None:
        raise UserError(f"{source}: expected {', '.join(names[:-1])} or {names[-1]} in it, found none")
    return found
