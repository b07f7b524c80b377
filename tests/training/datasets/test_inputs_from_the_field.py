"""Logs as warehouses, pandas and spreadsheets write them: read as what they mean, or refused in one sentence."""

import gzip
import json
import shutil
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.features.encoder import Encoder
from models.features.history import Event
from models.features.values import NULL_VALUES, canonical, is_null_text
from training.data.batches import Prepared
from training.data.prepare import prepare
from training.datasets import tabular
from training.datasets.checked_table import Table
from training.errors import UserError
from training.log import PARTS, PAST_ITEM, PAST_TS, past_name

START = 1_700_000_000
SHAPES: dict[str, Any] = {
    "label": "clicked", "user": "user_id", "item": "ad_id", "timestamp": "at", "history_length": 3,
    "split": {"by": "time", "valid": 0.2, "test": 0.2},
    "fields": [
        {"name": "user_id", "kind": "categorical", "group": "user"},
        {"name": "title", "kind": "categorical", "group": "item"},
        {"name": "price", "kind": "numeric", "group": "item"},
        {"name": "ad_id", "kind": "categorical", "group": "item"},
        {"name": "ad_id", "kind": "sequence", "group": "behaviour", "of": "ad_id"},
    ],
}  # fmt: skip
NUM = 20
COLUMNS: dict[str, Any] = {
    "clicked": [n % 2 for n in range(NUM)],
    "user_id": [f"u{n % 3}" for n in range(NUM)],
    "ad_id": [f"ad{n % 4}" for n in range(NUM)],
    "title": [f"title {n % 5}" for n in range(NUM)],
    "price": [n + 0.5 for n in range(NUM)],
    "at": [START + 60 * n for n in range(NUM)],
}


@pytest.fixture
def log(tmp_path):
    """Writes a log, and the YAML beside it; returns what is read of it."""

    def log(columns=None, *, text=None, file="log.csv", fields=None, **changes):
        path = tmp_path / file
        if text is not None:
            path.write_text(text)
        elif columns is not None or not path.exists():
            table = pl.DataFrame(COLUMNS | (columns or {}))
            table.write_parquet(path) if path.suffix == ".parquet" else table.write_csv(path)
        described = {k: v for k, v in (SHAPES | changes).items() if v is not None}
        kinds = {field["name"]: field for field in fields or ()}
        described["fields"] = [
            kinds.get(f["name"], f) if f["kind"] != "sequence" else f for f in described["fields"]
        ] + [f for name, f in kinds.items() if name not in {f["name"] for f in described["fields"]}]
        (tmp_path / "log.yaml").write_text(yaml.safe_dump(described))
        return tabular.load(path, tmp_path / "log.yaml")

    return log


def column(log, name):
    return log.rows.collect()[name].to_list()


def cycle(*values):
    return [values[n % len(values)] for n in range(NUM)]


# One spelling of a value.


