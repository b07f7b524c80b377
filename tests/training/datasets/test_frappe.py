"""Frappe, from its libfm files to a log."""

import polars as pl
import pytest

from tests.shared_data import real
from training.datasets import frappe
from training.errors import UserError

LINE = "{} 0:1 957:1 5039:1 5046:1 5053:1 5055:1 5058:1 5060:1 5069:1 5149:1\n"


@pytest.fixture
def source(tmp_path):
    for name, _ in frappe.FILES.values():
        (tmp_path / name).write_text(LINE.format("1") + LINE.format("-1"))
    return tmp_path


def test_every_row_is_a_request_of_its_own_in_the_given_split(source):
    log = frappe.load(source)

    assert log.rows.collect()["label"].to_list() == [1, 0] * 3
    assert log.rows.collect()["part"].to_list() == ["train", "train", "valid", "valid", "test", "test"]
    assert log.rows.collect()["ts"].to_list() == [0, 1, 2, 3, 4, 5]
    assert log.rows.collect().row(0, named=True)["daytime"] == "5039"


def test_ids_become_words_where_the_vocabulary_is_there(source):
    folder = source / "nfm"
    folder.mkdir()
    for name, _ in frappe.FILES.values():
        (source / name).rename(folder / name)
    ids = LINE.replace("{} ", "").replace(":1", "").split()
    words = ["u", "i", "morning", "sunday", "weekend", "home", "free", "sunny", "Peru", "369"]
    vocabulary = pl.DataFrame({"feature_id": ids, "field": list(frappe.FIELDS), "raw_value": words})
    vocabulary.write_csv(source / "feature_vocab.csv")

    rows = frappe.load(source).rows.collect()

    assert rows.select(*frappe.FIELDS).row(0) == tuple(words)


def test_an_id_the_vocabulary_does_not_name_is_refused(source):
    (source / "feature_vocab.csv").write_text("feature_id,field,raw_value\n0,user,u\n957,item,i\n")

    with pytest.raises(UserError, match=r"feature_vocab.csv: names no daytime 5039, which the split holds"):
        frappe.load(source)


def test_other_files_than_the_known_ones_are_noted_not_refused(source):
    notes = frappe.load(source).notes

    assert len(notes) == 3
    assert notes[0].startswith("frappe.train.libfm: MD5 ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            LINE.format("1") + "-1 0:1 957:1",
            r"frappe.test.libfm, line 2: expected 1 or -1 and 10 times id:1, got '-1 0:1 957:1'",
        ),
        (LINE.format("2"), r"frappe.test.libfm, line 1: expected 1 or -1"),
        (LINE.format("1").replace("0:1", "0:2", 1), r"frappe.test.libfm, line 1"),
        ("", r"frappe.test.libfm, line 1: .*an empty file"),
    ],
)
def test_a_damaged_line_is_told(source, content, message):
    (source / "frappe.test.libfm").write_text(content)

    with pytest.raises(UserError, match=message):
        frappe.load(source)


def test_a_folder_without_the_split_is_told_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"frappe.train.libfm: no such file; expected frappe.train.libfm, "):
        frappe.load(tmp_path)


def test_the_real_data_are_the_known_files_in_words():
    log = frappe.load(real("frappe"))

    sizes = dict(log.rows.collect()["part"].value_counts().rows())
    assert log.notes == ()
    assert sizes == {"train": 202_027, "valid": 57_722, "test": 28_860}
    assert log.rows.collect()["label"].sum() == 96_203
    assert set(log.rows.collect()["weather"].unique()) >= {"sunny", "cloudy", "snowy"}


def test_cost_is_not_the_apps_own():
    rows = frappe.load(real("frappe")).rows.collect()

    costs = rows.group_by("item").agg(
        among_clicks=pl.col("cost").filter(pl.col("label") == 1).n_unique(), among_all=pl.col("cost").n_unique()
    )

    assert costs["among_clicks"].max() == 1
    assert costs["among_all"].max() == 2
