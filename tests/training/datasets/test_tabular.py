"""Any CSV or Parquet file with a schema YAML."""

import re
import shlex
import textwrap
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from models.features.values import NULL_VALUES
from training.__main__ import main
from training.data.prepare import prepare
from training.datasets import tabular
from training.datasets.description import (
    ByColumn,
    ByFiles,
    ByHash,
    ByTime,
    Description,
    FieldForm,
    HistoryForm,
    TableForm,
)
from training.datasets.times import NUMBER_FORMS
from training.errors import UserError

FIELDS = [
    {"name": "who", "kind": "categorical", "group": "user"},
    {"name": "hour", "kind": "time", "group": "context", "part": "hour"},
    {"name": "ad", "kind": "categorical", "group": "item"},
    {"name": "price", "kind": "numeric", "group": "item"},
    {"name": "tags", "kind": "multi", "group": "item"},
    {"name": "ad", "kind": "sequence", "group": "behaviour", "of": "ad"},
]
DESCRIPTION = {
    "label": "click", "user": "who", "item": "ad", "timestamp": "at", "history_length": 3,
    "split": {"by": "time", "valid": 0.2, "test": 0.2}, "fields": FIELDS,
}  # fmt: skip
START = 1_700_000_000
TIMES = [START, START + 1]
AT = "column at: expected Unix seconds from 1990 on or an ISO 8601 time"
CSV = "who,at,ad,price,tags,click\n" + "".join(
    f"u{i % 3},{START + 100 * i},0{i % 4},{i or ''},{'a|b' if i % 2 else ''},{i % 2}\n" for i in range(10)
)


@pytest.fixture
def load(tmp_path):
    def load(csv=CSV, **changes):
        (tmp_path / "log.csv").write_text(csv)
        described = {name: value for name, value in (DESCRIPTION | changes).items() if value is not None}
        (tmp_path / "log.yaml").write_text(yaml.safe_dump(described))
        return tabular.load(tmp_path / "log.csv", tmp_path / "log.yaml")

    return load


def test_a_csv_file_becomes_a_log(load):
    log = load()

    assert log.name == "log"
    assert log.spec.user_key == "who"
    assert log.spec.item_key == "ad"
    assert log.rows.collect().row(0, named=True) == {
        "label": 0, "ts": 1.7e9, "user": "u0", "item": "00", "price": None, "tags": [], "part": "train",
    }  # fmt: skip
    assert log.rows.collect()["tags"][1].to_list() == ["a", "b"]
    assert log.rows.collect()["part"].to_list() == ["train"] * 6 + ["valid"] * 2 + ["test"] * 2


def test_a_parquet_file_says_the_same_as_its_csv_twin(load, tmp_path):
    from_csv = load()
    parquet = from_csv.rows.collect().select(
        pl.col("label").cast(pl.Boolean).alias("click"),
        pl.from_epoch("ts").alias("at"),
        pl.col("user").alias("who"),
        pl.col("item").alias("ad"),
        "price",
        "tags",
    )
    parquet.write_parquet(tmp_path / "log.parquet")

    from_parquet = tabular.load(tmp_path / "log.parquet", tmp_path / "log.yaml")

    assert from_parquet.rows.collect().equals(from_csv.rows.collect())


def test_numbers_as_ids_have_one_spelling_in_every_file(load, tmp_path):
    load(split={"by": "hash", "of": "who"})
    table = pl.DataFrame(
        {
            "who": [1.0, 2.0],
            "at": [START, START + 1],
            "ad": [7, None],
            "price": [1, 2],
            "tags": [[1.0], None],
            "click": [0, 1],
        }
    )
    table.write_parquet(tmp_path / "log.parquet")

    rows = tabular.load(tmp_path / "log.parquet", tmp_path / "log.yaml").rows.collect()

    assert rows["user"].to_list() == ["1", "2"]
    assert rows["item"].to_list() == ["7", None]
    assert rows["tags"].to_list() == [["1"], []]


def test_a_described_file_is_prepared_like_any_data_set(load, tmp_path):
    load()

    about = prepare(None, tmp_path / "log.csv", tmp_path / "out", tmp_path / "log.yaml")

    assert about["num_rows"] == {"train": 6, "valid": 2, "test": 2}
    assert about["num_events"] == 5


