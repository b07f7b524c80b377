"""Last.fm, from its files to a log."""

from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from models.features.schema import Schema
from training.data.prepare import prepare
from training.datasets import lastfm
from training.datasets.lastfm import LastfmOptions
from training.errors import UserError

USERS, ARTISTS = 20, 30


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    tagged = ["userID\tartistID\ttagID\tday\tmonth\tyear"]
    for number in range(300):
        user, artist, tag = rng.integers(2, USERS), rng.integers(50, 50 + ARTISTS // 2), rng.integers(90)
        tagged.append(f"{user}\t{artist}\t{tag}\t1\t{number % 12 + 1}\t{2006 + number % 5}")
    listened = ["userID\tartistID\tweight"]
    heard = [(user, 50 + artist) for user in range(2, USERS) for artist in range(ARTISTS) if (user + artist) % 4 == 0]
    listened += [f"{user}\t{artist}\t{user * artist}" for user, artist in heard]
    (tmp_path / "user_taggedartists.dat").write_text("\r\n".join(tagged) + "\r\n")
    (tmp_path / "user_artists.dat").write_text("\n".join(listened) + "\n")
    return tmp_path


def pairs(file):
    return [tuple(line.split("\t")[:2]) for line in file.read_text().splitlines()[1:]]


def test_each_tag_assignment_is_a_click_and_two_unknown_artists_of_its_day_are_none(source):
    rows = lastfm.load(source, LastfmOptions(tag=True)).rows.collect()

    tagged = pairs(source / "user_taggedartists.dat")
    known = {*tagged, *pairs(source / "user_artists.dat")}
    assert rows.filter(pl.col("label") == 1).select("user", "item").rows() == tagged
    assert rows["label"].to_list() == [1, 0, 0] * 300
    assert not known & set(rows.filter(pl.col("label") == 0).select("user", "item").rows())
    for first in range(0, 900, 3):
        assert rows[first : first + 3].drop("item", "label", "part").n_unique() == 1


def test_an_artist_that_was_only_listened_to_is_drawn_too(source):
    rows = lastfm.load(source).rows.collect()

    never_tagged = {str(50 + artist) for artist in range(ARTISTS)} - {
        artist for _, artist in pairs(source / lastfm.TAGGED)
    }
    assert never_tagged & set(rows.filter(pl.col("label") == 0)["item"])


def test_the_date_is_three_ids_and_the_time(source):
    row = lastfm.load(source).rows.collect().row(0, named=True)

    assert (row["day"], row["month"], row["year"]) == ("1", "1", "2006")
    assert row["ts"] == datetime(2006, 1, 1, tzinfo=UTC).timestamp()
    assert "tag" not in row


def test_milliseconds_are_read_as_the_same_days(source):
    # Midnights of Madrid, in winter an hour and in summer two before those of Greenwich.
    stamped = ["userID\tartistID\ttagID\ttimestamp", "2\t52\t13\t1238536800000", "2\t53\t13\t1230764400000"]
    (source / lastfm.STAMPED).write_text("\n".join(stamped) + "\n")
    (source / lastfm.TAGGED).unlink()

    rows = lastfm.load(source).rows.collect().filter(pl.col("label") == 1)

    assert rows.select("day", "month", "year").rows() == [("1", "4", "2009"), ("1", "1", "2009")]


def test_the_split_is_at_random_and_the_same_for_one_seed(source):
    rows = lastfm.load(source).rows.collect()

    sizes = {"train": pytest.approx(720, abs=40), "valid": pytest.approx(90, abs=30), "test": pytest.approx(90, abs=30)}
    assert dict(rows["part"].value_counts().rows()) == sizes
    assert rows.equals(lastfm.load(source).rows.collect())
    other = lastfm.load(source, LastfmOptions(seed=7)).rows.collect()
    assert not rows["part"].equals(other["part"])
    assert not rows["item"].equals(other["item"])
    train = rows.with_row_index().filter(pl.col("part") == "train")["index"].to_numpy()
    assert abs(train.mean() - 450) < 30


def test_what_repeats_and_another_number_of_rows_are_noted(source):
    log = lastfm.load(source)

    rows = log.rows.collect().filter(pl.col("label") == 1)
    train = set(rows.filter(pl.col("part") == "train").select("user", "item").rows())
    test = rows.filter(pl.col("part") == "test").select("user", "item").rows()
    share = sum(pair in train for pair in test) / len(test)
    assert log.notes == (
        f"{share:.1%} of the test positives repeat a (user, artist) pair that is positive in training",
        "user_taggedartists.dat: 300 tag assignments, where the published data have 186,479",
    )


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            lastfm.TAGGED,
            "userID\tartistID\ttagID\tday\tmonth\tyear\n2\t52\t13\t1\t4\t2009\n2\t52\t13\t1\n",
            "line 3: expected 6 values, got 4",
        ),
        (
            lastfm.TAGGED,
            "userID\tartistID\ttagID\tday\tmonth\tyear\n2\t52\t13\t31\t2\t2009\n",
            "line 2: expected a day/month/",
        ),
        (lastfm.TAGGED, "userID,artistID,tagID,day,month,year\n2,52,13,1,4,2009\n", "line 1: expected a header with"),
        (
            lastfm.LISTENED,
            "userID\tartistID\tweight\n2\t51\tmany\n",
            "line 2, column weight: expected a number, got 'many'",
        ),
        (lastfm.LISTENED, "", "line 1: expected a row, got an empty file"),
    ],
)
def test_a_damaged_file_is_told_by_line(source, file, content, message):
    (source / file).write_text(content)

    with pytest.raises(UserError, match=rf"{file}, {message}"):
        lastfm.load(source)


def test_a_missing_file_is_named(source, tmp_path):
    with pytest.raises(UserError, match=r"nowhere/user_taggedartists.dat: no such file"):
        lastfm.load(tmp_path / "nowhere")
    (source / lastfm.LISTENED).unlink()

    with pytest.raises(UserError, match=r"user_artists.dat: no such file"):
        lastfm.load(source)


@pytest.mark.parametrize(("option", "value"), [("negatives", 0), ("seed", -1)])
def test_an_option_out_of_range_is_told(option, value):
    with pytest.raises(UserError, match=f"{option} is a"):
        LastfmOptions(**{option: value})


def test_it_is_prepared_from_end_to_end(source, tmp_path):
    about = prepare("lastfm", source, tmp_path / "prepared", settings=["tag=true", "negatives=2"])

    assert sum(about["num_rows"].values()) == 900
    assert about["history_length"] == 0
    schema = Schema.from_json((tmp_path / "prepared" / "schema.json").read_bytes())
    assert [f.name for f in schema.group("context")] == ["day", "month", "year", "tag"]
    assert about["num_items"] <= ARTISTS
