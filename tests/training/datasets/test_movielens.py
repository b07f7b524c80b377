"""MovieLens-1M, from its files to a log."""

from datetime import UTC, datetime

import polars as pl
import pytest

from tests.shared_data import real
from training.datasets import movielens
from training.errors import UserError


@pytest.fixture
def source(tmp_path):
    movies = "1::Toy Story (1995)::Animation|Children's\n2::Léon: The Professional (1994)::Crime\n"
    (tmp_path / "movies.dat").write_bytes(movies.encode("latin-1"))
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::V1B-2\n")
    ratings = [(1, 1, 3, 700), (1, 2, 4, 600), (2, 1, 5, 600), (2, 2, 1, 800), (1, 1, 2, 900)]
    (tmp_path / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in ratings))
    return tmp_path


def test_a_rating_of_four_or_more_is_a_click(source):
    log = movielens.load(source)

    assert log.rows.collect().select("user", "item", "ts", "label").rows() == [
        ("1", "2", 600.0, 1),
        ("2", "1", 600.0, 1),
        ("1", "1", 700.0, 0),
        ("2", "2", 800.0, 0),
        ("1", "1", 900.0, 0),
    ]


def test_profile_genres_and_year_stand_in_every_row(source):
    rows = movielens.load(source).rows.collect()

    assert rows.row(0, named=True) | {"part": ""} == {
        "user": "1", "item": "2", "ts": 600.0, "label": 1, "part": "",
        "gender": "F", "age": "1", "occupation": "10", "zip": "480", "genres": ["Crime"], "year": "1994",
    }  # fmt: skip
    assert rows.row(1, named=True)["genres"] == ["Animation", "Children's"]
    assert rows.row(1, named=True)["zip"] == "V1B"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "ratings.dat",
            b"1::1::5::978300760\n1::2::",
            r"ratings.dat, line 2: expected user::item::rating::ts, got '1::2::'",
        ),
        ("ratings.dat", b"1::1::five::978300760\n", r"ratings.dat, line 1: expected user::item::rating::ts"),
        ("ratings.dat", b"", r"ratings.dat, line 1: .* got an empty file"),
        ("ratings.dat", b"1::9::5::978300760\n", r"ratings.dat: holds item 9, which is not in movies.dat"),
        ("users.dat", b"1::F::1::10::48067\n", r"ratings.dat: holds user 2, which is not in users.dat"),
        ("ratings.dat", b"1::1::5::99999999999999999999\n", r"ratings.dat, line 1: expected user::item::rating::ts"),
        ("users.dat", b"1::F::1::10::48067\n" * 2, r"users.dat: holds user 1 more than once"),
        ("users.dat", b"1::F::1::10::48067::x\n", r"users.dat, line 1: expected user::gender::age::occupation::zip"),
        ("movies.dat", b"1::Toy Story (1995)::Comedy::x\n", r"movies.dat, line 1: expected item::title::genres"),
        ("ratings.dat", "1::1::5::97830076\u0663\n".encode("latin-1", "replace"), r"ratings.dat, line 1: expected"),
        ("users.dat", b"1::F::1\n", r"users.dat, line 1: expected user::gender::age::occupation::zip"),
    ],
)
def test_a_damaged_file_is_told_by_line(source, file, content, message):
    (source / file).write_bytes(content)

    with pytest.raises(UserError, match=message):
        movielens.load(source)


def test_a_missing_file_is_named(source):
    (source / "users.dat").unlink()

    with pytest.raises(UserError, match=r"users.dat: no such file; expected the folder of MovieLens-1M"):
        movielens.load(source)


def test_the_real_data_are_read_whole_and_split_by_time():
    log = movielens.load(real("ml-1m"))

    sizes = dict(log.rows.collect()["part"].value_counts().rows())
    last = log.rows.collect().group_by("part").agg(first=pl.col("ts").min(), last=pl.col("ts").max())
    times = {part: (first, last) for part, first, last in last.rows()}
    assert sum(sizes.values()) == 999_611
    assert sizes["valid"] == pytest.approx(99_961, abs=50)
    assert sizes["test"] == pytest.approx(99_961, abs=50)
    assert times["train"][1] < times["valid"][0]
    assert times["valid"][1] < times["test"][0]
    assert log.rows.collect().null_count().sum_horizontal()[0] == 0
    assert log.rows.collect()["label"].sum() == 575_066
    assert datetime.fromtimestamp(log.rows.collect()["ts"][0], UTC).year == 2000
