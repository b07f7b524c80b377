"""One table in CSV or Parquet files, read by column in pieces; what is wrong is told by file, line and column."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from models.features.values import NULL_VALUES
from training.datasets import csv_lines, spelling, table_files, text_lists, times
from training.errors import UserError
from training.log import ROW

PART = " part"  # a column for a while, as ROW is
Role = Literal["text", "list", "number", "label", "weight", "time", "times", "texts", "numbers"]
"""What a column is read as.

`list` is several values of text in each row, `times` several times; `texts` and `numbers` are lists that keep the place
of a value that is absent.
"""
EXPECTED: Mapping[Role, str] = {
    "text": "strings or numbers",
    "number": "finite numbers",
    "label": "0 or 1",
    "weight": "finite numbers from 0 on",
    "times": "a list of times",
    "numbers": "a list of finite numbers",
}
TYPES: Mapping[Role, pl.DataType] = {
    "list": pl.List(pl.String()),
    "number": pl.Float64(),
    "label": pl.Int8(),
    "weight": pl.Float64(),
    "time": pl.Float64(),
    "times": pl.List(pl.Float64()),
    "texts": pl.List(pl.String()),
    "numbers": pl.List(pl.Float64()),
}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a table's files are to be read."""

    delimiter: str = ","
    quote: str | None = '"'
    separator: str = "|"
    null_values: tuple[str, ...] = NULL_VALUES
    timezone: str | None = None
    timestamp_format: str | None = None


@dataclass(frozen=True, kw_only=True)
class Use:
    """A column of the table, and what it is read as."""

    column: str
    role: Role
    separator: str | None = None
    is_as_written: bool = False  # text of numbers keeps its spelling


