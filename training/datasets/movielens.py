"""MovieLens-1M: a rating of 4 or 5 is a click, and the user's earlier clicks are the history.

Files `ratings.dat`, `users.dat`, `movies.dat`, fields parted by `::`, movies in latin-1. The split is by global time,
80/10/10 of the rows. 77 % of the rows share their second with another row of the same user; the history rule (strictly
earlier) is what keeps the rest of that second out.
"""

from pathlib import Path

import polars as pl

from models.features.field import FieldSpec
from models.features.schema import SchemaSpec
from training.errors import UserError
from training.log import Log, check_ids, split_by_time

CLICK_FROM = 4  # stars

SPEC = SchemaSpec(
    user_key="user_id",
    item_key="movie_id",
    history_length=30,
    fields=(
        FieldSpec(name="user_id", kind="categorical", group="user"),
        FieldSpec(name="gender", kind="categorical", group="user"),
        FieldSpec(name="age", kind="categorical", group="user"),
        FieldSpec(name="occupation", kind="categorical", group="user"),
        # The whole code is nearly a second user id (3439 for 6040 users); its first three digits are a region.
        FieldSpec(name="zip", kind="categorical", group="user"),
        FieldSpec(name="hour", kind="time", group="context", part="hour"),
        FieldSpec(name="weekday", kind="time", group="context", part="weekday"),
        FieldSpec(name="movie_id", kind="categorical", group="item"),
        FieldSpec(name="genres", kind="multi", group="item"),
        # Exact, as 81 years over a million rows leave enough of each; a decade would hide what is new in 2000.
        FieldSpec(name="year", kind="categorical", group="item"),
        FieldSpec(name="movie_id", kind="sequence", group="behaviour", of="movie_id"),
        FieldSpec(name="genres", kind="sequence", group="behaviour", of="genres"),
    ),
)


def load(source: Path) -> Log:
    """All ratings with the user's profile and the movie's genres and year."""
    files = tuple(source / name for name in ("ratings.dat", "users.dat", "movies.dat"))
    ratings = _read(files[0], ("user", "item", "rating", "ts"), numbers=("rating", "ts"))
    users = _read(files[1], ("user", "gender", "age", "occupation", "zip"))
    movies = _read(files[2], ("item", "title", "genres"))
    check_ids("user", ratings["user"], files[0], users["user"], files[1])
    check_ids("item", ratings["item"], files[0], movies["item"], files[2])
    rows = (
        ratings.sort("ts", maintain_order=True)
        .with_columns((pl.col("rating") >= CLICK_FROM).cast(pl.Int8).alias("label"), pl.col("ts").cast(pl.Float64))
        .join(users.with_columns(pl.col("zip").str.slice(0, 3)), on="user", how="left", maintain_order="left")
        .join(
            movies.select(
                "item", pl.col("genres").str.split("|"), year=pl.col("title").str.extract(r"\(([0-9]{4})\)\s*$")
            ),
            on="item",
            how="left",
            maintain_order="left",
        )
        .drop("rating")
    )
    part = split_by_time(rows["ts"].to_numpy(), valid=0.1, test=0.1)
    return Log(name="movielens-1m", source=source, spec=SPEC, rows=rows.with_columns(part).lazy(), files=files)


def _read(file: Path, names: tuple[str, ...], numbers: tuple[str, ...] = ()) -> pl.DataFrame:
    if not file.exists():
        raise UserError(f"{file}: no such file; expected the folder of MovieLens-1M with ratings, users and movies")
    # The whole text at once: polars takes one byte as a separator, and titles hold single colons.
    lines = pl.Series("line", file.read_bytes().decode("latin-1").splitlines(), dtype=pl.String)
    forms = ("([0-9]{1,11})" if name in numbers else "(.+?)" if name == names[0] else "(.*?)" for name in names)
    form = f"^{'::'.join(forms)}$"
    values = lines.str.extract_groups(form).struct.rename_fields(list(names)).struct.unnest()
    broken = values[names[-1]].is_null() | (lines.str.count_matches("::", literal=True) != len(names) - 1)
    if broken.any() or not len(lines):
        row = int(broken.arg_max() or 0)
        got = repr(lines[row]) if len(lines) else "an empty file"
        raise UserError(f"{file}, line {row + 1}: expected {'::'.join(names)}, got {got:.80}")
    return values.with_columns(pl.col(*numbers).cast(pl.Int64)) if numbers else values
