"""Avazu's file as it is given."""

import gzip
from datetime import UTC, datetime

import numpy as np
import pytest

from models.features.field import FIRST
from tests.shared_data import real
from training.data.prepare import prepare
from training.datasets import avazu
from training.datasets.avazu import AvazuOptions
from training.errors import UserError

HEADER = ("id", "click", "hour", *avazu.CONTEXT, *avazu.ITEM)


def text(num=600):
    rng = np.random.default_rng(3)
    rows = []
    for row in range(num):
        codes = (f"{value:x}" for value in rng.integers(5, size=21))
        rows.append([str(10**18 + row), str(int(rng.random() < 0.3)), f"141021{row * 24 // num:02}", *codes])
    return [",".join(HEADER), *(",".join(row) for row in rows)]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "train.csv").write_text("\n".join(text()) + "\n")
    return tmp_path


def test_a_file_becomes_a_log_row_by_row(source):
    rows = avazu.load(source).rows.collect()

    for row, line in zip(rows.iter_rows(named=True), text()[1:], strict=True):
        _, click, hour, *cells = line.split(",")
        moment = datetime.strptime(hour, "%y%m%d%H").replace(tzinfo=UTC)
        assert (row["label"], row["ts"]) == (int(click), moment.timestamp())
        assert [row[name] for name in HEADER[3:]] == cells


def test_there_are_21_fields_and_a_clock_when_asked_for(source):
    assert len(avazu.load(source).spec.fields) == 21
    names = {f.name for f in avazu.load(source, AvazuOptions(clock=True)).spec.fields}
    assert names == {*avazu.CONTEXT, *avazu.ITEM, "hour_of_day", "weekday"}


def test_hour_and_weekday_come_from_the_row(source, tmp_path):
    prepare("avazu", source, tmp_path / "out", settings=["clock=true", "min_count=2"])

    hours = np.concatenate(
        [np.load(tmp_path / "out" / part / "ctx.hour_of_day.npy") for part in ("train", "valid", "test")]
    )
    weekdays = np.load(tmp_path / "out" / "train" / "ctx.weekday.npy")

    assert sorted(hours - FIRST) == [row * 24 // 600 for row in range(600)]
    assert set(weekdays - FIRST) == {1}  # 2014-10-21 was a Tuesday


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,0,14102199" + ",a" * 21, "line 11, column hour: expected a time as YYMMDDHH, got '14102199'"),
        ("1,0,14023010" + ",a" * 21, "line 11: expected a time that there is in column hour, got '14023010'"),
        ("1,0,14102100" + ",a" * 20, "line 11: expected 24 values, got 23"),
        ("1,yes,14102100" + ",a" * 21, "line 11, column click: expected 0 or 1, got 'yes'"),
    ],
)
def test_a_wrong_line_is_named(source, line, message):
    lines = text()
    lines[10] = line
    (source / "train.csv").write_text("\n".join(lines) + "\n")

    with pytest.raises(UserError, match=message):
        avazu.load(source)


def test_a_file_of_other_columns_or_without_rows_is_refused(source):
    (source / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="line 1: expected a header with 'click,hour,"):
        avazu.load(source)
    (source / "train.csv").write_text(text()[0] + "\n")
    with pytest.raises(UserError, match="expected rows below the header"):
        avazu.load(source)


def test_the_real_sample_is_prepared(tmp_path):
    about = prepare("avazu", real("avazu_sample") / "kaggle_tr.rx.csv", tmp_path / "out", settings=["min_count=2"])

    assert sum(about["num_rows"].values()) == 2994


def test_a_large_gzip_file_that_was_cut_off_is_told_by_its_name(tmp_path):
    """What is missing is met long after the first lines."""
    packed = gzip.compress("\n".join(text(60_000)).encode())
    (tmp_path / "train.gz").write_bytes(packed[: len(packed) * 2 // 3])

    with pytest.raises(UserError, match=r"train.gz: expected text in UTF-8, whole to the end"):
        avazu.load(tmp_path)


def test_digits_of_other_scripts_are_no_digits(tmp_path):
    written = "\n".join(text(2)).replace(",141021", ",14102\u0661", 1)
    (tmp_path / "train.csv").write_text(written)

    with pytest.raises(UserError, match=r"train.csv, line 2, column hour: expected a time"):
        avazu.load(tmp_path)