@pytest.mark.parametrize(
    ("written", "spelled"),
    [
        (["7003.0", "7004.0", ""], ["7003", "7004", None]),
        (["9.50", "10", "0.5"], ["9.5", "10", "0.5"]),
        (["True", "False", ""], ["1", "0", None]),
        (["true", "1", "0.0"], ["1", "1", "0"]),
        (["-0.0", "-3.0", "1e+16"], ["0", "-3", "10000000000000000"]),
        (["9007199254740993", "12345678901234567890"], ["9007199254740993", "12345678901234567890"]),
        (["007", "7003.0", "8"], ["007", "7003.0", "8"]),  # an id with a leading zero is text, and so are all
        (["1e5", "61e5", "12"], ["1e5", "61e5", "12"]),  # hashes may look so
        (["7003.0", "none of them"], ["7003.0", "none of them"]),
    ],
)
def test_a_csv_column_of_numbers_is_spelled_as_numbers_are_and_one_of_text_is_kept(log, written, spelled):
    for name in ("user_id", "title"):
        assert column(log({name: cycle(*written)}), "user" if name == "user_id" else name) == cycle(*spelled)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(
        st.none() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans(),
        min_size=3,
        max_size=20,
    )
)
def test_a_number_is_spelled_in_csv_as_it_is_from_json(values, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spelling")
    texts = ["" if v is None else str(v) if isinstance(v, bool) else json.dumps(v) for v in values]
    pl.DataFrame({"x": texts, "y": "a"}).write_csv(folder / "log.csv")

    spelled = Table(folder / "log.csv").series("x", "text").to_list()

    assert spelled == [canonical(json.loads(t.lower())) if t else None for t in texts]


@pytest.mark.parametrize(
    ("values", "spelled"),
    [
        (pl.Series([7003, 7004], dtype=pl.Int64), ["7003", "7004"]),
        (pl.Series([7003.0, 9.5], dtype=pl.Float64), ["7003", "9.5"]),
        (pl.Series([0.1, 7.0], dtype=pl.Float32), ["0.1", "7"]),
        (pl.Series([True, False]), ["1", "0"]),
        (pl.Series([Decimal(7003), Decimal(12345678901234567890123)], dtype=pl.Decimal(38, 0)), None),
        (pl.Series([Decimal("9.50"), Decimal("7.00")], dtype=pl.Decimal(10, 2)), ["9.5", "7"]),
        (pl.Series(["a", "b"], dtype=pl.Categorical), ["a", "b"]),
        (pl.Series(["7003.0", "b"]), ["7003.0", "b"]),
    ],
    ids=str,
)
def test_a_typed_column_has_the_same_spelling(log, values, spelled):
    spelled = spelled or ["7003", "12345678901234567890123"]
    many = pl.concat([values] * (NUM // 2))

    assert column(log({"title": many}, file="log.parquet"), "title") == spelled * (NUM // 2)


def test_versions_that_look_like_numbers_stay_text_where_the_yaml_says_so(log):
    versions = cycle("1.10", "1.1", "2.0")
    field = {"name": "title", "kind": "categorical", "group": "item"}

    assert column(log({"title": versions}, fields=[field]), "title") == cycle("1.1", "1.1", "2")
    assert column(log({"title": versions}, fields=[field | {"spelling": "text"}]), "title") == versions


def test_how_a_column_was_spelled_is_noted_with_an_example(log):
    assert (
        "column user_id: all its values are numbers or booleans; 7003.0 is 7003"
        in log({"user_id": cycle("7003.0", "7004.0")}).notes
    )


def test_booleans_are_labels_and_numbers_in_every_file(log):
    expected = [float(n % 2) for n in range(NUM)]
    for file in ("log.csv", "log.parquet"):
        flags = log({"clicked": cycle(False, True), "price": cycle(False, True)}, file=file)
        assert column(flags, "price") == expected
        assert column(flags, "label") == expected


# Absent values.


@pytest.mark.parametrize("absent", ["", "NULL", "\\N", "nan", "NaN", "None", " NULL "])
def test_what_tables_write_for_nothing_is_absent_in_every_kind_of_field(log, absent):
    tags = {"name": "tags", "kind": "multi", "group": "item"}
    read = log(
        {"title": cycle("a", absent), "price": cycle("1.5", absent), "tags": cycle("x|y", absent)}, fields=[tags]
    )

    assert column(read, "title") == cycle("a", None)
    assert column(read, "price") == cycle(1.5, None)
    assert column(read, "tags") == cycle(["x", "y"], [])


def test_null_values_may_be_named_numbers_among_them(log):
    read = log({"title": cycle("a", "?"), "price": cycle(1.5, -999999999)}, null_values=["?", -999999999])

    assert column(read, "title") == cycle("a", None)
    assert column(read, "price") == cycle(1.5, None)


def test_a_null_value_is_taken_for_the_same_number_however_it_is_written(log):
    for file in ("log.csv", "log.parquet"):
        assert column(log({"price": cycle(1.5, -1.0)}, file=file, null_values=["-1"]), "price") == cycle(1.5, None)


# Lists.


@pytest.mark.parametrize(
    "written",
    [
        "a|b", " a | b ", "['a', 'b']", '["a", "b"]', "[a, b]", "['a', None, 'b',]", "a||b",
    ],
)  # fmt: skip
def test_lists_are_read_in_every_form_that_tables_write_them_in(log, written):
    tags = {"name": "title", "kind": "multi", "group": "item"}

    assert column(log({"title": cycle(written, "c")}, fields=[tags]), "title") == cycle(["a", "b"], ["c"])


@pytest.mark.parametrize("written", ["['a' 'b']", "[1 2 3]", "['a', ['b']]", "{a,b}", "[a, b c]", "['a', ]]"])
def test_a_list_in_brackets_that_cannot_be_read_is_refused(log, written):
    tags = {"name": "title", "kind": "multi", "group": "item"}

    with pytest.raises(UserError, match=r"log.csv, line 3, column title: expected lists, or text parted by '\|'"):
        log({"title": ["a", written] + ["b"] * (NUM - 2)}, fields=[tags])


def test_numbers_in_lists_are_spelled_as_numbers_are(log):
    tags = {"name": "title", "kind": "multi", "group": "item"}

    assert column(log({"title": cycle("1.0|2.50", "[1.0, 3]")}, fields=[tags]), "title") == cycle(
        ["1", "2.5"], ["1", "3"]
    )
    assert column(log({"title": cycle("1.0|x", "3.0")}, fields=[tags]), "title") == cycle(["1.0", "x"], ["3.0"])


@settings(max_examples=30, deadline=None)
@given(lists=st.lists(st.lists(st.text(max_size=5), max_size=4), min_size=1, max_size=10))
@example(lists=[["'\x1f", "it's", "\\", '"', "\x00'"]])
@example(lists=[["\t", " ", " a", "None"]])
def test_a_list_of_any_words_comes_back_from_json_and_from_python(lists, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lists")
    expected = [[word for word in words if not is_null_text(word, NULL_VALUES)] for words in lists]

    for write in (json.dumps, repr, lambda words: json.dumps(words, ensure_ascii=False)):
        texts = [write(words) for words in lists]
        if any(c in text for text in texts for c in "\r\n"):
            continue
        pl.DataFrame({"x": texts, "y": "a"}).write_csv(folder / "log.csv", quote_style="always")
        assert Table(folder / "log.csv").series("x", "list").to_list() == expected


# Times.


def day(n):
    return datetime(2024, 1, 1, tzinfo=UTC) + timedelta(hours=7 * n)


@pytest.mark.parametrize(
    ("form", "unit"),
    [("%Y%m%d", 86400), ("%Y%m%d%H", 3600), ("%Y%m%d%H%M", 60), ("%Y%m%d%H%M%S", 1), ("%y%m%d%H", 3600)],
)
@pytest.mark.parametrize("zone", ["UTC", "Asia/Shanghai"])
@pytest.mark.parametrize("file", ["log.csv", "log.parquet"])
def test_calendar_digits_are_times_in_the_zone_of_the_yaml(log, form, unit, zone, file):
    local = [day(n).astimezone(ZoneInfo(zone)) for n in range(NUM)]
    digits = [int(time.strftime(form)) for time in local]
    expected = [
        datetime.strptime(
            t.strftime(form) + ("00" if form[-1] == "H" else ""), form + ("%M" if form[-1] == "H" else "")
        )
        .replace(tzinfo=ZoneInfo(zone))
        .timestamp()
        for t in local
    ]

    read = log({"at": digits}, file=file, timezone=None if zone == "UTC" else zone)

    assert column(read, "ts") == expected
    assert any("column at: its numbers are read as" in note for note in read.notes)


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
@pytest.mark.parametrize("file", ["log.csv", "log.parquet"])
def test_unix_times_are_read_in_their_unit(log, unit, factor, file):
    read = log({"at": [time * factor for time in COLUMNS["at"]]}, file=file)

    assert column(read, "ts") == COLUMNS["at"]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (cycle("17", "631151999"), "expected Unix seconds from 1990 on"),
        (cycle("0"), "expected Unix seconds from 1990 on"),
        (cycle("20240101", "1700000000"), "column at: expected"),
        (cycle("20240101", "20240231"), "expected YYYYMMDD|expected Unix seconds .* got '20240231'"),
        (cycle("1700000000", "1700000000000"), "column at: expected"),
        (cycle("2024-01-01", "2024-02-31"), "line 3, column at: .* got '2024-02-31'"),
        (cycle("1989-12-31T23:59:59"), "column at: expected Unix seconds from 1990 on or an ISO 8601 time"),
        (cycle("20101112", "20111213"), "may be YYYYMMDD or YYMMDDHH; say which by `timestamp_format:`"),
        (cycle("yesterday"), "got 'yesterday'"),
    ],
)
def test_what_is_no_time_or_may_be_two_is_refused(log, written, message):
    with pytest.raises(UserError, match=message):
        log({"at": written})


def test_a_form_that_may_be_two_is_read_as_the_yaml_says(log):
    written = [20101112 + n % 3 for n in range(NUM)]

    for form, year in (("YYYYMMDD", 2010), ("YYMMDDHH", 2020)):
        first = datetime.fromtimestamp(column(log({"at": written}, timestamp_format=form), "ts")[0], UTC)
        assert first.year == year


def test_a_strptime_form_may_be_named(log):
    written = [day(n).strftime("%d.%m.%Y %H:%M") for n in range(NUM)]

    read = log({"at": written}, timestamp_format="%d.%m.%Y %H:%M")

    assert column(read, "ts") == [day(n).timestamp() for n in range(NUM)]


def test_times_in_single_precision_are_refused(log):
    with pytest.raises(UserError, match="column at: expected times, got Float32, which holds Unix seconds to two min"):
        log({"at": pl.Series(COLUMNS["at"], dtype=pl.Float32)}, file="log.parquet")


@pytest.mark.parametrize("file", ["log.csv", "log.parquet"])
def test_local_times_are_in_the_zone_of_the_yaml_and_zoned_ones_in_their_own(log, file):
    wall = [datetime(2024, 6, 1, 8, n, tzinfo=None) for n in range(NUM)]  # noqa: DTZ001 - as exports have them
    written = wall if file == "log.parquet" else [str(time) for time in wall]
    zoned = [f"{time.isoformat()}+02:00" for time in wall]

    assert (
        column(log({"at": written}, file=file, timezone="Asia/Shanghai"), "ts")[0]
        == datetime(2024, 6, 1, 0, 0, tzinfo=UTC).timestamp()
    )
    assert column(log({"at": written}, file=file), "ts")[0] == datetime(2024, 6, 1, 8, 0, tzinfo=UTC).timestamp()
    assert (
        column(log({"at": zoned}, timezone="Asia/Shanghai"), "ts")[0]
        == datetime(2024, 6, 1, 6, 0, tzinfo=UTC).timestamp()
    )


def test_unix_seconds_have_no_zone(log):
    with pytest.raises(
        UserError, match="holds Unix seconds, which are the same in every time zone; leave `timezone:` out"
    ):
        log({}, timezone="Asia/Shanghai")


def test_the_range_of_times_is_noted(log):
    assert "times run from 2023-11-14 22:13:20 UTC to 2023-11-14 22:32:20 UTC" in log().notes


def test_a_split_by_time_says_how_many_rows_share_one_time(log):
    with pytest.raises(UserError, match=r"got 3 different ones in 20 rows: 7 rows share 2023-11-14 .*rows of one time"):
        log({"at": sorted(START + 86400 * (n % 3) for n in range(NUM))}, split={"by": "time"})


# Files.


def packed(path, form):
    if form == "gzip":
        path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes()))
        return path.with_suffix(".gz")
    pl.read_csv(path, infer_schema=False).write_csv(path.with_suffix(".zst"), compression="zstd")
    return path.with_suffix(".zst")


def test_a_file_is_told_by_its_first_bytes_and_not_by_its_name(log, tmp_path):
    plain = log().rows.collect()
    for form in ("gzip", "zstd"):
        other = packed(tmp_path / "log.csv", form).rename(tmp_path / f"{form} without a name")
        assert tabular.load(other, tmp_path / "log.yaml").rows.collect().equals(plain)
    pl.DataFrame(COLUMNS).write_parquet(tmp_path / "part-00000")
    assert tabular.load(tmp_path / "part-00000", tmp_path / "log.yaml").rows.collect().equals(plain)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".gz"])
