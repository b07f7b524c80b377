"""MovieLens tags, from either form of its files to a log."""

import polars as pl
import pytest

from training.data.prepare import prepare
from training.datasets import movielens_tag
from training.errors import UserError

ROWS = [(1, 0, 1, 2), (0, 0, 1, 7), (1, 3, 4, 2), (0, 3, 4, 5)]


def write_csv(folder):
    for name in movielens_tag.FORMS[0]:
        (folder / name).write_text("label,user_id,item_id,tag_id\n" + "".join("{},{},{},{}\n".format(*r) for r in ROWS))


def write_libfm(folder, prefix):
    for part in ("train", "validation", "test"):
        lines = [f"{'1' if label else '-1'} {user}:1 {item}:1 {tag}:1\n" for label, user, item, tag in ROWS]
        (folder / f"{prefix}.{part}.libfm").write_text("".join(lines))


@pytest.fixture
def source(tmp_path):
    write_csv(tmp_path)
    return tmp_path


def test_every_row_is_a_request_of_its_own_in_the_given_split(source):
    rows = movielens_tag.load(source).rows.collect()

    assert rows["part"].to_list() == ["train"] * 4 + ["valid"] * 4 + ["test"] * 4
    assert rows["ts"].to_list() == list(range(12))
    assert rows.select("label", "user", "item_id", "item").rows() == [
        (label, str(user), str(item), str(tag)) for label, user, item, tag in ROWS * 3
    ]


@pytest.mark.parametrize("prefix", ["ml-tag", "ml"])
def test_both_forms_hold_the_same_log(source, tmp_path, prefix):
    folder = tmp_path / "libfm"
    folder.mkdir()
    write_libfm(folder, prefix)

    assert movielens_tag.load(folder).rows.collect().equals(movielens_tag.load(source).rows.collect())


def test_another_number_of_rows_than_the_published_split_is_noted(source, monkeypatch):
    monkeypatch.setattr(movielens_tag, "NUM_ROWS", {"train": 4, "valid": 4, "test": 5})

    assert movielens_tag.load(source).notes == ("test.csv: 4 rows, where the published split has 5",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("label,user_id,item_id,tag_id\n1,0,1,2\n0,0,1\n", r"valid.csv, line 3: expected 4 values, got 3"),
        ("label,user_id,item_id,tag_id\n1,0,1,2,3\n", r"valid.csv, line 2: expected 4 values, got 5"),
        ("label,user_id,item_id,tag_id\n2,0,1,2\n", r"valid.csv, line 2, column label: expected 0 or 1, got '2'"),
        ("label,user_id,item_id,tag_id\n1,0,,2\n", r"valid.csv, line 2, column item_id: expected a number, got ''"),
        ("label,user_id,item_id,tag_id\n1,0,1,2\n\n1,0,1,3\n", r"valid.csv, line 3: expected 4 values, got 1"),
        ("user_id,item_id,label\n0,1,1\n", r"valid.csv, line 1: expected a header with 'label,user_id,item_id,tag_id'"),
        ("label,user_id,item_id,tag_id\n", r"valid.csv: expected rows below the header"),
        ("", r"valid.csv, line 1: expected a row, got an empty file"),
    ],
)
def test_a_damaged_file_is_told_by_line(source, content, message):
    (source / "valid.csv").write_text(content)

    with pytest.raises(UserError, match=message):
        movielens_tag.load(source)


def test_what_is_no_text_is_told(source):
    (source / "test.csv").write_bytes(b"label,user_id,item_id,tag_id\n1,0,1,2\n1,0,\xff,3\n")

    with pytest.raises(UserError, match=r"test.csv: expected text in UTF-8"):
        movielens_tag.load(source)


def test_a_damaged_libfm_line_is_told(tmp_path):
    write_libfm(tmp_path, "ml-tag")
    (tmp_path / "ml-tag.test.libfm").write_text("1 0:1 1:1 2:1\n-1 0:1 1:2 2:1\n")

    with pytest.raises(UserError, match=r"ml-tag.test.libfm, line 2, column item_id: expected id:1, got '1:2'"):
        movielens_tag.load(tmp_path)


def test_a_folder_without_the_split_is_told_what_is_missing(source, tmp_path):
    with pytest.raises(UserError, match=r"expected a folder with train.csv or ml-tag.train.libfm or ml.train.libfm"):
        movielens_tag.load(tmp_path / "nowhere")
    (source / "test.csv").unlink()
    with pytest.raises(UserError, match=r"test.csv: no such file"):
        movielens_tag.load(source)


def test_it_is_prepared_from_end_to_end(source, tmp_path):
    about = prepare("movielens-tag", source, tmp_path / "prepared")

    assert about["num_rows"] == {"train": 4, "valid": 4, "test": 4}
    assert (about["num_users"], about["num_items"], about["num_events"]) == (2, 3, 0)
    assert pl.read_parquet(tmp_path / "prepared" / "raw" / "test.parquet")["item_id"].to_list() == ["1", "1", "4", "4"]
