"""Amazon reviews: would this user buy this item? A review is a purchase; what was not bought is drawn for each one.

The folder holds one of
    reviews_*.json[.gz]    one JSON object per line with reviewerID, asin, unixReviewTime (SNAP 2014, 5-core), and
                           beside it meta_*.json[.gz], per line an object with asin and categories, as JSON or as
                           Python spells it
    train.csv              user_id, item_id, time with TAB between, and item_meta.csv with item_id, i_category, ...
    interactions.parquet   user, item, timestamp
Times are Unix seconds, of whole days in the published files. A past purchase is in the history where its day is
strictly earlier, so that most of what was bought together is in nobody's history. The context is the weekday and the
month of the review, in UTC, and its hour where some time is not midnight; of the user only the id is known. The
category is the last one that the meta file gives (as in DIN); without a meta file there is none.

Each purchase gets `negatives` items that its user never bought, with its own time and so its history. Two protocols:
    last    each user's last purchase is tested, the one before it validates, the rest trains (DIN's, which has no
            part to stop by). Users with fewer than three only train. A user's first purchase trains with an empty
            history, where DIN leaves it out; and as the parts overlap in time, a replay against a service, whose
            store holds the clicks before the test part, does not give the offline scores.
    time    all purchases in order of time, 80/10/10.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import polars as pl

from models.features.field import FieldSpec, Part
from models.features.schema import SchemaSpec
from training.datasets import delimited, text_lines
from training.datasets.delimited import Form
from training.datasets.negatives import Sampling, with_negatives
from training.errors import UserError
from training.log import Log, split_by_time

Protocol = Literal["last", "time"]
DAY_S = 86_400
LATEST_S = 1e11  # the year 5138: anything above is milliseconds
NUMBER = Form(r"[0-9]{1,18}", "a number")
QUOTED = r"""(?:'(?P<single>(?:[^'\\]|\\.)*)'|"(?P<double>(?:[^"\\]|\\.)*)")"""


@dataclass(frozen=True, kw_only=True)
class AmazonOptions:
    protocol: Protocol = "last"
    negatives: int = 1
    sampling: Sampling = "uniform"
    history_length: int = 30
    seed: int = 2026

    def __post_init__(self) -> None:
        for name, choice, known in (("protocol", self.protocol, Protocol), ("sampling", self.sampling, Sampling)):
            if choice not in get_args(known):
                raise UserError(f"{name} is one of {', '.join(get_args(known))}, got {choice}")
        for name, number in (("negatives", self.negatives), ("history_length", self.history_length)):
            if not 1 <= number <= 100:
                raise UserError(f"{name} is a number from 1 to 100, got {number}")
        if self.seed < 0:
            raise UserError(f"seed is a whole number from 0 on, got {self.seed}")


def load(source: Path, options: AmazonOptions = AmazonOptions()) -> Log:
    """Purchases and drawn negatives with the items' categories, split."""
    bought, categories, files = _read(source)
    bought = bought.sort("ts", maintain_order=True)
    part = _by_user() if options.protocol == "last" else split_by_time(bought["ts"].to_numpy(), valid=0.1, test=0.1)
    rows = with_negatives(
        bought.with_columns(part),
        bought.select("user", "item"),
        each=options.negatives,
        seed=options.seed,
        sampling=options.sampling,
    )
    notes = []
    if categories is not None:
        rows = rows.join(categories, on="item", how="left", maintain_order="left")
        without = rows.filter(pl.col("category").is_null())["item"].n_unique()
        notes = [f"{without:,} items have no category in {files[1].name}"] if without else []
    return Log(
        name="amazon",
        source=source,
        spec=_spec(options, with_category=categories is not None, with_hour=(bought["ts"] % DAY_S != 0).any()),
        rows=rows.lazy(),
        files=files,
        notes=tuple(notes),
    )


def _spec(options: AmazonOptions, *, with_category: bool, with_hour: bool) -> SchemaSpec:
    clock: tuple[Part, ...] = ("hour", "weekday", "month") if with_hour else ("weekday", "month")
    item = ("item_id", "category") if with_category else ("item_id",)
    return SchemaSpec(
        user_key="user_id",
        item_key="item_id",
        history_length=options.history_length,
        fields=(
            FieldSpec(name="user_id", kind="categorical", group="user"),
            *(FieldSpec(name=part, kind="time", group="context", part=part) for part in clock),
            *(FieldSpec(name=name, kind="categorical", group="item") for name in item),
            *(FieldSpec(name=name, kind="sequence", group="behaviour", of=name) for name in item),
        ),
    )


