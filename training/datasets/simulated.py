"""The log that `training.simulator.simulate` wrote."""

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from models.features.field import FieldSpec
from models.features.schema import SchemaSpec
from training.errors import UserError
from training.log import Log, check_ids, split_by_time

SPEC = SchemaSpec(
    user_key="user_id",
    item_key="ad_id",
    history_length=20,
    fields=(
        FieldSpec(name="user_id", kind="categorical", group="user", min_count=20),
        FieldSpec(name="gender", kind="categorical", group="user"),
        FieldSpec(name="age", kind="categorical", group="user"),
        FieldSpec(name="country", kind="categorical", group="user"),
        FieldSpec(name="interest", kind="categorical", group="user"),
        FieldSpec(name="hour", kind="time", group="context", part="hour"),
        FieldSpec(name="weekday", kind="time", group="context", part="weekday"),
        FieldSpec(name="device", kind="categorical", group="context"),
        FieldSpec(name="ad_id", kind="categorical", group="item", min_count=5),
        FieldSpec(name="category", kind="categorical", group="item"),
        FieldSpec(name="advertiser", kind="categorical", group="item"),
        FieldSpec(name="price", kind="numeric", group="item"),
        FieldSpec(name="tags", kind="multi", group="item"),
        FieldSpec(name="ad_id", kind="sequence", group="behaviour", of="ad_id"),
        FieldSpec(name="category", kind="sequence", group="behaviour", of="category"),
        FieldSpec(name="tags", kind="sequence", group="behaviour", of="tags"),
    ),
)
TRUTH = ("true_ctr", "true_ctr_top", "true_ctr_blind")
COLUMNS: Mapping[str, Mapping[str, type[pl.DataType] | pl.DataType]] = {
    "impressions": {
        **dict.fromkeys(("user", "ad", "device"), pl.String),
        "ts": pl.Float64,
        "click": pl.Int8,
        **dict.fromkeys(TRUTH, pl.Float64),
    },
    "users": dict.fromkeys(("id", "gender", "age", "country", "interest"), pl.String),
    "ads": {
        **dict.fromkeys(("id", "category", "advertiser"), pl.String),
        "price": pl.Float64,
        "tags": pl.List(pl.String),
    },
}
GIVEN = ("user", "ad", "id", "ts", "click", *TRUTH)


def load(source: Path) -> Log:
    """Rows, split by global time 80/10/10. `position` stays out: it is not known when a request is scored."""
    files = {name: source / f"{name}.parquet" for name in COLUMNS}
    impressions, users, ads = (_read(files[name], columns) for name, columns in COLUMNS.items())
    if not (source / "simulation.json").is_file():  # it is written last
        raise UserError(f"{source}: expected a whole log, simulation.json is missing; simulate it again")
    if not (impressions["ts"].is_finite().all() and impressions["click"].is_in([0, 1]).all()):
        raise UserError(f"{files['impressions']}: expected a finite ts and a click of 0 or 1 in every row")
    check_ids("user", impressions["user"], files["impressions"], users["id"], files["users"])
    check_ids("ad", impressions["ad"], files["impressions"], ads["id"], files["ads"])
    rows = (
        impressions.sort("ts", maintain_order=True)
        .join(users, left_on="user", right_on="id", how="left", maintain_order="left")
        .join(ads, left_on="ad", right_on="id", how="left", maintain_order="left")
        .rename({"ad": "item", "click": "label"})
    )
    part = split_by_time(rows["ts"].to_numpy(), valid=0.1, test=0.1)
    return Log(
        name="simulated",
        source=source,
        spec=SPEC,
        rows=rows.with_columns(part).lazy(),
        files=tuple(files.values()),
        truth=TRUTH,
    )


def _read(file: Path, columns: Mapping[str, type[pl.DataType] | pl.DataType]) -> pl.DataFrame:
    if not file.is_file():
        raise UserError(f"{file}: no such file; `python -m training simulate --out {file.parent}` writes it")
    try:
        table = pl.read_parquet(file, columns=list(columns))
    except pl.exceptions.ColumnNotFoundError as err:
        raise UserError(f"{file}: expected the columns {', '.join(columns)} of a simulated log") from err
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as err:
        raise UserError(f"{file}: not a Parquet file that can be read ({err})") from err
    for name, dtype in columns.items():
        if table[name].dtype != dtype or (name in GIVEN and table[name].has_nulls()):
            raise UserError(
                f"{file}, column {name}: expected {pl.Series(dtype=dtype).dtype} in every row of a simulated log"
            )
    if table.is_empty():
        raise UserError(f"{file}: expected rows, the file holds none")
    return table