def test_a_folder_and_a_glob_are_their_parts_in_order_of_name(log, tmp_path, suffix):
    plain = log().rows.collect()
    table = pl.DataFrame(COLUMNS)
    folder = tmp_path / "parts"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(["more/part-1", "part-2", "part-3"]):
        rows, path = table[7 * number : 7 * number + 7], folder / f"{name}{suffix}"
        if suffix == ".parquet":
            rows.write_parquet(path)
        else:
            text = rows.write_csv().encode()
            path.write_bytes(gzip.compress(text) if suffix == ".gz" else text)
    (folder / "_SUCCESS").touch()
    (folder / ".part-1.crc").write_bytes(b"crc")

    for source in (folder, tmp_path / "part*" / "**" / f"*{suffix}"):
        read = tabular.load(source, tmp_path / "log.yaml")
        assert read.rows.collect().equals(plain)
        assert [path.name for path in read.files] == [f"part-{n}{suffix}" for n in (1, 2, 3)] + ["log.yaml"]


def test_a_wrong_value_in_a_folder_is_told_by_its_own_file_and_line(log, tmp_path):
    log()
    lines = (tmp_path / "log.csv").read_text().splitlines(keepends=True)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "1").write_text("".join(lines[:11]))
    (tmp_path / "parts" / "2").write_text("".join([lines[0], lines[11], "1,u1,ad1,t,dear,1700000000\n", *lines[12:]]))

    with pytest.raises(UserError, match=r"parts/2, line 3, column price: expected finite numbers, got 'dear'"):
        tabular.load(tmp_path / "parts", tmp_path / "log.yaml")