def _by_user() -> pl.Expr:
    """The part of each purchase, which stand in time order, by its place from its user's last one."""
    left, total = pl.int_range(pl.len()).reverse().over("user"), pl.len().over("user")
    late = pl.when(left == 0).then(pl.lit("test")).when(left == 1).then(pl.lit("valid"))
    return pl.when(total < 3).then(pl.lit("train")).otherwise(late.otherwise(pl.lit("train"))).alias("part")


def _read(source: Path) -> tuple[pl.DataFrame, pl.DataFrame | None, tuple[Path, ...]]:
    """The purchases (user, item, ts) as they stand, the items' categories where there are any, and the files read."""
    reviews, metas = _one(source, "reviews_*.json"), _one(source, "meta_*.json")
    if reviews is not None:
        categories = None if metas is None else _categories(metas)
        return _reviews(reviews), categories, (reviews,) if metas is None else (reviews, metas)
    csv, meta, parquet = (source / name for name in ("train.csv", "item_meta.csv", "interactions.parquet"))
    if csv.exists():
        rows = delimited.read(csv, dict.fromkeys(("user_id", "item_id", "time"), NUMBER), separator="\t")
        bought = _in_seconds(
            rows.select(user="user_id", item="item_id", ts=pl.col("time").cast(pl.Float64)).collect(), csv
        )
        if not meta.exists():
            return bought, None, (csv,)
        items = delimited.read(meta, dict.fromkeys(("item_id", "i_category"), NUMBER), separator="\t")
        return bought, _once(items.select(item="item_id", category="i_category").collect(), meta), (csv, meta)
    if parquet.exists():
        return _in_seconds(_parquet(parquet), parquet), None, (parquet,)
    raise UserError(
        f"{source}: expected a folder with reviews_*.json (or .json.gz), train.csv or interactions.parquet in it"
    )


def _one(source: Path, pattern: str) -> Path | None:
    found = sorted([*source.glob(pattern), *source.glob(f"{pattern}.gz")])
    if len(found) > 1:
        raise UserError(f"{source}: expected one file {pattern}, found {', '.join(file.name for file in found)}")
    return found[0] if found else None


def _reviews(file: Path) -> pl.DataFrame:
    keys = {"user": "reviewerID", "item": "asin", "ts": "unixReviewTime"}
    rows = text_lines.scan(file).with_columns(
        **{name: pl.col("line").str.json_path_match(f"$.{key}") for name, key in keys.items()}
    )
    fine = (pl.col("user") != "") & (pl.col("item") != "") & pl.col("ts").str.contains(r"^[0-9]{1,18}$")
    text_lines.check(file, rows, fine.fill_null(value=False), f"a JSON object with {', '.join(keys.values())}")
    bought = rows.select("user", "item", pl.col("ts").cast(pl.Float64))
    return _in_seconds(bought.collect(engine="streaming"), file)


def _categories(file: Path) -> pl.DataFrame:
    """The last category of each item. The 2014 files spell objects as Python does, which no JSON reader takes."""
    text = pl.col("line")
    last = text.str.extract(r"""['"]categories['"]: *(\[\[.*?\]\])""").str.extract_groups(QUOTED + r"\]\]$")
    rows = text_lines.scan(file).with_columns(item=text.str.extract(r"""['"]asin['"]: *['"](\w+)['"]"""), last=last)
    fine = pl.col("item").is_not_null() & text.str.contains(r"^\{.*\}\s*$")
    text_lines.check(file, rows, fine, "an object {...} with asin and categories")
    category = pl.coalesce(pl.col("last").struct.unnest()).str.replace_all(r"\\(.)", "$1")
    return _once(rows.select("item", category=category).collect(engine="streaming"), file)


def _parquet(file: Path) -> pl.DataFrame:
    try:
        bought = pl.read_parquet(file, columns=["user", "item", "timestamp"])
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as err:
        raise UserError(
            f"{file}: expected a Parquet file with user, item and timestamp ({str(err).splitlines()[0]})"
        ) from err
    strange = [c for c in bought.columns if bought[c].has_nulls() or not (bought[c].dtype.is_integer())]
    if strange:
        raise UserError(f"{file}, column {strange[0]}: expected a whole number in every row")
    ids = pl.col("user", "item").cast(pl.String)
    return bought.select(ids, pl.col("timestamp").cast(pl.Float64).alias("ts"))


def _in_seconds(bought: pl.DataFrame, file: Path) -> pl.DataFrame:
    late = bought.filter(pl.col("ts").abs() > LATEST_S)
    if not late.is_empty():
        raise UserError(f"{file}: expected times in Unix seconds, got {late['ts'][0]:.0f}")
    return bought


def _once(categories: pl.DataFrame, file: Path) -> pl.DataFrame:
    twice = categories["item"].is_duplicated()
    if twice.any():
        raise UserError(f"{file}: holds item {categories['item'].filter(twice)[0]} more than once")
    return categories
