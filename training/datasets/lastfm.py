"""Last.fm (HetRec 2011): would this user tag this artist, today? As the DeepMR paper and its code take it.

Files as they come, TAB between columns and a header: `user_taggedartists.dat` with the tag assignments, all of them
positives (without it `user_taggedartists-timestamps.dat`, whose milliseconds are midnights of Madrid, where the data
were made), and `user_artists.dat` with what each user listens to. For each positive two artists are drawn that the user
has neither tagged nor listened to; they keep its date, and its tag. All rows are then split 8:1:1 at random.

The fields are those of DeepMR's code: user, artist, and day, month and year as three ids. Its paper names the tag too:
`tag=true` adds it to the context. A user tags an artist with several tags, mostly on one day, so that without the tag
most positives stand in the log more than once, in training and test alike: dataset.json says how many.
"""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from models.features.field import FieldSpec
from models.features.schema import SchemaSpec
from training.datasets import delimited, text_lines
from training.datasets.delimited import Form
from training.datasets.negatives import with_negatives
from training.errors import UserError
from training.log import Log, split_by_number

TAGGED = "user_taggedartists.dat"
STAMPED = "user_taggedartists-timestamps.dat"
LISTENED = "user_artists.dat"
NUMBER = Form(r"[0-9]{1,9}", "a number")
TRIPLE = dict.fromkeys(("userID", "artistID", "tagID"), NUMBER)
NUM_POSITIVES = 186_479
DATE = ("day", "month", "year")


@dataclass(frozen=True, kw_only=True)
class LastfmOptions:
    tag: bool = False
    negatives: int = 2
    seed: int = 2026  # of the negatives and of the split

    def __post_init__(self) -> None:
        if not 1 <= self.negatives <= 100:
            raise UserError(f"negatives is a number per positive from 1 to 100, got {self.negatives}")
        if self.seed < 0:
            raise UserError(f"seed is a whole number from 0 on, got {self.seed}")


def load(source: Path, options: LastfmOptions = LastfmOptions()) -> Log:
    """Positives and drawn negatives, with the date as `ts` (midnight UTC)."""
    only_stamped = (source / STAMPED).exists() and not (source / TAGGED).exists()
    dated, listened = source / (STAMPED if only_stamped else TAGGED), source / LISTENED
    positives = _tagged(dated)
    known = pl.concat([positives.select("user", "item"), _listened(listened)])
    rows = with_negatives(positives, known, each=options.negatives, seed=options.seed)
    part = split_by_number(pl.int_range(pl.len()), seed=options.seed, valid=0.1, test=0.1)
    rows = rows.with_columns(part)
    notes = [_repeats(rows)]
    if positives.height != NUM_POSITIVES:
        notes.append(f"{dated.name}: {positives.height:,} tag assignments, where the published data have 186,479")
    return Log(
        name="lastfm",
        source=source,
        spec=_spec(options),
        rows=rows.drop([] if options.tag else ["tag"]).lazy(),
        files=(dated, listened),
        notes=tuple(notes),
    )


def _spec(options: LastfmOptions) -> SchemaSpec:
    context = (*DATE, *(("tag",) if options.tag else ()))
    return SchemaSpec(
        user_key="user_id",
        item_key="artist_id",
        history_length=0,
        fields=(
            FieldSpec(name="user_id", kind="categorical", group="user"),
            *(FieldSpec(name=name, kind="categorical", group="context") for name in context),
            FieldSpec(name="artist_id", kind="categorical", group="item"),
        ),
    )


def _tagged(file: Path) -> pl.DataFrame:
    if file.name == TAGGED:
        rows = delimited.read(file, {**TRIPLE, **dict.fromkeys(DATE, NUMBER)}, separator="\t")
        day = pl.concat_str(*DATE, separator="/")
        date = day.str.to_date("%d/%m/%Y", strict=False)
        text_lines.check(
            file, rows.with_columns(pl.col("row") + 2, line=day), date.is_not_null(), "a day/month/year that there is"
        )
    else:
        stamp = Form(r"-?[0-9]{1,14}", "milliseconds")
        rows = delimited.read(file, {**TRIPLE, "timestamp": stamp}, separator="\t")
        moment = pl.from_epoch(pl.col("timestamp").cast(pl.Int64), time_unit="ms").dt.replace_time_zone("UTC")
        date = moment.dt.convert_time_zone("Europe/Madrid").dt.date()
    return (
        rows.select(user="userID", item="artistID", tag="tagID", date=date)
        .with_columns(
            ts=pl.col("date").dt.epoch("s").cast(pl.Float64),
            **{part: getattr(pl.col("date").dt, part)().cast(pl.String) for part in DATE},
        )
        .drop("date")
        .collect(engine="streaming")
    )


def _listened(file: Path) -> pl.DataFrame:
    rows = delimited.read(file, dict.fromkeys(("userID", "artistID", "weight"), NUMBER), separator="\t")
    return rows.select(user="userID", item="artistID").collect()


def _repeats(rows: pl.DataFrame) -> str:
    clicks = rows.filter(pl.col("label") == 1)
    test = clicks.filter(pl.col("part") == "test")
    seen = test.join(clicks.filter(pl.col("part") == "train"), on=["user", "item"], how="semi").height
    share = seen / max(test.height, 1)
    return f"{share:.1%} of the test positives repeat a (user, artist) pair that is positive in training"