def test_folders_that_say_a_value_are_a_column(log, tmp_path):
    log()
    for day_of in ("2023-11-14", "2023-11-15"):
        (tmp_path / "parts" / f"at={day_of}").mkdir(parents=True)
        pl.DataFrame(COLUMNS).drop("at").write_parquet(tmp_path / "parts" / f"at={day_of}" / "part-0")
    described = yaml.safe_load((tmp_path / "log.yaml").read_text()) | {"split": {"by": "hash"}}
    (tmp_path / "log.yaml").write_text(yaml.safe_dump(described))

    ts = column(tabular.load(tmp_path / "parts", tmp_path / "log.yaml"), "ts")

    assert ts == [datetime(2023, 11, day, tzinfo=UTC).timestamp() for day in (14, 15) for _ in range(NUM)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04....", "got a zip archive or a spreadsheet"),
        (b"BZh91AY", "got packed with bzip2"),
        ("a,b\n".encode("utf-16"), "got text in UTF-16"),
        (b"ORC....", "got an ORC file"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_its_name(log, tmp_path, content, message):
    log()
    (tmp_path / "strange").write_bytes(content)

    with pytest.raises(UserError, match=message):
        tabular.load(tmp_path / "strange", tmp_path / "log.yaml")


def test_parts_of_other_columns_or_forms_are_refused(log, tmp_path):
    log()
    (tmp_path / "parts").mkdir()
    shutil.copy(tmp_path / "log.csv", tmp_path / "parts" / "1")
    (tmp_path / "parts" / "2").write_text("clicked,user\n1,2\n")
    with pytest.raises(
        UserError, match=r"parts/2, line 1: expected the columns of .*parts/1, clicked.* got clicked, user"
    ):
        tabular.load(tmp_path / "parts", tmp_path / "log.yaml")
    pl.DataFrame(COLUMNS).write_parquet(tmp_path / "parts" / "2")
    with pytest.raises(UserError, match="parts: expected files of one form, got CSV and Parquet"):
        tabular.load(tmp_path / "parts", tmp_path / "log.yaml")


def test_an_empty_folder_and_a_glob_of_nothing_are_refused(log, tmp_path):
    log()
    (tmp_path / "parts").mkdir()

    for source, message in ((tmp_path / "parts", "no file in this folder"), (tmp_path / "*.orc", "no such file")):
        with pytest.raises(UserError, match=message):
            tabular.load(source, tmp_path / "log.yaml")
        with pytest.raises(UserError, match="no "):
            prepare(None, source, tmp_path / "out", tmp_path / "log.yaml")


# CSV and its marks.


@pytest.mark.parametrize(("word", "sign"), [("tab", "\t"), ("\\t", "\t"), ("\t", "\t"), (";", ";"), ("|", "|")])
def test_a_delimiter_may_be_named(log, word, sign):
    text = pl.DataFrame(COLUMNS).write_csv(separator=sign)

    assert column(log(text=text, delimiter=word), "title") == COLUMNS["title"]


def test_a_file_of_another_delimiter_says_so(log):
    with pytest.raises(UserError, match=r"no column .*; is the delimiter ';'\?"):
        log(text=pl.DataFrame(COLUMNS).write_csv(separator=";"))


QUOTED = pl.DataFrame(COLUMNS).write_csv().replace("title 1", '5" disc')


def test_a_quote_inside_a_value_is_told_by_its_line_and_may_be_taken_as_it_is(log):
    with pytest.raises(UserError, match=r"log.csv, line 3: expected quotes around .*5\" disc.*`quote: none`"):
        log(text=QUOTED)

    assert column(log(text=QUOTED, quote="none"), "title")[1] == '5" disc'


def test_a_quote_that_is_never_closed_is_told_by_its_line(log):
    text = pl.DataFrame(COLUMNS).write_csv().replace("title 2", '"title 2', 1)

    with pytest.raises(UserError, match=r"log.csv, line 4: expected CSV, .*`quote: none`"):
        log(text=text)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_quotes_commas_and_lines_inside_quotes_are_part_of_the_value(log, line_end, bom):
    titles = cycle('a, "b"', "two\nlines", "plain")
    text = pl.DataFrame(COLUMNS | {"title": titles}).write_csv(line_terminator=line_end, quote_style="necessary")

    read = log(text=bom + text)

    assert column(read, "title") == titles
    assert column(read, "ts") == COLUMNS["at"]


def test_a_value_missing_after_a_record_of_two_lines_is_told(log):
    text = pl.DataFrame(COLUMNS | {"title": cycle("two\nlines")}).write_csv() + "1,u1,ad1\n"

    with pytest.raises(UserError, match=r"line \d+: expected 6 values, got 3"):
        log(text=text)


def test_a_column_may_have_any_name(log):
    table = pl.DataFrame(COLUMNS).rename({"clicked": "Clicked on Ad", "title": "标题", "user_id": "user id"})
    fields = [
        {"name": "title", "kind": "categorical", "group": "item", "column": "标题"},
        {"name": "user_id", "kind": "categorical", "group": "user", "column": "user id"},
    ]

    read = log(text=table.write_csv(), label="Clicked on Ad", user="user id", fields=fields)

    assert column(read, "title") == COLUMNS["title"]
    assert read.spec.user_key == "user_id"


# The YAML.


def test_nothing_in_the_yaml_is_retyped(log, tmp_path):
    pl.DataFrame(COLUMNS | {"on": [n % 2 for n in range(NUM)], "1.10": cycle("007", "7", "on")}).write_csv(
        tmp_path / "log.csv"
    )
    log()
    text = (tmp_path / "log.yaml").read_text().replace("label: clicked", "label: on")
    split = "split: {by: column, column: 1.10, train: 007, valid: 7, test: on}"
    text = text.replace("split:\n  by: time\n  test: 0.2\n  valid: 0.2", split)
    (tmp_path / "log.yaml").write_text(text)

    read = tabular.load(tmp_path / "log.csv", tmp_path / "log.yaml")

    assert column(read, "part") == cycle("train", "valid", "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"timezone": "Peking"},
            "at timezone: expected the name of a time zone, such as Asia/Shanghai or UTC, got 'Peking'",
        ),
        ({"timestamp_format": "iso"}, "at timestamp_format: expected seconds, .* or a form such as"),
        ({"delimiter": "ab"}, "at delimiter: a delimiter is one ASCII sign other than a quote, or tab, got 'ab'"),
        ({"quote": "double"}, "at quote: a quote is one ASCII sign, or none, got 'double'"),
        ({"tables": {"ads": {"path": "ads.csv"}}}, "table ads: `on:` names the log's column that holds its key"),
    ],
)
def test_what_is_wrong_in_the_yaml_says_what_was_expected(log, changes, message):
    with pytest.raises(UserError, match=message):
        log(**changes)


