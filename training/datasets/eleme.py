"""Ele.me food delivery (Tianchi 131047): impressions with clicks, as the FESeq paper and its code take them.

The files `D1_0.csv` ... have no header: 39 columns with commas between, in the order of COLUMNS. The files do not say
so themselves: it is the order in which FESeq's code (`data/sample_merge_ele.py`) and others who train on these files
read them. Every line is checked against what its columns must hold. Many published files are damaged; FESeq takes a
third of the rows of D1_0, D3_1 and D5_0, and so does this loader unless told otherwise.

As in FESeq's code: rows with an absent value, gender -99, or -1 in one of PLACES are dropped; values seen fewer than
ten times are rare; numbers are scaled to their range; the split is by time, 80/10/10 of the rows. The `*_list`
sequences of the release are not used, as in FESeq: a history is made of the log's own rows, and most users have none.
Unlike there, it is strictly earlier (what stood higher on the same page is not past), and of clicks:
`history=impressions` makes it of all rows, as FESeq's, but the service keeps clicks, so that a model trained so meets
another past there than it learned from.

`times` orders the rows. It is taken for Unix seconds, or milliseconds where too large for that; what it counts could
not be learned without the files, so no clock is made of it: hour, time type and weekday come from their columns, as
context. A past event shows the categorical fields of its item; with `sequences=paper` also the item's ranks and the
event's hour, time type and weekday, which are FESeq's 14 sequences. The service has the latter three where events send
them as `features` or `context`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.features.field import FieldSpec, Group
from models.features.schema import SchemaSpec
from training.datasets import delimited
from training.datasets.delimited import LABEL, Form
from training.errors import UserError
from training.log import Log, split_by_number

History = Literal["clicks", "impressions"]
Sequences = Literal["items", "paper"]

GAPS = ("NULL", "null", "NaN", "nan", "NA", "None")  # how tables spell an absent value, if they do not leave it empty
GAP = "|".join(("", *GAPS))
ANY = Form("[^,]*", "anything")
WHOLE = Form(rf"-?[0-9]{{1,18}}|{GAP}", "a whole number or nothing")
NUMBER = Form(rf"-?[0-9]{{1,18}}(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{{1,2}})?|{GAP}", "a number below 1e118 or nothing")
HOUR = Form(rf"[01]?[0-9]|2[0-3]|{GAP}", "an hour from 0 to 23 or nothing")
LISTS = (
    *("shop_id_list", "item_id_list", "category_1_id_list", "merge_standard_food_id_list", "brand_id_list"),
    *("price_list", "shop_aoi_id_list", "shop_geohash_6_list", "timediff_list", "hours_list", "time_type_list"),
    "weekdays_list",
)
COLUMNS: Mapping[str, Form] = {
    "label": LABEL, "user_id": ANY, "gender": WHOLE, "visit_city": WHOLE, "avg_price": NUMBER,
    "is_super_vip": WHOLE, "ctr_30": NUMBER, "ord_30": NUMBER, "total_amt_30": NUMBER,
    "shop_id": ANY, "item_id": ANY, "city_id": ANY, "district_id": ANY, "shop_aoi_id": ANY, "shop_geohash_6": ANY,
    "shop_geohash_12": ANY, "brand_id": ANY, "category_1_id": WHOLE, "merge_standard_food_id": ANY,
    "rank_7": NUMBER, "rank_30": NUMBER, "rank_90": NUMBER, **dict.fromkeys(LISTS, ANY),
    "times": WHOLE, "hours": HOUR, "time_type": ANY, "weekdays": WHOLE, "geohash12": ANY,
}  # fmt: skip
FIELDS: Mapping[Group, tuple[str, ...]] = {
    "user": ("user_id", "gender", "visit_city", "avg_price", "is_super_vip", "ctr_30", "ord_30", "total_amt_30"),
    "context": ("hours", "time_type", "weekdays", "geohash12"),
    "item": (
        *("shop_id", "item_id", "city_id", "district_id", "shop_aoi_id", "shop_geohash_6", "shop_geohash_12"),
        *("category_1_id", "rank_7", "rank_30", "rank_90"),
    ),
}
NUMERIC = ("avg_price", "ctr_30", "ord_30", "total_amt_30", "rank_7", "rank_30", "rank_90")
MOMENT = ("hours", "time_type", "weekdays")
PLACES = (
    *("city_id", "district_id", "shop_aoi_id", "shop_geohash_6", "shop_geohash_12", "rank_7", "rank_30", "rank_90"),
    "geohash12",
)
LATEST_S = 1e11  # the year 5138: anything above is milliseconds


@dataclass(frozen=True, kw_only=True)
class ElemeOptions:
    files: str = "D1_0,D3_1,D5_0"
    share: float = 1 / 3  # of each file's rows, drawn
    seed: int = 2023
    min_count: int = 10
    history: History = "clicks"
    history_length: int = 10
    sequences: Sequences = "items"

    def __post_init__(self) -> None:
        if self.history not in get_args(History):
            raise UserError(f"history is one of {', '.join(get_args(History))}, got {self.history}")
        if self.sequences not in get_args(Sequences):
            raise UserError(f"sequences is one of {', '.join(get_args(Sequences))}, got {self.sequences}")
        names = [name.strip() for name in self.files.split(",")]
        if len(set(names)) < len(names):
            raise UserError(f"files names each file once, got {self.files}")
        if not 0 < self.share <= 1:
            raise UserError(f"share is a part of the rows above 0 and up to 1, got {self.share:g}")
        if self.seed < 0:
            raise UserError(f"seed is a whole number from 0 on, got {self.seed}")
        for name, number in (("min_count", self.min_count), ("history_length", self.history_length)):
            if not 1 <= number <= 1000:
                raise UserError(f"{name} is a number from 1 to 1000, got {number}")


def load(source: Path, options: ElemeOptions = ElemeOptions()) -> Log:
    """The drawn rows, the incomplete ones dropped; nothing but their times is held in memory."""
    files = tuple(source / f"{name.strip()}.csv" for name in options.files.split(","))
    drawn = pl.concat([_drawn(file, number, options) for number, file in enumerate(files)])
    times = drawn.select(_seconds(), whole=_is_whole()).collect(engine="streaming")
    ts = times.filter("whole")["ts"].to_numpy()
    if not len(ts):
        raise UserError(f"{source}: expected complete rows, each of {times.height:,} lacks a value")
    rows = drawn.filter(_is_whole()).select(
        pl.col("label").cast(pl.Int8),
        _seconds(),
        pl.col("user_id").alias("user"),
        pl.col("item_id").alias("item"),
        *(_field(name) for names in FIELDS.values() for name in names if name not in ("user_id", "item_id")),
        _part(_seconds(), ts),
    )
    notes = (
        f"{times.height:,} rows drawn, {times.height - len(ts):,} of them dropped for an absent value",
        f"times, taken for Unix seconds, run from {ts.min():.0f} to {ts.max():.0f}",
        f"the past of a user is its {options.history}",
    )
    return Log(
        name="eleme", source=source, spec=_spec(options), rows=rows, files=files, history=options.history, notes=notes
    )


def _spec(options: ElemeOptions) -> SchemaSpec:
    def field(name: str, group: Group) -> FieldSpec:
        if name in NUMERIC:
            return FieldSpec(name=name, kind="numeric", group=group, normalise="min_max", clip=False)
        return FieldSpec(name=name, kind="categorical", group=group, min_count=options.min_count, null_values=GAPS)

    past = [name for name in FIELDS["item"] if name not in NUMERIC]
    if options.sequences == "paper":
        past = [*FIELDS["item"], *MOMENT]
    return SchemaSpec(
        user_key="user_id",
        item_key="item_id",
        history_length=options.history_length,
        fields=(
            *(field(name, group) for group, names in FIELDS.items() for name in names),
            *(FieldSpec(name=name, kind="sequence", group="behaviour", of=name) for name in past),
        ),
    )


def _drawn(file: Path, number: int, options: ElemeOptions) -> pl.LazyFrame:
    used = {name: form for name, form in COLUMNS.items() if name not in LISTS}
    rows = delimited.read(file, used, separator=",", names=tuple(COLUMNS))
    # Each file draws by a seed of its own, else the same lines of all would be taken.
    part = split_by_number(pl.col("row"), seed=1000 * options.seed + number, valid=1 - options.share, test=0.0)
    return rows.filter(part == "train")


def _is_whole() -> pl.Expr:
    used = pl.col([name for name in COLUMNS if name not in LISTS])
    present = pl.all_horizontal(used.is_not_null() & ~used.is_in(GAPS))
    nowhere = pl.any_horizontal(pl.col(PLACES).str.contains(r"^-1(\.0*)?$"))  # -1.0 is -1 too
    return (present & ~nowhere & (pl.col("gender") != "-99")).fill_null(value=False)


def _seconds() -> pl.Expr:
    times = pl.col("times").cast(pl.Float64, strict=False)
    return pl.when(times > LATEST_S).then(times / 1000).otherwise(times).alias("ts")


def _field(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.Float64) if name in NUMERIC else pl.col(name)


def _part(ts: pl.Expr, times: NDArray[np.float64]) -> pl.Expr:
    """As `training.log.split_by_time` cuts: the first 80 % of the rows, 10, 10, those of one time never torn apart."""
    ordered = np.sort(times)
    valid, test = (float(ordered[min(round(len(ordered) * share), len(ordered) - 1)]) for share in (0.8, 0.9))
    later = pl.when(ts < test).then(pl.lit("valid")).otherwise(pl.lit("test"))
    return pl.when(ts < valid).then(pl.lit("train")).otherwise(later).alias("part")
