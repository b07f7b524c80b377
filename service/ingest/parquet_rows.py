"""Parquet rows: those of a file, a folder or a pattern, block by block, in the types that JSON has."""

from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

import polars as pl

from models.features.values import canonical
from service.errors import LoadError
from service.ids import MAX_ID_LENGTH
from service.store.codec import MAX_FEATURES_BYTES, pack_row

ROW = " row"  # the column that numbers the rows, for messages: no file's own column has this name


class ParquetRows:
    """The rows as they are read: a block is all of them that is ever in memory."""

    def __init__(self, path: Path) -> None:
        """Raises LoadError for what is no Parquet file, or holds what is no raw value."""
        self.path = path
        self.files = _files(path)
        with self.reading():
            scan = pl.scan_parquet(self.files or path, hive_partitioning=False, glob=False, row_index_name=ROW)
            schema = scan.collect_schema()
            id_columns = _spelled(scan, schema)
            self.scan = scan.with_columns(id_columns) if id_columns else scan
            """All rows, for questions about the whole."""
            self.num_rows = int(scan.select(pl.len()).collect(engine="streaming").item())
            self.schema = {name: dtype for name, dtype in self.scan.collect_schema().items() if name != ROW}
        if not self.schema:
            raise LoadError(f"{path}: no columns")
        for name, dtype in self.schema.items():
            inner = dtype.inner if isinstance(dtype, pl.List) else dtype
            is_time = name == "ts" and isinstance(dtype, pl.Datetime | pl.Date)
            is_value = inner.is_integer() or inner.is_float() or inner in (pl.String, pl.Boolean, pl.Null)
            if not (is_value or is_time):
                raise LoadError(
                    f"{path}: column {name}: expected strings, numbers, booleans or lists of them, got {dtype}"
                )

    def blocks(self, num_rows: int) -> Iterator[pl.DataFrame]:
        """All rows with their numbers, `num_rows` at a time."""
        # Slices, not polars' own batches: those read ahead, of a file in row groups of a million for 700 MB.
        for start in range(0, self.num_rows, num_rows):
            with self.reading():
                block = self.scan.slice(start, num_rows).collect(engine="streaming")
            yield block

    @contextmanager
    def reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as err:
            raise LoadError(f"{self.path}: not a readable Parquet file: {str(err).splitlines()[0]}") from err

    def ids(self, block: pl.DataFrame, column: str) -> pl.Series:
        """A column's ids as text. Raises LoadError for a row without one."""
        texts = _id_texts(block[column])
        is_wrong = texts.is_null() | (texts.str.len_bytes() == 0) | (texts.str.len_chars() > MAX_ID_LENGTH)
        for index in is_wrong.arg_true()[:1]:
            value, text = block[column][index], texts[index]
            value = value.to_list() if isinstance(value, pl.Series) else value
            found = repr(value)
            found = found if len(found) <= MAX_ID_LENGTH else f"{len(text or found)} characters"
            raise LoadError(
                f"{self.path}: row {block[ROW][index]}: column {column}: "
                f"expected an id of 1 to {MAX_ID_LENGTH} characters, got {found}"
            )
        return texts.rename(column)

    def check_features(self, block: pl.DataFrame, names: list[str]) -> None:
        """Raises LoadError for a row whose features cannot be stored."""
        if not names:
            return
        # Few rows are so large that only packing them tells.
        most_bytes = pl.sum_horizontal(_most_bytes(name, block.schema[name]) for name in names)
        for row in block.filter(most_bytes > MAX_FEATURES_BYTES).iter_rows(named=True):
            try:
                pack_row({name: row[name] for name in names})
            except ValueError as err:
                raise LoadError(f"{self.path}: row {row[ROW]}: {err}") from err


def _files(path: Path) -> list[Path]:
    """The file, those of the pattern, or those of the folder, but for what engines write beside: `_SUCCESS`, `.crc`."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        names = glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no pattern that begins at the root
        return sorted(found for name in names if (found := Path(name)).is_file())
    return sorted(
        p for p in path.rglob("*") if p.is_file() and not any(n[0] in "_." for n in p.relative_to(path).parts)
    )


def _spelled(scan: pl.LazyFrame, schema: pl.Schema) -> list[pl.Expr]:
    """The columns that are not yet in the types that JSON has, as training spells them."""
    decimals = {name: dtype for name, dtype in schema.items() if isinstance(dtype, pl.Decimal)}
    exprs = [pl.col(name).cast(pl.String) for name, dtype in schema.items() if dtype == pl.Categorical]
    # 0.1 is stored as 0.1, not as 0.10000000149011612.
    exprs += [
        pl.col(name).cast(pl.String).cast(pl.Float64)
        for name, dtype in schema.items()
        if dtype == pl.Float32 and name != "ts"
    ]
    if not decimals:
        return exprs
    facts = scan.select(
        pl.struct(
            (pl.col(name).cast(pl.Float64) == pl.col(name).cast(pl.Float64).round()).all().alias("whole"),
            (_digits(name).cast(pl.Int64, strict=False).null_count() == pl.col(name).null_count()).alias("short"),
        ).alias(name)
        for name in decimals
    )
    found = facts.collect(engine="streaming").row(0, named=True)
    for name, dtype in decimals.items():
        # What warehouses export whole numbers as. Beyond 64 bits only text holds them, which is the same id.
        if dtype.scale == 0 or found[name]["whole"]:
            exprs.append(_digits(name).cast(pl.Int64) if found[name]["short"] else _digits(name))
        else:
            exprs.append(pl.col(name).cast(pl.Float64))
    return exprs


def _digits(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.String).str.replace(r"\.0*$", "")


def _id_texts(column: pl.Series) -> pl.Series:
    """The one spelling of each value, as `canonical` has it; null where there is none."""
    dtype = column.dtype
    if dtype == pl.String or dtype.is_integer():
        return column.cast(pl.String)
    if dtype == pl.Boolean:
        return column.cast(pl.Int8).cast(pl.String)
    if dtype.is_float():
        distinct = column.drop_nulls().drop_nans().unique()
        texts = pl.Series([canonical(value) for value in distinct], dtype=pl.String)
        return column.replace_strict(distinct, texts, default=None, return_dtype=pl.String)
    return pl.Series([None] * len(column), dtype=pl.String)


def _most_bytes(name: str, dtype: pl.DataType) -> pl.Expr:
    """As many bytes as a feature may take, with its name."""
    column, inner = pl.col(name), dtype.inner if isinstance(dtype, pl.List) else dtype
    front = len(name.encode()) + 10
    if inner in (pl.Int128, pl.UInt128):  # beyond 64 bits it cannot be stored
        return pl.when(column.is_not_null()).then(MAX_FEATURES_BYTES + 1).otherwise(0)
    if not isinstance(dtype, pl.List):
        size = column.str.len_bytes().cast(pl.Int64) if dtype == pl.String else pl.lit(9)
    elif inner == pl.String:
        size = column.list.eval(pl.element().str.len_bytes().cast(pl.Int64) + 5).list.sum()
    else:
        size = column.list.len().cast(pl.Int64) * 9
    return size.fill_null(0) + front