@pytest.mark.parametrize("order", [1, -1], ids=["in time order", "backwards"])
def test_fields_may_have_any_names_that_are_not_reserved(load, tmp_path, order):
    names = ["row", "first", "number", "len", "count", "place", "bucket"]
    head, *lines = CSV.splitlines()
    csv = [",".join([head, *names]), *[line + f",{n}" * len(names) for n, line in enumerate(lines)][::order]]
    load("\n".join(csv), fields=[*FIELDS, *({"name": n, "kind": "numeric", "group": "item"} for n in names)])

    about = prepare(None, tmp_path / "log.csv", tmp_path / "out", tmp_path / "log.yaml")

    assert about["num_rows"] == {"train": 6, "valid": 2, "test": 2}
    items = pl.read_parquet(tmp_path / "out" / "raw" / "items.parquet")  # before the test part: rows 4 to 7
    assert all(items.sort("id")[name].to_list() == [4, 5, 6, 7] for name in names)


def test_features_that_change_are_loaded_as_they_were_before_the_test_part(load, tmp_path):
    load()  # an item's price is the number of its row

    prepare(None, tmp_path / "log.csv", tmp_path / "out", tmp_path / "log.yaml")
    items = pl.read_parquet(tmp_path / "out" / "raw" / "items.parquet")

    assert dict(items.select("id", "price").rows()) == {"00": 4.0, "01": 5.0, "02": 6.0, "03": 7.0}


def test_of_an_item_that_only_the_test_part_has_the_first_features_are_loaded(load, tmp_path):
    load(CSV.replace("800,00,8", "800,new,8").replace("900,01,9", "900,new,9"))

    prepare(None, tmp_path / "log.csv", tmp_path / "out", tmp_path / "log.yaml")
    items = pl.read_parquet(tmp_path / "out" / "raw" / "items.parquet")

    assert items.filter(pl.col("id") == "new")["price"].to_list() == [8.0]


def test_times_may_be_seconds_or_iso_8601(load):
    at = {
        "1700000100": "2023-11-14T22:15:00Z",
        "1700000200": "2023-11-14 22:16:40",
        "1700000300": "2023-11-14T23:18:20+01:00",
        "1700000400": "1700000400.0",
    }
    csv = "\n".join(",".join(at.get(cell, cell) for cell in line.split(",")) for line in CSV.splitlines()) + "\n"

    assert load(csv).rows.collect()["ts"].to_list() == load().rows.collect()["ts"].to_list()


def test_rows_of_one_user_stay_together_in_a_split_by_hash(load):
    csv = "who,ad,price,tags,click\n" + "".join(f"u{i % 200},a,1,,{i % 2}\n" for i in range(600))
    split = {"by": "hash", "valid": 0.2, "test": 0.3, "of": "who", "seed": 1}
    fields = [f for f in FIELDS if f["kind"] not in ("time", "sequence")]

    rows = load(csv, split=split, timestamp=None, history_length=0, fields=fields).rows.collect()

    assert rows.group_by("user").agg(pl.col("part").n_unique())["part"].max() == 1
    shares = dict(rows["part"].value_counts(normalize=True).rows())
    assert shares["valid"] == pytest.approx(0.2, abs=0.1)
    assert shares["test"] == pytest.approx(0.3, abs=0.1)
    assert rows["ts"].to_list() == list(range(600))


def test_a_split_by_hash_is_the_same_in_every_run_and_follows_the_seed(load):
    by = {"by": "hash", "valid": 0.3, "test": 0.3}

    parts = [load(split=by | {"seed": seed}).rows.collect()["part"].to_list() for seed in (1, 1, 2)]

    assert parts[0] == parts[1] != parts[2]
    assert parts[0] == ["valid", "valid", "train", "train", "train", "valid", "train", "test", "test", "test"]


def test_a_column_may_hold_the_split(load):
    csv = CSV.replace("click\n", "click,fold\n", 1).replace("\n", ",a\n").replace("fold,a\n", "fold\n")
    csv = csv.replace("u1,1700000400,00,4,,0,a", "u1,1700000400,00,4,,0,b").replace(
        "u2,1700000500,01,5,a|b,1,a", "u2,1700000500,01,5,a|b,1,c"
    )
    split = {"by": "column", "column": "fold", "train": "a", "valid": "b", "test": "c"}

    assert load(csv, split=split).rows.collect()["part"].to_list() == ["train"] * 4 + ["valid", "test"] + ["train"] * 4
    with pytest.raises(UserError, match=r"log.csv, column fold: expected one of 'a', 'b', 'd', got 'c'"):
        load(csv, split=split | {"test": "d"})


