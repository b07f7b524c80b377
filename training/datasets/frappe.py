"""Frappe app usage in the 7:2:1 split of the STEC, AFN and BARS papers: one `±1 id:1 ...` line per row, ten ids each.

There is no clock and no history; a row's number stands in for its time, so that every row is a request of its own.

`cost` stands in the context. It looks like the app's own (each app has one in the usage log), but the negatives were
made by pairing a logged context, cost included, with another app: in 8 % of the validation and test rows it is not the
app's cost, and every one of these is a negative. A model that learns each app's cost reads that off, here as in the
published results.

With `feature_vocab.csv` beside the split, ids become the words they stand for, and a request can be written by hand.
"""

import hashlib
from pathlib import Path

import polars as pl

from models.features.field import FieldSpec, Group
from models.features.schema import SchemaSpec
from training.datasets.checked_table import Reading, Table, Use
from training.errors import UserError
from training.log import Log

FIELDS: dict[str, Group] = {
    "user": "user", "item": "item", "daytime": "context", "weekday": "context", "isweekend": "context",
    "homework": "context", "cost": "context", "weather": "context", "country": "context", "city": "context",
}  # fmt: skip
# The published validation and test files; the original train file is lost, and this is the rebuilt one.
FILES = {
    "train": ("frappe.train.libfm", "2d862b237f66991068ed52e046f8b16b"),
    "valid": ("frappe.validation.libfm", "4b8d8e462c470ff16a580bcaa9598613"),
    "test": ("frappe.test.libfm", "56ef29ef57467174fdff4ba1a117daeb"),
}
SPEC = SchemaSpec(
    user_key="user",
    item_key="item",
    history_length=0,
    fields=tuple(FieldSpec(name=name, kind="categorical", group=group) for name, group in FIELDS.items()),
)


def load(source: Path) -> Log:
    """The three files as they are split; a file of another MD5 is used all the same, with a note in dataset.json."""
    folder = source / "nfm" if (source / "nfm").is_dir() else source
    paths = {part: folder / name for part, (name, _) in FILES.items()}
    rows = pl.concat([_read(path).with_columns(part=pl.lit(part)) for part, path in paths.items()])
    used = list(paths.values())
    vocabulary = next(
        (f for f in (folder / "feature_vocab.csv", folder.parent / "feature_vocab.csv") if f.exists()), None
    )
    if vocabulary is not None:
        rows = _decode(rows, vocabulary)
        used.append(vocabulary)
    return Log(
        name="frappe",
        source=source,
        spec=SPEC,
        rows=rows.with_columns(pl.int_range(pl.len()).cast(pl.Float64).alias("ts")).lazy(),
        files=tuple(used),
        notes=tuple(note for part, path in paths.items() for note in _strangeness(path, FILES[part][1])),
    )


def _read(path: Path) -> pl.DataFrame:
    if not path.exists():
        raise UserError(f"{path}: no such file; expected {', '.join(name for name, _ in FILES.values())} in one folder")
    lines = pl.Series("line", path.read_text("ascii", errors="replace").splitlines(), dtype=pl.String)
    form = r"^([+-]?1)" + r" ([0-9]+):1" * len(FIELDS) + r"\s*$"
    values = lines.str.extract_groups(form).struct.rename_fields(["label", *FIELDS]).struct.unnest()
    broken = values["label"].is_null()
    if broken.any() or not len(lines):
        row = int(broken.arg_max() or 0)
        got = repr(lines[row]) if len(lines) else "an empty file"
        raise UserError(f"{path}, line {row + 1}: expected 1 or -1 and {len(FIELDS)} times id:1, got {got:.120}")
    return values.with_columns((~pl.col("label").str.starts_with("-")).cast(pl.Int8))


def _decode(rows: pl.DataFrame, path: Path) -> pl.DataFrame:
    table = Table(path, Reading(null_values=("",)))
    uses = {name: Use(column=name, role="text", is_as_written=True) for name in ("feature_id", "field", "raw_value")}
    vocabulary = table.columns(uses).collect()
    for field in FIELDS:
        words = vocabulary.filter(pl.col("field") == field)
        named = rows[field].replace_strict(words["feature_id"], words["raw_value"], default=None)
        if named.has_nulls():
            raise UserError(f"{path}: names no {field} {rows[field].filter(named.is_null())[0]}, which the split holds")
        rows = rows.with_columns(named.alias(field))
    return rows


def _strangeness(path: Path, expected: str) -> list[str]:
    found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    return [] if found == expected else [f"{path.name}: MD5 {found} is not the known {expected}"]
