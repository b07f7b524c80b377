"""A completed log to a fitted schema and to arrays on disk, without ever holding all rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import polars as pl
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0

from models.features.arrays import Arrays
from models.features.encoder import Encoder
from models.features.field import FieldSpec
from models.features.schema import Schema, SchemaSpec
from models.features.values import Column, Tally
from training.data.history import Ints
from training.data.past import values_of
from training.data.time_order import blocks
from training.log import PARTS
from training.progress import bar

_START, _END = " start", " end"
_COUNT = " count"  # a column for a while, as ROW is


class RawColumns(Mapping[str, Column]):
    """The raw columns of some fields as the schema and the encoder take them, made when asked for.

    One by one, since a column of Python strings takes five times the memory of the table's own.
    """

    def __init__(self, rows: pl.DataFrame, fields: Iterable[FieldSpec]) -> None:
        self._rows = rows
        self._names = [f.name for f in fields if f.kind not in ("time", "sequence")]

    def __getitem__(self, name: str) -> Column:
        if name not in self._names:
            raise KeyError(name)
        return _column(self._rows[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def fit(spec: SchemaSpec, rows: pl.LazyFrame) -> Schema:
    """What `spec.fit` makes of the training part's columns: each is counted where it lies, one at a time."""
    train = rows.filter(pl.col("part") == "train")
    return spec.fit_tallies({f.name: _tally(f, train) for f in spec.fields if f.kind not in ("time", "sequence")})


def write_parts(
    folder: Path,
    rows: pl.LazyFrame,
    schema: Schema,
    windows: Callable[[pl.DataFrame], tuple[Ints, Ints]],
    sizes: Mapping[str, int],
    *truth: str,
) -> None:
    """The arrays of every part, one folder each: see `training.data.prepare`.

    `windows` tells a block's rows, block after block, where their histories stand among the events.
    """
    encoder = Encoder(schema)
    with ExitStack() as opened, bar("encoding", sum(sizes.values())) as advance:
        files = {part: opened.enter_context(ArrayFiles(folder / part, sizes[part])) for part in PARTS}
        for block in blocks(rows):
            if schema.history_length:
                starts, ends = windows(block)
                block = block.with_columns(pl.Series(_START, starts), pl.Series(_END, ends))  # noqa: PLW2901
            for part in PARTS:
                mine = block.filter(pl.col("part") == part)
                if mine.height:
                    files[part].append(_encoded(mine, encoder))
                    files[part].append({name: mine[name].to_numpy() for name in ("group", *truth)})
                    files[part].append({"label": mine["label"].to_numpy().astype(np.float32)})
                    if "weight" in mine.columns:
                        files[part].append({"weight": mine["weight"].to_numpy().astype(np.float32)})
                    files[part].append({"request": mine["request"].to_numpy().astype(np.int64)})
                    if schema.history_length:
                        window = {"start": mine[_START].to_numpy(), "end": mine[_END].to_numpy()}
                        files[part].append({**window, "ts": mine["ts"].to_numpy()})
            advance(block.height)


def write_events(folder: Path, events: Iterable[pl.DataFrame], num_events: int, schema: Schema) -> None:
    """The arrays of every past event, given block by block."""
    encoder = Encoder(schema)
    with ArrayFiles(folder, num_events) as files:
        for block in events:
            files.append(encoder.encode_events(RawColumns(block, schema.history_sources), block["ts"].to_numpy()))


class ArrayFiles:
    """A folder of .npy files of `num_rows` rows each, written a block of rows at a time."""

    def __init__(self, folder: Path, num_rows: int) -> None:
        self._folder, self._num_rows = folder, num_rows
        self._files: dict[str, BinaryIO] = {}
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        self._folder.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def append(self, arrays: Arrays) -> None:
        """The next rows of these arrays; ids become int32."""
        for name, array in arrays.items():
            small = array.astype(np.int32) if "." in name and array.dtype == np.int64 else array
            if name not in self._files:
                self._files[name] = self._opened.enter_context((self._folder / f"{name}.npy").open("wb"))
                shape = (self._num_rows, *small.shape[1:])
                header = {**header_data_from_array_1_0(small), "fortran_order": False, "shape": shape}
                write_array_header_1_0(self._files[name], header)
            # Not through a memory map: on a full disk that ends the process with SIGBUS.
            self._files[name].write(small.tobytes())


def _encoded(rows: pl.DataFrame, encoder: Encoder) -> Arrays:
    schema = encoder.schema
    constant = RawColumns(rows, (*schema.group("user"), *schema.group("context")))
    arrays = encoder.encode_requests(constant, rows["ts"].to_numpy())
    return arrays | encoder.encode_items(RawColumns(rows, schema.group("item")), rows.height)


def _tally(field: FieldSpec, train: pl.LazyFrame) -> Tally:
    values, most = values_of(field.name, train).select(field.name), 1
    if field.kind == "multi":
        most = values.select(pl.col(field.name).list.len().max()).collect(engine="streaming").item() or 1
        values = values.select(pl.col(field.name).explode())
    counted = values.group_by(field.name).agg(pl.len().alias(_COUNT))
    if values.collect_schema()[field.name] == pl.String:
        # Different text is different to a vocabulary, too, so a rare one can be left out before it is a Python string.
        counted = counted.filter(pl.col(_COUNT) >= field.min_count)
    table = counted.collect(engine="streaming")
    return Tally(values=table[field.name].to_list(), counts=table[_COUNT].to_numpy(), most_values=most)


def _column(series: pl.Series) -> Column:
    # A column of integers with a gap would become doubles in numpy, and lose ids above 2^53.
    return series.to_numpy() if series.dtype.is_float() else series.to_list()
