"""MovieLens tags in the 7:2:1 split of the STEC, AFN and BARS papers: would this user give this movie this tag?

Either form is read: `train.csv`, `valid.csv`, `test.csv` with the header `label,user_id,item_id,tag_id` (BARS calls it
MovielensLatest_x1), or `ml-tag.{train,validation,test}.libfm` (also `ml.`) with a line `1 id:1 id:1 id:1` or `-1 ...`
per row. Ids are numbers without words. Each positive was paired with two tags that the user has not given the movie, so
the tag is the candidate and the movie, `item_id`, belongs to the context.

There is no clock and no history; a row's number stands in for its time, so that every row is a request of its own.
"""

from pathlib import Path

import polars as pl

from models.features.field import FieldSpec
from models.features.schema import SchemaSpec
from training.datasets import delimited
from training.datasets.delimited import LABEL, Form
from training.errors import UserError
from training.log import PARTS, Log

SPEC = SchemaSpec(
    user_key="user_id",
    item_key="tag_id",
    history_length=0,
    fields=(
        FieldSpec(name="user_id", kind="categorical", group="user"),
        FieldSpec(name="item_id", kind="categorical", group="context"),
        FieldSpec(name="tag_id", kind="categorical", group="item"),
    ),
)
NUM_ROWS = {"train": 1_404_801, "valid": 401_373, "test": 200_686}
FORMS = (
    ("train.csv", "valid.csv", "test.csv"),
    ("ml-tag.train.libfm", "ml-tag.validation.libfm", "ml-tag.test.libfm"),
    ("ml.train.libfm", "ml.validation.libfm", "ml.test.libfm"),
)
IDS = ("user_id", "item_id", "tag_id")


def load(source: Path) -> Log:
    """The three files as they are split; another number of rows than the published one is noted in dataset.json."""
    names = next((form for form in FORMS if (source / form[0]).exists()), None)
    if names is None:
        known = " or ".join(form[0] for form in FORMS)
        raise UserError(f"{source}: expected a folder with {known} in it, and the other two parts beside")
    files = tuple(source / name for name in names)
    parts = [_read(file).with_columns(part=pl.lit(part)) for part, file in zip(PARTS, files, strict=True)]
    counts = [part.select(pl.len()).collect(engine="streaming").item() for part in parts]
    rows = (
        pl.concat(parts)
        .with_row_index("ts")
        .select(
            pl.col("ts").cast(pl.Float64),
            (pl.col("label") == "1").cast(pl.Int8).alias("label"),
            pl.col("user_id").alias("user"),
            pl.col("tag_id").alias("item"),
            "item_id",
            "part",
        )
    )
    notes = tuple(
        f"{file.name}: {count:,} rows, where the published split has {NUM_ROWS[part]:,}"
        for part, file, count in zip(PARTS, files, counts, strict=True)
        if count != NUM_ROWS[part]
    )
    return Log(name="movielens-tag", source=source, spec=SPEC, rows=rows, files=files, notes=notes)


def _read(file: Path) -> pl.LazyFrame:
    if file.suffix == ".csv":
        forms = {"label": LABEL, **dict.fromkeys(IDS, Form(r"[0-9]+", "a number"))}
        return delimited.read(file, forms, separator=",")
    forms = {"label": Form("[+-]?1", "1 or -1"), **dict.fromkeys(IDS, Form(r"[0-9]+:1", "id:1"))}
    rows = delimited.read(file, forms, separator=" ", names=("label", *IDS))
    return rows.with_columns(pl.col("label").replace({"-1": "0", "+1": "1"}), pl.col(*IDS).str.strip_suffix(":1"))