# Tables beside the log.


@pytest.fixture
def star(log, tmp_path):
    """A log of ids alone, and its tables: users in Parquet by number, items in CSV as pandas writes them."""
    users = pl.DataFrame({"id": [0, 1, 2, 9], "age": [20, 30, 40, 50]})
    items = pl.DataFrame({"ad": ["0.0", "1.0", "2.0"], "brand": ["x", "y", "NULL"]})
    users.write_parquet(tmp_path / "users.parquet")
    items.write_csv(tmp_path / "items.tsv", separator="\t")

    def star(tables=None, **columns):
        ids = {"user_id": [n % 3 for n in range(NUM)], "ad_id": [n % 4 for n in range(NUM)]}
        described = {
            "users": {"path": "users.parquet", "key": "id"},
            "items": {"path": "items.tsv", "key": "ad", "delimiter": "tab"},
        }
        fields = [
            {"name": "age", "kind": "numeric", "group": "user"},
            {"name": "brand", "kind": "categorical", "group": "item"},
        ]
        return log(ids | columns, fields=fields, tables=tables or described)

    return star


def test_tables_of_users_and_items_are_joined_by_key(star):
    rows = star().rows.collect()

    assert rows["age"].to_list() == cycle(20.0, 30.0, 40.0)
    assert rows["brand"].to_list() == cycle("x", "y", None, None)


