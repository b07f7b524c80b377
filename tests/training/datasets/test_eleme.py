"""Ele.me, from its files of 39 columns to a log."""

import numpy as np
import polars as pl
import pytest

from models.features.encoder import Encoder
from models.features.field import OOV, PAD
from models.features.history import Event
from training.data.batches import Prepared
from training.data.prepare import prepare
from training.datasets import eleme
from training.datasets.eleme import ElemeOptions
from training.errors import UserError
from training.log import split_by_time

WHOLE = ElemeOptions(files="D1_0,D3_1", share=1.0)
START = 1_645_000_000


def line(number, **changed):
    """Impression `number`: five users see twenty items, three on a page, clicking every fourth."""
    own = {
        "label": int(number % 4 == 0), "user_id": f"u{number // 3 % 5}", "gender": 1, "visit_city": 7,
        "avg_price": 23.5, "is_super_vip": 0, "ctr_30": number % 9, "ord_30": 2, "total_amt_30": 51.25,
        "shop_id": f"s{number % 6}", "item_id": f"i{number % 20}", "city_id": 7, "district_id": 66, "shop_aoi_id": "a1",
        "shop_geohash_6": "wtw3sj", "shop_geohash_12": "wtw3sjq6z7r8", "brand_id": 12, "category_1_id": 1001,
        "merge_standard_food_id": 5, "rank_7": number % 11, "rank_30": 3, "rank_90": 4,
        **dict.fromkeys(eleme.LISTS, "1;2;3"),
        "times": START + 60 * (number // 3), "hours": number % 24, "time_type": "lunch", "weekdays": 3,
        "geohash12": "wtw3sjq6z7r8",
    }  # fmt: skip
    return ",".join(str(value) for value in {**own, **changed}.values()) + "\n"


@pytest.fixture
def source(tmp_path):
    (tmp_path / "D1_0.csv").write_text("".join(line(number) for number in range(150)))
    (tmp_path / "D3_1.csv").write_text("".join(line(number) for number in range(150, 300)))
    return tmp_path


def test_a_line_has_the_columns_that_others_who_read_these_files_give_it():
    assert len(eleme.COLUMNS) == 39
    assert next(iter(eleme.COLUMNS)) == "label"
    assert list(eleme.COLUMNS)[-1] == "geohash12"
    assert line(0).count(",") == 38


def test_the_fields_are_those_of_the_paper():
    own, context, item = (eleme.FIELDS[group] for group in ("user", "context", "item"))

    # 14 sequence fields: 11 of the item, and three that tell when; 9 others: of the user, and where.
    assert len(item) == 11
    assert len(own) + len(context) == 9 + 3


def test_a_row_holds_what_its_columns_say(source):
    row = eleme.load(source, WHOLE).rows.collect().row(4, named=True)

    assert row == {
        "label": 1, "user": "u1", "item": "i4", "ts": START + 60, "part": "train",
        "gender": "1", "visit_city": "7", "avg_price": 23.5, "is_super_vip": "0", "ctr_30": 4.0, "ord_30": 2.0,
        "total_amt_30": 51.25, "hours": "4", "time_type": "lunch", "weekdays": "3", "geohash12": "wtw3sjq6z7r8",
        "shop_id": "s4", "city_id": "7", "district_id": "66", "shop_aoi_id": "a1", "shop_geohash_6": "wtw3sj",
        "shop_geohash_12": "wtw3sjq6z7r8", "category_1_id": "1001", "rank_7": 4.0, "rank_30": 3.0, "rank_90": 4.0,
    }  # fmt: skip


def test_the_split_is_by_time_and_tears_no_page_apart(source):
    rows = eleme.load(source, WHOLE).rows.collect()

    assert rows["part"].equals(split_by_time(rows["ts"].to_numpy(), valid=0.1, test=0.1))
    assert rows.group_by("ts").agg(pl.col("part").n_unique())["part"].max() == 1
    assert rows["part"].value_counts(sort=True)["count"].to_list() == [240, 30, 30]


@pytest.mark.parametrize(
    "changed",
    [
        {"gender": -99}, {"gender": ""}, {"city_id": -1}, {"district_id": -1}, {"shop_aoi_id": "-1"},
        {"shop_geohash_6": -1}, {"shop_geohash_12": -1}, {"rank_7": -1}, {"rank_30": "-1.0"}, {"rank_90": "NULL"},
        {"geohash12": -1}, {"geohash12": ""}, {"brand_id": ""}, {"merge_standard_food_id": "nan"}, {"times": ""},
        {"hours": ""}, {"user_id": ""}, {"avg_price": "NaN"},
    ],
)  # fmt: skip
def test_a_row_that_lacks_a_value_is_dropped(source, changed):
    (source / "D3_1.csv").write_text(
        line(150) + line(151, **changed) + line(152, ctr_30=-1) + line(153, **dict.fromkeys(eleme.LISTS, ""))
    )

    log = eleme.load(source, WHOLE)

    assert log.rows.collect().height == 153
    assert log.notes[0] == "154 rows drawn, 1 of them dropped for an absent value"


def test_a_gap_in_the_files_is_one_in_a_request(source, tmp_path):
    prepare("eleme", source, tmp_path / "prepared", settings=["files=D1_0,D3_1", "share=1"])
    encoder = Encoder(Prepared.open(tmp_path / "prepared").schema)

    row = encoder.encode_request({"gender": "null"}, {"time_type": "NA", "hours": "25"}, START)

    assert [row[name].tolist() for name in ("user.gender", "ctx.time_type", "ctx.hours")] == [[PAD], [PAD], [OOV]]


def test_a_share_of_each_file_is_drawn_and_the_same_for_one_seed(tmp_path):
    for name in ("D1_0", "D3_1", "D5_0"):
        (tmp_path / f"{name}.csv").write_text(
            "".join(line(number, user_id=f"{name}-{number}") for number in range(3000))
        )

    users = eleme.load(tmp_path).rows.collect()["user"]

    counts = dict(users.str.split("-").list.first().value_counts().rows())
    numbers = users.str.split("-").list.last().cast(pl.Int64)
    assert counts == {name: pytest.approx(1000, abs=100) for name in ("D1_0", "D3_1", "D5_0")}
    assert numbers.mean() == pytest.approx(1500, abs=60)
    assert users.to_list() == eleme.load(tmp_path).rows.collect()["user"].to_list()
    assert users.to_list() != eleme.load(tmp_path, ElemeOptions(seed=1)).rows.collect()["user"].to_list()
    first, second = (set(numbers.filter(users.str.starts_with(name)).to_list()) for name in ("D1_0", "D3_1"))
    assert 200 < len(first & second) < 460  # drawn apart, so about a ninth of all


def test_milliseconds_are_times_too(source):
    (source / "D1_0.csv").write_text(line(0, times=1000 * START + 250))

    assert eleme.load(source, WHOLE).rows.collect()["ts"][0] == START + 0.25


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (line(0) + line(1).rsplit(",", 1)[0] + "\n", "line 2: expected 39 values, got 38"),
        (line(0) + line(1).strip() + ",9\n", "line 2: expected 39 values, got 40"),
        (line(0) + line(1)[: len(line(1)) // 2], "line 2: expected"),
        (line(0, label=2), "line 1, column label: expected 0 or 1, got '2'"),
        (line(0, avg_price="cheap"), "line 1, column avg_price: expected a number below 1e118 or nothing, got 'cheap'"),
        (line(0, avg_price="1e999"), "line 1, column avg_price: expected a number below 1e118 or nothing, got '1e999'"),
        (line(0, times="9" * 400), "line 1, column times: expected a whole number"),
        (line(0, hours=24), "line 1, column hours: expected an hour"),
        (line(0, times="2022-02-16"), "line 1, column times: expected a whole number"),
        # Without its first column every line is one short; with the user first it is of the wrong kind.
        (",".join(["u1", "0", *line(0).split(",")[2:]]), "line 1, column label: expected 0 or 1, got 'u1'"),
        (",".join(eleme.COLUMNS) + "\n" + line(0), "line 1, column label: expected 0 or 1, got 'label'"),
        ("", "line 1: expected a row, got an empty file"),
    ],
)
def test_a_line_of_another_kind_is_told(source, content, message):
    (source / "D3_1.csv").write_text(content)

    with pytest.raises(UserError, match=f"D3_1.csv, {message}"):
        eleme.load(source, WHOLE)


def test_a_missing_file_is_named(source):
    with pytest.raises(UserError, match=r"D5_0.csv: no such file"):
        eleme.load(source)


def test_a_log_without_a_complete_row_is_told(source):
    for name in ("D1_0", "D3_1"):
        (source / f"{name}.csv").write_text(line(0, gender=-99))

    with pytest.raises(UserError, match="expected complete rows, each of 2 lacks a value"):
        eleme.load(source, WHOLE)


@pytest.mark.parametrize(
    "options",
    [
        {"share": 0.0},
        {"share": 1.5},
        {"seed": -1},
        {"min_count": 0},
        {"history_length": 0},
        {"history": "all"},
        {"sequences": "all"},
    ],
)
def test_an_option_that_cannot_be_is_told(options):
    with pytest.raises(UserError, match=f"{next(iter(options))} is "):
        ElemeOptions(**options)


def test_a_file_named_twice_is_refused_for_its_rows_would_stand_in_two_parts():
    with pytest.raises(UserError, match="files names each file once, got D1_0, D1_0"):
        ElemeOptions(files="D1_0, D1_0")


@pytest.mark.parametrize("history", ["clicks", "impressions"])
def test_the_past_is_strictly_earlier_and_of_what_was_asked_for(source, tmp_path, history):
    settings = ["files=D1_0,D3_1", "share=1", f"history={history}"]
    about = prepare("eleme", source, tmp_path / "prepared", settings=settings)

    rows = eleme.load(source, WHOLE).rows.collect()
    past = rows.filter(pl.col("label") == 1) if history == "clicks" else rows
    assert about["num_events"] == past.height
    assert f"the past of a user is its {history}" in about["notes"]
    for part in ("train", "valid", "test"):
        starts, ends = (np.load(tmp_path / "prepared" / part / f"{name}.npy") for name in ("start", "end"))
        mine = rows.filter(pl.col("part") == part).to_dicts()
        earlier = [past.filter((pl.col("user") == r["user"]) & (pl.col("ts") < r["ts"])).height for r in mine]
        np.testing.assert_array_equal(ends - starts, earlier)


def test_the_papers_sequences_hold_what_each_click_was_of_and_when(source, tmp_path):
    prepare("eleme", source, tmp_path / "prepared", settings=["files=D1_0,D3_1", "share=1", "sequences=paper"])
    data = Prepared.open(tmp_path / "prepared")
    rows, encoder = data.rows("test"), Encoder(data.schema)
    raw = eleme.load(source, WHOLE).rows.collect()
    last = raw.filter(pl.col("part") == "test").row(-1, named=True)
    clicks = raw.filter((pl.col("user") == last["user"]) & (pl.col("label") == 1)).to_dicts()

    inputs = rows.take(np.array([len(rows) - 1])).inputs

    assert len(data.schema.group("behaviour")) == 14
    assert inputs["hist_mask"].all()
    past = encoder.encode_history([Event(item=c["item"], ts=c["ts"], features=c) for c in clicks], last["ts"])
    for name, array in past.items():
        np.testing.assert_array_equal(array, inputs[name].numpy(), err_msg=name)
    assert len(set(past["hist.hours"][0].tolist())) > 1