class Table:
    """The files of a source, whose columns are asked for by what they are. Holds none of their rows.

    Raises UserError for what is not there or not so.
    """

    def __init__(self, source: Path, reading: Reading = Reading(), parts: Mapping[str, str] | None = None) -> None:
        """`parts` are names within the source, each of a part: their rows are one table, with the column PART."""
        self.source, self.reading = source, reading
        named = {None: source} if parts is None else {part: source / name for part, name in parts.items()}
        self._files = {part: table_files.find(path) for part, path in named.items()}
        self._form = table_files.one_form(source, [files.form for files in self._files.values()])
        self.paths = tuple(path for files in self._files.values() for path in files.paths)
        self.is_text = self._form == "CSV"
        self.notes: list[str] = []
        self._has_long_records = False
        self._rows, self._partitioned = self._scan()
        self.schema = self._collected(self._rows.collect_schema)
        self.names = [name for name in self.schema.names() if name not in (ROW, PART)]
        self.num_rows: int = self._collected(self._rows.select(pl.len()).collect, engine="streaming").item()
        if self.num_rows == 0:
            raise UserError(f"{source}: expected rows, the file holds none")

    def columns(self, uses: Mapping[str, Use]) -> pl.LazyFrame:
        """The columns under the names of `uses`, converted, with ROW, the row's number.

        Reads the columns once before, to settle how they are spelled and to find the first row that is wrong; a column
        of times is read twice.
        """
        readers = {name: self._reader(use) for name, use in uses.items()}
        asked = {
            f"{number} {question}": expression
            for number, reader in enumerate(readers.values())
            for question, expression in reader.questions().items()
        }
        found = self.ask(asked) if asked else {}
        for number, reader in enumerate(readers.values()):
            prefix = f"{number} "
            reader.settle({q.removeprefix(prefix): a for q, a in found.items() if q.startswith(prefix)})
        self._check({r: r.first_wrong for r in readers.values()})
        timed = {r: r.converted() for r in readers.values() if r.use.role in ("time", "times")}
        if timed:
            wrong = [
                pl.when(r.is_wrong_time(time)).then(ROW).min().alias(str(number))
                for number, (r, time) in enumerate(timed.items())
            ]
            rows = self._collected(self._rows.select(wrong).collect, engine="streaming").row(0)
            self._check(dict(zip(timed, rows, strict=True)))
        self.notes += [note for reader in readers.values() for note in reader.notes]
        columns = [ROW, PART] if PART in self.schema else [ROW]
        return self._rows.select(*columns, **{name: reader.converted() for name, reader in readers.items()})

    def series(self, name: str, role: Role) -> pl.Series:
        """One column of a small table."""
        series: pl.Series = self._collected(self.columns({name: Use(column=name, role=role)}).collect)[name]
        return series

    def ask(self, questions: Mapping[str, pl.Expr]) -> dict[str, Any]:
        """What aggregates over all rows come to."""
        answers: dict[str, Any] = self._collected(self._rows.select(**questions).collect, engine="streaming").row(
            0, named=True
        )
        return answers

    def fail(self, row: int, column: str, expected: str) -> UserError:
        """The error of one row: its file, its line, and what stands there."""
        raw = self._rows.select(column).slice(row, 1).collect().item()
        raw = raw.to_list() if isinstance(raw, pl.Series) else raw
        file, place = self._place(row)
        return UserError(f"{file}, {place}, column {column}: expected {expected}, got {raw!r:.80}")

    def first_present(self, column: str) -> int:
        row: int | None = self.ask({"row": _first(pl.col(column).is_not_null())})["row"]
        return row or 0

    def example(self, row: int, raw: pl.Expr, converted: pl.Expr) -> tuple[str, str]:
        """One row's value as it stands and as it is read."""
        was, became = self._rows.select(raw=raw, converted=converted).slice(row, 1).collect().row(0)
        return str(was), ", ".join(became) if isinstance(became, list) else str(became)

    def _check(self, first_wrong: Mapping["_Reader", int | None]) -> None:
        wrong = [(row, reader) for reader, row in first_wrong.items() if row is not None]
        if wrong:
            row, reader = min(wrong, key=lambda one: one[0])
            raise self.fail(row, reader.use.column, reader.expected)

    def _reader(self, use: Use) -> "_Reader":
        if use.column not in self.names:
            known = ", ".join(self.names)
            is_one = self.is_text and len(self.names) == 1
            other = next((delimiter for delimiter in (";", "\t", "|", ",") if is_one and delimiter in known), None)
            hint = f"; is the delimiter {other!r}?" if other else ""
            raise UserError(f"{self.source}: no column {use.column}; there are {known}{hint}")
        is_untyped = (self.is_text or use.column in self._partitioned) and not use.is_as_written
        return _Reader(self, use, self.schema[use.column], is_untyped=is_untyped)

    def _scan(self) -> tuple[pl.LazyFrame, set[str]]:
        names = self._names_of_text() if self.is_text else ()
        scans, partitioned = [], set[str]()
        for part, files in self._files.items():
            groups: dict[tuple[tuple[str, str], ...], list[Path]] = {}
            for path, partition in zip(files.paths, files.partitions, strict=True):
                groups.setdefault(partition, []).append(path)
            for partition, paths in groups.items():
                scan = self._scan_text(paths, names) if self.is_text else _scan_parquet(paths)
                present = self._collected(scan.collect_schema).names()
                reserved = next((name for name in present if name in (ROW, PART)), None)
                if reserved is not None:
                    raise UserError(
                        f"{paths[0]}: expected column names that do not begin with a space, got {reserved!r}"
                    )
                added = {name: pl.lit(value) for name, value in partition if name not in present}
                partitioned |= set(added)
                scans.append(scan.with_columns(**added, **({} if part is None else {PART: pl.lit(part)})))
        rows = scans[0] if len(scans) == 1 else pl.concat(scans, how="vertical_relaxed")
        return rows.with_row_index(ROW), partitioned

    def _names_of_text(self) -> tuple[str, ...]:
        names: tuple[str, ...] = ()
        for path in self.paths:
            header, has_long = csv_lines.check(path, self.reading.delimiter, self.reading.quote)
            self._has_long_records |= has_long
            if names and header != names:
                expected = f"the columns of {self.paths[0]}, {', '.join(names)}"
                raise UserError(f"{path}, line 1: expected {expected}, got {', '.join(header)}")
            names = header
        if not names:
            raise UserError(f"{self.source}: expected rows, the file holds none")
        return names

    def _scan_text(self, paths: Sequence[Path], names: tuple[str, ...]) -> pl.LazyFrame:
        scan = pl.scan_csv(
            list(paths),
            separator=self.reading.delimiter,
            quote_char=self.reading.quote,
            schema=dict.fromkeys(names, pl.String),
            glob=False,
        )
        return scan.with_columns(pl.col(names[-1]).str.strip_suffix("\r"))

    def _collected(self, collect: Any, **options: Any) -> Any:
        try:
            return collect(**options)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as err:
            raise UserError(f"{self.source}: expected a {self._form} file ({str(err).splitlines()[0]})") from err

    def _place(self, row: int) -> tuple[Path, str]:
        for path in self.paths:
            scan = self._scan_text([path], tuple(self.names)) if self.is_text else pl.scan_parquet(path, glob=False)
            num: int = (
                scan.select(pl.len()).collect(engine="streaming").item() if len(self.paths) > 1 else self.num_rows
            )
            if row < num:
                break
            row -= num
        return path, f"line {row + 2}" if self.is_text and not self._has_long_records else f"row {row + 1}"