def test_rows_without_a_row_in_a_table_are_counted(star):
    assert any("5 of 20 rows have no items in" in note for note in star().notes)


def test_a_table_that_no_row_refers_to_or_with_a_key_twice_is_refused(star, tmp_path):
    pl.DataFrame({"id": ["u1", "u2"], "age": [1, 2]}).write_parquet(tmp_path / "users.parquet")
    with pytest.raises(
        UserError, match="no row of the log has its user_id in column id; the log has '0', the table 'u1'"
    ):
        star()
    pl.DataFrame({"id": [1, 1], "age": [1, 2]}).write_parquet(tmp_path / "users.parquet")
    with pytest.raises(UserError, match="users.parquet, column id: expected each key once, got 1 again"):
        star()


def test_a_column_in_two_places_needs_to_be_told_which(star):
    with pytest.raises(UserError, match="field age: column age stands in users and in the log; say which by `table:`"):
        star(age=[1] * NUM)


def test_a_described_star_is_prepared(star, tmp_path):
    star()

    about = prepare(None, tmp_path / "log.csv", tmp_path / "out", tmp_path / "log.yaml")

    assert about["num_rows"] == {"train": 12, "valid": 4, "test": 4}
    assert pl.read_parquet(tmp_path / "out" / "raw" / "items.parquet").columns == ["id", "title", "price", "brand"]


# Rows that stand for several, and rows that are not there.


