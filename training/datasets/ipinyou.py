"""iPinYou real-time bidding (2013), as make-ipinyou-data writes it: impressions with clicks, by days or at random.

Two forms, told apart by what is in the folder:

    train.log.txt, test.log.txt                    TAB, with a header: one folder per advertiser, or `all`
    train.fm.txt, test.fm.txt, featindex.fm.txt    `label id:1 ...`, one id for each of 16 fields; `name:value<TAB>id`

By days, the test part is the official one and validation the end of the training rows. DynInt's paper mixes the days,
splits at random 70/10/20 and drops levels seen less than 20 times: `split=random min_count=20`. The two splits' figures
are not comparable: at random, rows of the same days and users stand on both sides. The random part of a row depends on
its number alone, the test rows counted on from the training rows, and so is the same for both forms.

The 16 fields are DynInt's: weekday and hour stand in the file (Beijing time) and are context like the other words of a
bid request; user agent, IP, region and city are the user's; creative and advertiser the ad's. Two are made coarse
before they are a word, by the rules of make-ipinyou-data, and a request has to bring them so: the user agent as
`system_browser`, the slot's floor price as one of 0, 1-10, 11-50, 51-100, 101+. The libfm form has no clock: a row's
number stands in for its time.

    split      days, or random
    min_count  rarer levels are unknown: 100 as the code of xDeepInt has it on iPinYou, 20 in DynInt's paper
    valid      the validation part's share: of the training days' rows, or of all rows where the split is random
    seed       of the random split
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

from models.features.field import FieldSpec, Group
from models.features.schema import SchemaSpec
from training.datasets import delimited, text_lines
from training.datasets.delimited import LABEL, Form
from training.errors import UserError
from training.log import Log, split_by_number

FIELDS: dict[str, Group] = {
    "weekday": "context", "hour": "context", "useragent": "user", "IP": "user", "region": "user", "city": "user",
    "adexchange": "context", "domain": "context", "slotid": "context", "slotwidth": "context", "slotheight": "context",
    "slotvisibility": "context", "slotformat": "context", "creative": "item", "advertiser": "item",
    "slotprice": "context",
}  # fmt: skip
SYSTEMS = ("windows", "ios", "mac", "android", "linux")
BROWSERS = ("chrome", "sogou", "maxthon", "safari", "firefox", "theworld", "opera", "ie")
PRICES = ((100, "101+"), (50, "51-100"), (10, "11-50"), (0, "1-10"))
MINUTES = r"20[0-9][0-9](?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])(?:[01][0-9]|2[0-3])[0-5][0-9][0-5][0-9]"
FORMS = {
    "click": LABEL,
    "timestamp": Form(MINUTES + r"[0-9]{3}", "a time as yyyyMMddHHmmss and milliseconds"),
    **{name: Form("[^\t]*", "a word") for name in FIELDS},
    "slotprice": Form(r"[0-9]{1,9}", "a whole number"),
}
RANDOM_TEST = 0.2  # the share of the test part where the split is random
BEIJING_S = 8 * 3600  # ahead of UTC, and without summer time


@dataclass(frozen=True, kw_only=True)
class IpinyouOptions:
    split: Literal["days", "random"] = "days"
    min_count: int = 100
    valid: float = 0.1
    seed: int = 2026

    def __post_init__(self) -> None:
        most = 1 - RANDOM_TEST if self.split == "random" else 1
        if not 1 <= self.min_count <= 10**9 or not 0 <= self.seed < 2**32 or not 0 < self.valid < most:
            raise UserError(
                f"min_count is from 1 to 10^9, seed from 0 to 2^32 - 1 and valid between 0 and {most:g},"
                f" got {self.min_count}, {self.seed} and {self.valid}"
            )


def load(source: Path, options: IpinyouOptions = IpinyouOptions()) -> Log:
    """The folder of one campaign, in either form."""
    form = "log" if (source / "train.log.txt").is_file() else "fm"
    paths = {part: source / f"{part}.{form}.txt" for part in ("train", "test")}
    files = tuple(paths.values())
    if form == "log":
        train, test = (_log(path) for path in files)
    else:
        index = source / "featindex.fm.txt"
        if not paths["train"].is_file():
            raise UserError(f"{source}: expected train.log.txt and test.log.txt, or train.fm.txt, found neither")
        words = _words(index)
        train, test = (_libfm(path, words) for path in files)
        files = (*files, index)
    if form == "fm" or options.split == "random":
        num_train = train.select(pl.len()).collect(engine="streaming").item()
        test = test.with_columns(pl.col("row") + num_train)
    if form == "fm":
        train, test = (rows.with_columns(ts=pl.col("row").cast(pl.Float64)) for rows in (train, test))
    if options.split == "random":
        part = split_by_number(pl.col("row"), seed=options.seed, valid=options.valid, test=RANDOM_TEST)
        train, test = train.with_columns(part), test.with_columns(part)
    else:
        is_valid = pl.col("ts") >= _cut(train, options.valid)
        train = train.with_columns(part=pl.when(is_valid).then(pl.lit("valid")).otherwise(pl.lit("train")))
        test = test.with_columns(part=pl.lit("test"))
    rows = pl.concat([train, test]).select(
        "ts", "label", *FIELDS, "part", *(pl.lit(None, dtype=pl.String).alias(key) for key in ("user", "item"))
    )
    fields = [
        FieldSpec(name=name, kind="categorical", group=group, min_count=options.min_count)
        for name, group in FIELDS.items()
    ]
    return Log(name="ipinyou", source=source, spec=SchemaSpec(fields=tuple(fields)), rows=rows, files=files)


def _cut(train: pl.LazyFrame, valid: float) -> float:
    ts = train.select("ts").collect(engine="streaming")["ts"].sort()
    return float(ts[min(round(len(ts) * (1 - valid)), len(ts) - 1)])


def _log(file: Path) -> pl.LazyFrame:
    moment = pl.col("timestamp").str.slice(0, 14).str.to_datetime("%Y%m%d%H%M%S", strict=False)
    time = moment.dt.epoch("s") - BEIJING_S
    rows = delimited.read(file, FORMS, separator="\t")
    delimited.check_times(file, rows, "timestamp", moment)
    return rows.select(
        pl.col("row").cast(pl.Int64),
        (time + pl.col("timestamp").str.slice(14).cast(pl.Float64) / 1000).alias("ts"),
        pl.col("click").cast(pl.Int8).alias("label"),
        *(pl.col(name) for name in FIELDS if name not in ("useragent", "slotprice")),
        pl.concat_str(_first_of(SYSTEMS), _first_of(BROWSERS), separator="_").alias("useragent"),
        _price().alias("slotprice"),
    ).select("row", "ts", "label", *FIELDS)


def _first_of(words: tuple[str, ...]) -> pl.Expr:
    agent = pl.col("useragent").fill_null("").str.to_lowercase()
    found = pl.lit("other")
    for word in reversed(words):
        found = pl.when(agent.str.contains(word, literal=True)).then(pl.lit(word)).otherwise(found)
    return found


def _price() -> pl.Expr:
    found = pl.lit("0")
    for above, word in reversed(PRICES):
        found = pl.when(pl.col("slotprice").cast(pl.Int64) > above).then(pl.lit(word)).otherwise(found)
    return found


def _libfm(file: Path, words: dict[str, dict[str, str]]) -> pl.LazyFrame:
    rows = text_lines.scan(file)
    cells = pl.col("line").str.strip_chars_end().str.split(" ")
    text_lines.check(file, rows, pl.col("line").str.contains(r"^[01](?: [0-9]+:1)" + f"{{{len(FIELDS)}}}" + r"\s*$"),
                f"0 or 1 and {len(FIELDS)} times id:1")  # fmt: skip
    named = rows.with_columns(
        cells.list.get(number + 1)
        .str.strip_suffix(":1")
        .replace_strict(list(words[name]), list(words[name].values()), default=None)
        .alias(name)
        for number, name in enumerate(FIELDS)
    )
    known = pl.all_horizontal(pl.col(name).is_not_null() for name in FIELDS)
    text_lines.check(file, named, known, f"ids of {', '.join(FIELDS)}, in this order, as featindex.fm.txt has them")
    label = pl.col("line").str.slice(0, 1).cast(pl.Int8).alias("label")
    return named.select(pl.col("row").cast(pl.Int64) - 1, label, *FIELDS)


def _words(file: Path) -> dict[str, dict[str, str]]:
    """Each field's values by their id, as text."""
    rows = text_lines.scan(file)
    form = r"^([A-Za-z]+):(.*)\t([0-9]+)\s*$"
    text_lines.check(file, rows, pl.col("line").str.contains(form), "field:value, a TAB and an id")
    words: dict[str, dict[str, str]] = {name: {} for name in FIELDS}
    for name, value, number in rows.select(pl.col("line").str.extract_groups(form)).unnest("line").collect().rows():
        words.get(name, {})[number] = value
    absent = [name for name, values in words.items() if not values]
    if absent:
        raise UserError(f"{file}: expected values of {', '.join(FIELDS)}, got none of {', '.join(absent)}")
    return words