def test_three_files_may_be_the_split(load, tmp_path):
    for number in (1, 2, 3):
        (tmp_path / f"{number}.csv").write_text(CSV)
    described = DESCRIPTION | {"split": {"by": "files", "train": "1.csv", "valid": "2.csv", "test": "3.csv"}}
    (tmp_path / "log.yaml").write_text(yaml.safe_dump(described))

    log = tabular.load(tmp_path, tmp_path / "log.yaml")

    assert log.rows.collect()["part"].to_list() == ["train"] * 10 + ["valid"] * 10 + ["test"] * 10
    assert [f.name for f in log.files] == ["1.csv", "2.csv", "3.csv", "log.yaml"]


LINE_5 = "u0,1700000300,03,3,a|b,1\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (LINE_5, "u0,1700000300,03\n", r"log.csv, line 5: expected 6 values, got 3"),
        (LINE_5, "u0,1700000300,03,3,a|b,1,9\n", r"log.csv, line 5: expected 6 values, got 7"),
        (LINE_5, "\n", r"log.csv, line 5: expected 6 values, got 0"),
        (LINE_5, 'u0,1700000300,"03,3,a|b,1\n', r"log.csv, line \d+: expected CSV"),
        (LINE_5, "u0,1700000300,03,3,a|b,2\n", r"log.csv, line 5, column click: expected 0 or 1, got '2'"),
        (LINE_5, "u0,1700000300,03,3,a|b,\n", r"log.csv, line 5, column click: expected 0 or 1, got None"),
        (
            LINE_5,
            "u0,1700000300,03,dear,a|b,1\n",
            r"line 5, column price: expected finite numbers, got 'dear'",
        ),
        (LINE_5, "u0,1700000300,03,inf,a|b,1\n", r"log.csv, line 5, column price: expected finite numbers, got 'inf'"),
        (
            LINE_5,
            "u0,noon,03,3,a|b,1\n",
            f"line 5, {AT}, got 'noon'",
        ),
        (LINE_5, "u0,1795000000000,03,3,a|b,1\n", r"line 5, column at: expected Unix seconds"),
        (LINE_5, "u0,nan,03,3,a|b,1\n", r"line 5, column at: expected Unix seconds"),
        (LINE_5, "u0,,03,3,a|b,1\n", r"line 5, column at: expected Unix seconds .* got None"),
        (CSV, "", r"log.csv: expected rows, the file holds none"),
        (CSV, "who,at,ad,price,tags,click\n", r"log.csv: expected rows, the file holds none"),
        ("price", "ad", r"log.csv: expected different column names, got 'ad' more than once"),
        ("price", "cost", r"log.csv: no column price; there are who, at, ad, cost, tags, click"),
    ],
)
def test_what_is_wrong_in_a_csv_file_is_told_by_line_and_column(load, old, new, message):
    assert old in CSV

    with pytest.raises(UserError, match=message):
        load(CSV.replace(old, new, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": None}, r"log.yaml, at label: Field required"),
        (
            {"fields": [FIELDS[0], FIELDS[5]]},
            r"field ad: a sequence of ad needs the field \{name: ad, kind: categorical, group: item\} too",
        ),
        ({"laber": "x"}, r"log.yaml, at laber: Extra inputs are not permitted, got 'x'"),
        ({"split": {"by": "moon"}}, r"log.yaml, at split: .*'moon'"),
        ({"split": {"by": "time", "valid": 0.5, "test": 0.5}}, r"valid and test leave no rows to train on"),
        ({"split": {"by": "time", "valid": 2}}, r"log.yaml, at split.time.valid: .*less than 1, got '2'"),
        ({"label": "price"}, r"field price: the label is what a model is to predict"),
        ({"delimiter": "\u00a7"}, r"log.yaml, at delimiter: .* got '\u00a7'"),
        ({"timestamp": None}, r"a history needs the columns of user, item and timestamp"),
        ({"timestamp": None, "history_length": 0, "fields": FIELDS[:2]}, r"need the column of the timestamp"),
        (
            {"history_length": 0, "fields": [{"name": "ts", "kind": "numeric", "group": "item"}]},
            r"field ts: this name has a meaning of its own",
        ),
        ({"fields": [*FIELDS, FIELDS[3]]}, r"field names must differ, price is declared more than once"),
        ({"fields": [{"name": "who", "kind": "word", "group": "user"}]}, r"log.yaml, at fields.0.kind: .* got 'word'"),
    ],
)
def test_what_is_wrong_in_the_yaml_is_told_by_its_place(load, changes, message):
    with pytest.raises(UserError, match=message):
        load(**changes)