def test_weights_and_the_rate_of_negatives_reach_the_prepared_rows(log, tmp_path):
    weights = [0.5 + n % 3 for n in range(NUM)]
    log({"importance": weights}, weight="importance", negative_rate=0.25)

    about = prepare(None, tmp_path / "log.csv", tmp_path / "out", tmp_path / "log.yaml")
    rows = Prepared.open(tmp_path / "out").rows("train")

    assert about["negative_rate"] == 0.25
    weight_B = rows.take(np.arange(12)).weight_B
    assert rows.weight is not None
    assert rows.represented is not None
    assert weight_B is not None
    assert rows.weight.tolist() == weights[:12]
    assert rows.represented.tolist() == [w if n % 2 else 4 * w for n, w in enumerate(weights[:12])]
    assert weight_B.tolist() == pytest.approx([w / 1.5 for w in weights[:12]])


def test_a_log_without_weights_has_none(log, tmp_path):
    log()
    prepare(None, tmp_path / "log.csv", tmp_path / "out", tmp_path / "log.yaml")

    rows = Prepared.open(tmp_path / "out").rows("train")

    assert (rows.weight, rows.represented, rows.take(np.arange(2)).weight_B) == (None, None, None)


@pytest.mark.parametrize(
    ("columns", "changes", "message"),
    [
        (
            {"importance": cycle(1.0, -1.0)},
            {"weight": "importance"},
            "line 3, column importance: expected finite numbers f",
        ),
        (
            {"importance": cycle(1.0, None)},
            {"weight": "importance"},
            "line 3, column importance: expected finite numbers f",
        ),
        ({}, {"negative_rate": 0}, "at negative_rate: Input should be greater than 0, got '0'"),
        ({}, {"negative_rate": 1.5}, "at negative_rate: Input should be less than or equal to 1"),
        ({}, {"weight": "price"}, "field price: a row's weight is not known when it is scored, drop the field"),
    ],
)
def test_a_weight_that_is_none_is_refused(log, columns, changes, message):
    with pytest.raises(UserError, match=message):
        log(columns, **changes)


# A history that comes with the log.


def past_of(n):
    """Row n's own past, newest last: (item, time, title); every fourth row has none."""
    return [(f"p{n - k}", START + 60 * n - k, "xyz"[3 - k]) for k in range(3, 0, -1)] if n % 4 else []


def brought(log, *, order=1, late=0, **changes):
    """Rows whose histories are not those of the log's clicks."""
    pasts = [past_of(n)[::order] for n in range(NUM)]
    columns: dict[str, Any] = {
        "past": ["|".join(item for item, _, _ in past) for past in pasts],
        "past_at": [[ts + late for _, ts, _ in past] for past in pasts],
        "past_title": ["|".join(title for _, _, title in past) for past in pasts],
    }
    columns["past_at"] = ["|".join(map(str, times)) for times in columns["past_at"]]
    field = {"name": "past_titles", "kind": "sequence", "group": "behaviour", "of": "title"}
    history = {"items": "past", "times": "past_at", "features": {"title": "past_title"}}
    return log(columns, history=history | changes, fields=[field])


@pytest.mark.parametrize("order", [1, -1], ids=["oldest first", "newest first"])
def test_a_history_in_the_log_is_what_each_row_is_encoded_with(log, tmp_path, order):
    brought(log, order=order)
    prepare(None, tmp_path / "log.csv", tmp_path / "out", tmp_path / "log.yaml")
    data = Prepared.open(tmp_path / "out")

    encoder, n = Encoder(data.schema), 0
    for part in PARTS:
        rows = data.rows(part)
        for row in range(len(rows)):
            inputs = rows.take(np.array([row])).inputs
            events = [Event(item=item, ts=ts, features={"title": title}) for item, ts, title in past_of(n)]
            expected = encoder.encode_history(events, START + 60 * n)
            for name, array in expected.items():
                assert inputs[name].numpy().tolist() == array.tolist()
            n += 1
    assert n == NUM


def test_the_newest_history_of_a_user_before_the_test_part_is_what_the_store_is_loaded_with(log, tmp_path):
    brought(log)
    prepare(None, tmp_path / "log.csv", tmp_path / "out", tmp_path / "log.yaml")

    loaded = pl.read_parquet(tmp_path / "out" / "raw" / "behaviours.parquet")

    expected = [(f"u{n % 3}", item, ts) for n in (13, 14, 15) for item, ts, _ in past_of(n)]
    assert sorted(loaded.rows()) == sorted(expected)


