"""The page at the end of `prepare`: figures a reader can check by hand, and warnings that name column and remedy."""

import json

import numpy as np
import polars as pl
import pytest
import yaml

from training.__main__ import main
from training.data.prepare import prepare

START, NUM = 1_700_000_000, 100
COLUMNS = {
    "clicked": [int(n % 4 == 0) for n in range(NUM)],
    "user_id": [f"u{n % 5}" for n in range(NUM)],
    "ad_id": [f"ad{n % 4}" if n < 80 else f"new{n % 4}" for n in range(NUM)],
    "title": [None if n % 5 < 3 else "a" for n in range(NUM)],
    "price": [-999999999.0 if n % 10 == 0 else float(n % 17) for n in range(NUM)],
    "age": [float(n % 7) for n in range(NUM)],
    "bid": [1e12 if n == 7 else float(n % 17) for n in range(NUM)],
    "at": [START + 60 * n for n in range(NUM)],
    "comment": ["?"] * NUM,
}
FIELDS = [
    {"name": "user_id", "kind": "categorical", "group": "user"},
    {"name": "ad_id", "kind": "categorical", "group": "item"},
    {"name": "title", "kind": "categorical", "group": "item"},
    {"name": "price", "kind": "numeric", "group": "item"},
    {"name": "age", "kind": "numeric", "group": "user"},
    {"name": "bid", "kind": "numeric", "group": "item", "clip": False},
]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    pl.DataFrame(COLUMNS).write_csv(folder / "log.csv")
    split = {"by": "time", "valid": 0.1, "test": 0.1}
    described = {"label": "clicked", "user": "user_id", "item": "ad_id", "timestamp": "at", "split": split}
    (folder / "log.yaml").write_text(yaml.safe_dump(described | {"fields": FIELDS}))
    prepare(None, folder / "log.csv", folder / "out", folder / "log.yaml")
    return folder / "out"


@pytest.fixture(scope="module")
def about(out):
    return json.loads((out / "data.json").read_bytes())


def test_each_part_has_its_rows_times_and_click_rate(about):
    assert about["rows"] == NUM
    assert about["parts"]["train"] == {"rows": 80, "click_rate": 0.25, "first": START, "last": START + 79 * 60}
    assert [about["parts"][part]["rows"] for part in ("valid", "test")] == [10, 10]


def test_each_column_has_its_values_gaps_and_unknowns(about):
    columns = about["columns"]

    assert columns["title"]["missing"] == pytest.approx(0.6)
    assert columns["ad_id"]["unknown_at_test"] == 1.0
    assert columns["user_id"] == {"missing": 0.0, "unknown_at_test": 0.0, "different": 5}
    assert columns["age"]["different"] == 7
    assert columns["price"]["usual_cut_value"] == -999999999.0
    assert columns["price"]["usual_cut_share"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("title", "60% of its values are missing"),
        ("title", "has one value in the training part; leave it out"),
        ("ad_id", "100% of the test part's values were never seen in training"),
        ("price", "far from the rest and cut (-1e+09 is 10.0% of all); if that stands for nothing, name it"),
        ("bid", "99% of its numbers, different ones, are nearly one on its scale; try `transform: log` or `quantile`"),
    ],
)
def test_a_warning_names_the_column_and_the_remedy(about, out, column, words):
    found = [text for text in about["warnings"] if text.startswith(f"column {column}: ") and words in text]

    assert len(found) == 1
    assert found[0] in (out / "data.txt").read_text()


def test_a_column_in_order_has_no_warning(about):
    assert not [text for text in about["warnings"] if "column age" in text or "column user_id" in text]


def test_columns_that_no_field_reads_are_named(about, out):
    assert about["unread_columns"] == ["comment"]
    assert "columns that no field reads:\n  comment" in (out / "data.txt").read_text()


def test_the_rate_over_time_is_that_of_all_rows_and_is_drawn(about, out):
    bins = about["label_rate_over_time"]

    assert sum(bins["rows"]) == NUM
    assert np.dot(bins["rows"], bins["click_rate"]) == pytest.approx(25)
    assert (out / "data.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_ends_prepare_and_a_log_without_times_has_one_too(tmp_path, capsys):
    pl.DataFrame(COLUMNS).write_parquet(tmp_path / "log.parquet")
    described = {"label": "clicked", "split": {"by": "hash"}, "fields": FIELDS}
    (tmp_path / "log.yaml").write_text(yaml.safe_dump(described))

    log = ["--schema", str(tmp_path / "log.yaml"), "--source", str(tmp_path / "log.parquet")]
    code = main(["prepare", *log, "--out", str(tmp_path / "out")])

    assert code == 0
    told = capsys.readouterr().out
    assert "log: 100 rows" in told
    assert told.rstrip().splitlines()[-1].startswith("next: python -m training train stec --data")