def test_files_that_are_not_what_they_are_called_are_refused(load, tmp_path):
    load()
    (tmp_path / "log.parquet").write_text("no parquet")
    (tmp_path / "latin.csv").write_bytes("who,at\né,1\n".encode("latin-1"))
    (tmp_path / "bad.yaml").write_text("label: [")
    (tmp_path / "deep.yaml").write_text("[" * 3000)

    for source, described, message in (
        ("log.parquet", "log.yaml", r"log.parquet: expected a Parquet file"),
        ("latin.csv", "log.yaml", r"latin.csv, line 2: expected a CSV file in UTF-8"),
        ("nothing.csv", "log.yaml", r"nothing.csv: no such file"),
        ("log.csv", "bad.yaml", r"bad.yaml: expected YAML, .*line 1"),
        ("log.csv", "deep.yaml", r"deep.yaml: expected YAML, "),
        ("log.csv", "none.yaml", r"none.yaml: unreadable"),
    ):
        with pytest.raises(UserError, match=message):
            tabular.load(tmp_path / source, tmp_path / described)


def test_a_value_of_the_wrong_kind_in_a_parquet_file_is_told_by_row(load, tmp_path):
    load()
    day = datetime(2026, 1, 5, tzinfo=UTC)
    table = pl.DataFrame(
        {
            "who": ["a", "b"],
            "at": [START, START + 1],
            "ad": [day, day],
            "price": [1, 2],
            "tags": [[], []],
            "click": [0, 1],
        }
    )
    table.write_parquet(tmp_path / "log.parquet")

    with pytest.raises(UserError, match=r"log.parquet, row 1, column ad: expected strings or numbers, got datetime"):
        tabular.load(tmp_path / "log.parquet", tmp_path / "log.yaml")


def example(path):
    """The YAML of the module's docstring, and a CSV file with the columns that it names."""
    block = tabular.__doc__.partition("\n\n")[2].partition("\n\n")[0]
    (path / "example.yaml").write_text(textwrap.dedent(block))
    rng = np.random.default_rng(1)
    num = 400
    columns = {
        "clicked": rng.integers(2, size=num),
        "user_id": rng.integers(20, size=num),
        "ad_id": rng.integers(9, size=num),
        "price, EUR": rng.random(num).round(2),
        "at": [str(datetime(2026, 11, 1, 8) + timedelta(minutes=n)) for n in range(num)],  # noqa: DTZ001 - local
    }
    pl.DataFrame(columns).write_csv(path / "clicks.csv")


def test_the_documented_example_is_prepared_and_the_command_that_follows_trains(tmp_path, monkeypatch, capsys):
    example(tmp_path)
    monkeypatch.chdir(tmp_path)

    assert main(["prepare", "--schema", "example.yaml", "--source", "clicks.csv", "--out", "data"]) == 0
    command = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert command.startswith("next: python -m training train mian --data data --out RUN")
    words = shlex.split(command.removeprefix("next: python -m training "))
    assert main([*words, "--set", "max_epochs=1"]) == 0


def test_a_log_without_context_is_told_to_train_a_model_without_it(tmp_path, monkeypatch, capsys):
    example(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = (tmp_path / "example.yaml").read_text()
    (tmp_path / "example.yaml").write_text("".join(line for line in text.splitlines(True) if "hour" not in line))

    assert main(["prepare", "--schema", "example.yaml", "--source", "clicks.csv", "--out", "data"]) == 0
    told = capsys.readouterr()

    assert told.out.rstrip().endswith("train mian --data data --out RUN --set model.icim=false")
    assert "mian with model.icim=false: the data have no fields for what that leaves out" in told.err
    words = shlex.split(told.out.rstrip().splitlines()[-1].removeprefix("next: python -m training "))
    assert main([*words, "max_epochs=1"]) == 0


def documented_keys(page):
    """The words in code type that begin the rows of the page's tables."""
    firsts = [row.split("|")[1] for row in page.splitlines() if row.startswith("| `")]
    return {key for first in firsts for key in re.findall(r"`(\w+)`", first)}


def test_every_key_of_the_yaml_is_documented_and_no_other():
    page = (Path(__file__).parents[3] / "docs" / "own_data.md").read_text("utf-8")
    keys = documented_keys(page)

    assert keys == set(Description.model_fields) | set(FieldForm.model_fields)
    for form in (TableForm, HistoryForm, ByTime, ByHash, ByColumn, ByFiles):
        assert all(key in page for key in form.model_fields)
    for value in NULL_VALUES[1:]:
        assert f"`{value}`" in page
    assert all(words in page for words in NUMBER_FORMS)