def test_golden_requests_carry_the_history_of_the_log(log, tmp_path):
    brought(log)
    prepare(None, tmp_path / "log.csv", tmp_path / "out", tmp_path / "log.yaml")

    requests = Prepared.open(tmp_path / "out").golden_requests()

    for request in requests[:4]:
        n = int(request.ts - START) // 60
        assert [(e.item, e.ts, e.features["title"]) for e in request.behaviours] == past_of(n)


def test_past_items_that_were_not_earlier_than_their_row_are_dropped_and_counted(log):
    read = brought(log, late=2)

    assert read.dropped == {"past items that were not earlier than their row": 2 * 15}
    assert [len(past) for past in column(read, PAST_ITEM)] == [1 if n % 4 else 0 for n in range(NUM)]


def test_without_times_the_order_of_the_list_is_kept(log):
    read = log({"past": cycle("b|a|c|d", "")}, history={"items": "past"})

    assert column(read, PAST_ITEM)[0] == ["a", "c", "d"]
    assert column(read, PAST_TS)[0] == [START - 3, START - 2, START - 1]
    assert any("the k-th newest item of a row stands k seconds before it" in note for note in read.notes)


def test_lists_of_other_lengths_are_refused(log):
    columns = {"past": cycle("a|b"), "past_at": [f"{START - 9}|{START - 8}"] * 4 + [str(START)] * (NUM - 4)}

    with pytest.raises(UserError, match=r"line 6, column past_at: expected as many values as there are in column past"):
        log(columns, history={"items": "past", "times": "past_at"})


def test_a_history_in_the_log_that_no_key_names_is_refused_by_name(log):
    field = {"name": "past", "kind": "sequence", "group": "behaviour", "of": "ad_id"}

    with pytest.raises(UserError, match=r"column past holds a history, .* write `history: {items: past}` to take it"):
        log({"past": cycle("ad1|ad2", "")}, fields=[field])


CLICKS = {"name": "spent", "kind": "numeric", "group": "behaviour"}
OF_DEVICE = [
    {"name": "device", "kind": "categorical", "group": "context"},
    {"name": "devices", "kind": "sequence", "group": "behaviour", "of": "device"},
]


def with_clicks(log, columns, *, features):
    device = {"device": cycle("tv", "phone", "pad")}
    return log(
        device | {"past": cycle("a|b", "")} | columns,
        history={"items": "past", "features": features},
        fields=[CLICKS, *OF_DEVICE],
    )


@pytest.mark.parametrize(
    ("spent", "devices"),
    [("2.50|", "|tv"), ("[2.5, None]", "[NULL, 'tv']"), (" 2.5 |NaN", "NULL| tv")],
)
def test_a_history_in_the_log_says_what_each_click_had_and_what_it_had_not(log, tmp_path, spent, devices):
    with_clicks(
        log,
        {"past_spent": cycle(spent, ""), "past_device": cycle(devices, "")},
        features={"spent": "past_spent", "device": "past_device"},
    )
    prepare(None, tmp_path / "log.csv", tmp_path / "out", tmp_path / "log.yaml")
    data = Prepared.open(tmp_path / "out")
    rows, encoder = data.rows("train"), Encoder(data.schema)
    events = [
        Event(item="a", ts=START - 2.0, features={"spent": 2.5, "device": None}),
        Event(item="b", ts=START - 1.0, features={"device": "tv"}),
    ]

    inputs = rows.take(np.array([0])).inputs

    for name, array in encoder.encode_history(events, START).items():
        np.testing.assert_array_equal(array, inputs[name].numpy(), err_msg=name)
    assert data.schema.field("spent").shift == 2.5  # the one number that the past clicks of the training part have


def test_a_whole_column_of_nothing_is_absent_at_every_past_click(log):
    read = with_clicks(
        log,
        {"past_spent": cycle(None), "past_device": cycle("tv|tv", "")},
        features={"spent": "past_spent", "device": "past_device"},
    )

    assert column(read, past_name("spent"))[:2] == [[None, None], []]


@pytest.mark.parametrize(
    ("columns", "features", "message"),
    [
        (
            {"s": cycle("1|much", "")},
            {"spent": "s", "device": "past"},
            "line 2, column s: expected a list of finite",
        ),
        ({"s": cycle("1|2|3", "")}, {"spent": "s", "device": "past"}, "line 2, column s: expected as many values as"),
        ({}, {"device": "past"}, "history: features names no column of spent, which no item has"),
        ({}, {"spent": "past"}, "history: features names no column of device, which no item has"),
        ({}, {"spent": "past", "device": "past", "user_id": "past"}, "history: user_id is no item field and no field"),
    ],
)
def test_a_history_that_does_not_say_what_its_clicks_had_is_refused(log, columns, features, message):
    with pytest.raises(UserError, match=message):
        with_clicks(log, columns, features=features)