class _Reader:
    """One column on its way to what it is read as: asks questions of all its rows, then converts it."""

    def __init__(self, table: Table, use: Use, dtype: pl.DataType, *, is_untyped: bool) -> None:
        self.use, self.notes = use, list[str]()
        self.reading = reading = table.reading
        self.first_wrong: int | None = None
        self._table, self._dtype, self._is_untyped = table, dtype, is_untyped
        self._separator = use.separator or reading.separator
        self._is_numbers = False
        self._form: str | None = None
        self._has_text = True
        if dtype == pl.String:
            self._raw = spelling.present(pl.col(use.column), reading.null_values)
        else:
            self._raw = pl.col(use.column)
        self.expected = EXPECTED.get(use.role, "")
        if use.role == "time":
            self.expected = (
                times.EXPECTED if reading.timestamp_format is None else f"a time as {reading.timestamp_format}"
            )
        if use.role in ("list", "texts"):
            self.expected = (
                f"lists, or text parted by {self._separator!r}; a list in brackets needs commas, as ['a', 'b']"
            )

    def questions(self) -> dict[str, pl.Expr]:
        """What has to be known of the whole column, as aggregates by name."""
        match self.use.role:
            case "text":
                return self._of_text()
            case "list" | "times" | "texts" | "numbers":
                return self._of_lists()
            case "time":
                return self._of_times()
        number = self._plain_number()
        wrong = number.is_null() if self.use.role == "label" else number.is_null() & self._raw.is_not_null()
        wrong |= number.is_infinite()
        if self.use.role == "label":
            wrong |= ~number.is_in([0.0, 1.0])
        if self.use.role == "weight":
            wrong |= number.is_null() | (number < 0)
        return {"wrong": _first(wrong)}

    def settle(self, answers: Mapping[str, Any]) -> None:
        """Decide by the answers how the column is spelled, and which row is wrong."""
        self.first_wrong = answers.get("wrong")
        self._is_numbers = bool(answers.get("is_numbers"))
        if self._is_numbers and answers["example"] is not None:
            was, became = self._table.example(answers["example"], self._raw, self.converted())
            self.notes.append(f"column {self.use.column}: all its values are numbers or booleans; {was} is {became}")
        if "num" in answers:
            self._settle_times(answers)

    def converted(self) -> pl.Expr:
        match self.use.role:
            case "text":
                return self._text()
            case "list" | "texts":
                return self._list()
            case "numbers":
                return self._numbers()
            case "label":
                return self._number().cast(pl.Int8)
            case "time":
                return self._time()
            case "times":
                return self._times()
        return self._number()

    def is_wrong_time(self, time: pl.Expr) -> pl.Expr:
        if self.use.role == "times":
            return time.list.eval(pl.element().is_null()).list.any()
        return time.is_null() | (time < times.FIRST_S) | (time >= times.END_S)

    def _number(self) -> pl.Expr:
        return spelling.present_number(self._plain_number(), self.reading.null_values)

    def _plain_number(self) -> pl.Expr:
        number = spelling.to_number(self._raw, self._dtype)
        if number is None:
            raise self._fail_type()
        return number

    def _of_text(self) -> dict[str, pl.Expr]:
        if spelling.as_text(self._raw, self._dtype) is None:
            raise self._fail_type()
        return self._of_spelling(self._raw) if self._is_untyped else {}

    def _of_spelling(self, values: pl.Expr) -> dict[str, pl.Expr]:
        plain = values.str.contains(r"^-?[1-9][0-9]*$|^0$")
        return {
            "is_numbers": spelling.is_number(values).all(ignore_nulls=True) & values.is_not_null().any(),
            "example": _first(values.is_not_null() & ~plain),
        }

    def _text(self) -> pl.Expr:
        texts = spelling.as_numbers(self._raw) if self._is_numbers else spelling.as_text(self._raw, self._dtype)
        assert texts is not None
        return spelling.present(texts, self.reading.null_values)

    def _of_lists(self) -> dict[str, pl.Expr]:
        if isinstance(self._dtype, pl.List | pl.Array) or self._dtype == pl.Null:
            inner = _inner(self._dtype)
            convert = self._typed_time if self.use.role == "times" else spelling.as_text
            if convert(pl.element(), inner) is None:
                raise self._fail_type()
            return {"wrong": _first(self._has_no_number())} if self.use.role == "numbers" else {}
        if self._dtype != pl.String:
            if self.use.role != "times" and spelling.as_text(self._raw, self._dtype) is not None:
                return {}  # one value in each row
            raise self._fail_type()
        wrong = text_lists.is_bracketed(self._raw) & ~text_lists.is_list(self._raw)
        if self.use.role == "times":
            return {"wrong": _first(wrong)}
        if self.use.role == "numbers":
            return {"wrong": _first(wrong | self._has_no_number())}
        part = self._parts()
        is_number = part.list.eval(spelling.is_number(pl.element())).list.all(ignore_nulls=True)
        is_plain = part.list.eval(pl.element().str.contains(r"^-?[1-9][0-9]*$|^0$")).list.all()
        if not self._is_untyped:
            return {"wrong": _first(wrong)}
        return {
            "wrong": _first(wrong),
            "is_numbers": is_number.all(ignore_nulls=True) & (part.list.len() > 0).any(),
            "example": _first(part.is_not_null() & ~is_plain),
        }

    def _parts(self) -> pl.Expr:
        """The values of texts parted by the separator, without the space around them; null where in brackets."""
        text = pl.when(~text_lists.is_bracketed(self._raw)).then(self._raw)
        return text.str.split(self._separator).list.eval(self._present(pl.element().str.strip_chars()))

    def _present(self, members: pl.Expr) -> pl.Expr:
        """A list's members without the absent ones, which are null where places are kept."""
        present = spelling.present(members, self.reading.null_values)
        return present if self._keeps_places else present.drop_nulls()

    @property
    def _keeps_places(self) -> bool:
        return self.use.role in ("texts", "numbers")

    def _numbers(self) -> pl.Expr:
        number = spelling.to_number(pl.element(), pl.String())
        assert number is not None
        return self._list().list.eval(number)

    def _has_no_number(self) -> pl.Expr:
        """Whether a list holds what is no finite number."""
        number = spelling.to_number(pl.element(), pl.String())
        assert number is not None
        wrong = pl.element().is_not_null() & (number.is_null() | number.is_infinite())
        return self._list().list.eval(wrong).list.any()

    def _list(self) -> pl.Expr:
        empty = pl.lit([], dtype=pl.List(pl.String))
        if isinstance(self._dtype, pl.List | pl.Array):
            values = self._raw if isinstance(self._dtype, pl.List) else self._raw.arr.to_list()
            texts = spelling.as_text(pl.element(), _inner(self._dtype))
            assert texts is not None
            return values.list.eval(self._present(texts)).fill_null(empty)
        if self._dtype != pl.String:
            texts = spelling.as_text(self._raw, self._dtype)
            assert texts is not None
            return pl.when(self._raw.is_not_null()).then(pl.concat_list(texts)).otherwise(empty)
        parts = self._parts()
        if self._is_numbers:
            parts = parts.list.eval(self._present(spelling.as_numbers(pl.element())))
        brackets = text_lists.bracketed(self._raw, keep_absent=self._keeps_places)
        return pl.coalesce(brackets.list.eval(self._present(pl.element())), parts).fill_null(empty)

    def _of_times(self) -> dict[str, pl.Expr]:
        if self._dtype == pl.Float32:
            raise UserError(
                f"{self._table.source}, column {self.use.column}: expected times, got Float32, which holds Unix seconds"
                " to two minutes only; write them as Float64, Int64 or Datetime"
            )
        if isinstance(self._dtype, pl.Datetime | pl.Date):
            return {}
        number = spelling.to_number(self._raw, self._dtype)
        if number is None or self._dtype == pl.Boolean:
            raise self._fail_type()
        if self._uses_strptime:
            return {}
        return {
            "present": self._raw.is_not_null().sum(),
            "num": number.is_not_null().sum(),
            "earliest": number.min(),
            "latest": number.max(),
        }

    def _settle_times(self, answers: Mapping[str, Any]) -> None:
        column, num = self.use.column, answers["num"]
        self._has_text = answers["present"] > num
        if num == 0:
            return
        forms = times.NUMBER_FORMS
        asked = self.reading.timestamp_format
        inside = [n for n, f in forms.items() if f.low <= answers["earliest"] and answers["latest"] <= f.high]
        candidates = [asked] if asked is not None else inside
        if len(candidates) != 1 or candidates[0] not in inside:
            candidates = self._plausible(candidates or list(forms), num)
        if len(candidates) > 1:
            raise UserError(
                f"{self._table.source}, column {column}: its numbers may be {' or '.join(candidates)}; say which by"
                " `timestamp_format:`"
            )
        if not candidates:
            return
        self._form, form = candidates[0], forms[candidates[0]]
        if form.units_a_second is not None and self.reading.timezone is not None:
            raise UserError(
                f"{self._table.source}, column {column}: holds {form.words}, which are the same in every time zone;"
                " leave `timezone:` out, or write the times as text or as a Parquet time"
            )
        if self._form != "seconds":
            zone = "" if form.units_a_second else f" in {self.reading.timezone or 'UTC'}"
            self.notes.append(f"column {column}: its numbers are read as {form.words}{zone}")

    def _plausible(self, candidates: Sequence[str], num: int) -> list[str]:
        """Those of the forms that every row may have; without any, notes the first row that differs from most."""
        number = spelling.to_number(self._raw, self._dtype)
        assert number is not None
        fine = {name: times.NUMBER_FORMS[name].is_plausible(number) for name in candidates}
        counts = self._table.ask({name: plausible.sum() for name, plausible in fine.items()})
        fitting = [name for name in candidates if counts[name] == num]
        if "YYYYMMDDHH" in fitting:  # as seconds they would be of 2033 and later
            return ["YYYYMMDDHH"]
        if not fitting:
            most = max(candidates, key=lambda name: counts[name]) if any(counts.values()) else "seconds"
            wrong = ~times.NUMBER_FORMS[most].is_plausible(number)
            self.first_wrong = self._table.ask({"row": _first(wrong)})["row"]
            if most != "seconds":
                self.expected = f"{times.NUMBER_FORMS[most].words}, as in other rows, or an ISO 8601 time"
        return fitting

    @property
    def _uses_strptime(self) -> bool:
        return "%" in (self.reading.timestamp_format or "")

    def _time(self) -> pl.Expr:
        zone = self.reading.timezone or "UTC"
        typed = self._typed_time(self._raw, self._dtype)
        if typed is not None:
            return typed
        asked = self.reading.timestamp_format
        if self._uses_strptime:
            return times.of_text(self._raw.cast(pl.String), zone, asked)
        number = spelling.to_number(self._raw, self._dtype)
        assert number is not None
        form = times.NUMBER_FORMS[self._form or "seconds"]
        us = form.microseconds(number)
        seconds = us.cast(pl.Float64) / 1e6 if form.units_a_second else times.in_zone(us, zone)
        if self._dtype != pl.String or not self._has_text:
            return seconds
        text = times.of_text(pl.when(number.is_null()).then(self._raw), zone, None)
        return pl.when(number.is_null()).then(text).otherwise(seconds)

    def _typed_time(self, values: pl.Expr, dtype: pl.DataType) -> pl.Expr | None:
        zone = self.reading.timezone or "UTC"
        if isinstance(dtype, pl.Datetime):
            if dtype.time_zone is not None:
                return values.dt.epoch("us").cast(pl.Float64) / 1e6
            return times.in_zone(values.dt.epoch("us"), zone)
        if isinstance(dtype, pl.Date):
            return times.in_zone(values.cast(pl.Datetime("us")).dt.epoch("us"), zone)
        if self.use.role == "times" and (dtype.is_integer() or dtype == pl.Float64):
            return times.NUMBER_FORMS["seconds"].microseconds(values.cast(pl.Float64)).cast(pl.Float64) / 1e6
        return None

    def _times(self) -> pl.Expr:
        empty = pl.lit([], dtype=pl.List(pl.Float64))
        if isinstance(self._dtype, pl.List | pl.Array):
            values = self._raw if isinstance(self._dtype, pl.List) else self._raw.arr.to_list()
            typed = self._typed_time(pl.element(), _inner(self._dtype))
            assert typed is not None
            return values.list.eval(typed).fill_null(empty)
        if self._dtype == pl.Null:
            return empty
        parts = pl.coalesce(text_lists.bracketed(self._raw), self._parts())
        zone = self.reading.timezone or "UTC"
        number = spelling.to_number(pl.element(), pl.String())
        assert number is not None
        seconds = times.NUMBER_FORMS["seconds"].microseconds(number).cast(pl.Float64) / 1e6
        text = times.of_text(pl.when(number.is_null()).then(pl.element()), zone, None)
        return parts.list.eval(pl.when(number.is_null()).then(text).otherwise(seconds)).fill_null(empty)

    def _fail_type(self) -> UserError:
        return self._table.fail(self._table.first_present(self.use.column), self.use.column, self.expected)


def _inner(dtype: pl.DataType) -> pl.DataType:
    """The type of a list's members."""
    inner = dtype.inner if isinstance(dtype, pl.List | pl.Array) else pl.Null()
    return inner if isinstance(inner, pl.DataType) else inner()


def _scan_parquet(paths: Sequence[Path]) -> pl.LazyFrame:
    return pl.scan_parquet(list(paths), glob=False, hive_partitioning=False)


def _first(wrong: pl.Expr) -> pl.Expr:
    return pl.when(wrong).then(ROW).min()
