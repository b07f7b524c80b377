"""iPinYou in both of its forms, which say the same."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from tests.shared_data import real
from training.data.prepare import prepare
from training.datasets import ipinyou
from training.datasets.ipinyou import FIELDS, IpinyouOptions
from training.errors import UserError
from training.log import split_by_number

COLUMNS = (
    *("click", "weekday", "hour", "bidid", "timestamp", "logtype", "ipinyouid", "useragent", "IP", "region", "city"),
    *("adexchange", "domain", "url", "urlid", "slotid", "slotwidth", "slotheight", "slotvisibility", "slotformat"),
    *("slotprice", "creative", "bidprice", "payprice", "keypage", "advertiser", "usertag"),
)
AGENTS = {
    "Mozilla/5.0 (Windows NT 6.1) AppleWebKit Chrome/27": "windows_chrome",
    "Opera/9.80 (Android 2.2)": "android_opera",
    "android_safari": "android_safari",
    "curl": "other_other",
}
PRICES = {0: "0", 1: "1-10", 10: "1-10", 11: "11-50", 50: "11-50", 51: "51-100", 101: "101+"}


def record(row, day):
    moment = datetime(2013, 6, day, tzinfo=UTC) + timedelta(seconds=60 * row)
    values = dict.fromkeys(COLUMNS, "null") | {
        "click": str(int(row % 3 == 0)),
        "weekday": str(day % 7),
        "hour": f"{moment.hour:02}",
        "timestamp": moment.strftime("%Y%m%d%H%M%S") + "250",
        "useragent": list(AGENTS)[row % len(AGENTS)],
        "slotprice": str(list(PRICES)[row % len(PRICES)]),
        "creative": f"ad{row % 5}",
    }
    return [values[name] for name in COLUMNS]


def write_log(folder, change=lambda records: records):
    for part, day, num in (("train", 6, 100), ("test", 12, 30)):
        records = change([record(row, day) for row in range(num)])
        (folder / f"{part}.log.txt").write_text("\n".join("\t".join(r) for r in [COLUMNS, *records]) + "\n")


def write_libfm(folder, extra=""):
    rows = ipinyou.load(folder).rows.collect()
    index = sorted({(name, row[name]) for row in rows.iter_rows(named=True) for name in FIELDS})
    number = {pair: n for n, pair in enumerate(index)}
    text = "".join(f"{name}:{value}\t{n}\n" for (name, value), n in number.items())
    (folder / "featindex.fm.txt").write_text(text)
    for part in ("train", "test"):
        mine = [r for r in rows.iter_rows(named=True) if (r["part"] == "test") == (part == "test")]
        lines = [" ".join([str(r["label"]), *(f"{number[name, r[name]]}:1" for name in FIELDS)]) for r in mine]
        (folder / f"{part}.fm.txt").write_text("\n".join(lines) + "\n" + extra)
        (folder / f"{part}.log.txt").unlink()
    return rows


def shares(parts):
    return {name: (parts == name).sum() / len(parts) for name in ("train", "valid", "test")}


def test_a_log_is_split_by_its_days_and_its_words_made_coarse(tmp_path):
    write_log(tmp_path)

    rows = ipinyou.load(tmp_path).rows.collect()

    first = datetime(2013, 6, 5, 16, tzinfo=UTC)  # midnight in Beijing
    assert rows["part"].to_list() == ["train"] * 90 + ["valid"] * 10 + ["test"] * 30
    assert rows["ts"][0] == first.timestamp() + 0.25
    assert rows["useragent"].to_list()[:4] == list(AGENTS.values())
    assert rows["slotprice"].to_list()[:7] == list(PRICES.values())
    assert rows["hour"][60] == "01"


def test_the_libfm_form_says_the_same_but_for_the_clock(tmp_path):
    write_log(tmp_path)
    expected = write_libfm(tmp_path)

    rows = ipinyou.load(tmp_path).rows.collect()

    assert rows.select("label", "part", *FIELDS).equals(expected.select("label", "part", *FIELDS))
    assert rows["ts"].to_list() == list(range(130))


def test_at_random_a_row_is_in_the_part_that_its_number_says_and_the_same_in_both_forms(tmp_path):
    random = IpinyouOptions(split="random", seed=7)
    write_log(tmp_path)
    rows = ipinyou.load(tmp_path, random).rows.collect()
    by_days = ipinyou.load(tmp_path).rows.collect()

    write_libfm(tmp_path)
    again = ipinyou.load(tmp_path, random).rows.collect()

    numbers = pl.DataFrame({"row": range(130)}, schema={"row": pl.Int64})
    parts = numbers.select(split_by_number(pl.col("row"), seed=7, valid=0.1, test=0.2))["part"]
    assert rows["part"].to_list() == again["part"].to_list() == parts.to_list()
    assert set(parts[:100]) == set(parts[100:]) == {"train", "valid", "test"}  # of the training days, of the test days
    assert rows.drop("part").equals(by_days.drop("part"))


def test_the_random_split_has_the_papers_shares_and_another_seed_draws_another():
    numbers = pl.DataFrame({"row": range(20_000)}, schema={"row": pl.Int64})
    options = IpinyouOptions(split="random")

    drawn = [
        numbers.select(split_by_number(pl.col("row"), seed=seed, valid=options.valid, test=ipinyou.RANDOM_TEST))["part"]
        for seed in (options.seed, options.seed + 1)
    ]

    for parts in drawn:
        assert shares(parts) == pytest.approx({"train": 0.7, "valid": 0.1, "test": 0.2}, abs=0.015)
    assert 0.4 < np.mean(drawn[0].to_numpy() == drawn[1].to_numpy()) < 0.7  # 0.54 of two independent draws


@pytest.mark.parametrize(
    "options", [{"valid": 0.8, "split": "random"}, {"valid": 1}, {"seed": 2**32}, {"min_count": 0}]
)
def test_shares_that_leave_nothing_to_train_on_and_numbers_out_of_range_are_refused(options):
    with pytest.raises(UserError, match=r"valid between 0 and (0\.8|1), got"):
        IpinyouOptions(**options)


def test_a_campaign_is_prepared_in_time_order_whatever_the_order_of_its_file(tmp_path):
    write_log(tmp_path)
    prepare("ipinyou", tmp_path, tmp_path / "sorted", settings=["min_count=1"])
    write_log(tmp_path, change=lambda records: records[::-1])

    prepare("ipinyou", tmp_path, tmp_path / "again", settings=["min_count=1"])

    for file in (tmp_path / "sorted").rglob("*.npy"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(tmp_path / "sorted")).read_bytes()


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("timestamp", "20131306000000000", "line 6, column timestamp: expected a time as"),
        ("timestamp", "20130230060000000", "line 6: expected a time that there is in column timestamp, got '20130230"),
        ("slotprice", "cheap", "line 6, column slotprice: expected a whole number, got 'cheap'"),
        ("bidid", "1\t2", "line 6: expected 27 values, got 28"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, column, value, message):
    def change(records):
        records[4][COLUMNS.index(column)] = value
        return records

    write_log(tmp_path, change)

    with pytest.raises(UserError, match=f"train.log.txt, {message}"):
        ipinyou.load(tmp_path)


@pytest.mark.parametrize("extra", ["0 1:1 2:1\n", "0" + " 0:1" * 16 + "\n", "0" + " 99999:1" * 16 + "\n"])
def test_a_wrong_line_of_the_libfm_form_is_named(tmp_path, extra):
    write_log(tmp_path)
    write_libfm(tmp_path, extra)

    with pytest.raises(UserError, match=r"train.fm.txt, line 101: expected"):
        ipinyou.load(tmp_path)


def test_a_folder_of_neither_form_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"expected train.log.txt and test.log.txt, or train.fm.txt, found neither"):
        ipinyou.load(tmp_path)


def test_the_real_sample_is_read_and_the_papers_setting_mixes_its_days():
    log = ipinyou.load(real("ipinyou_sample"), IpinyouOptions(split="random", min_count=20))
    rows = log.rows.collect()

    assert rows.height == 47_923
    assert rows["label"].sum() == 305
    assert rows["useragent"].value_counts(sort=True).row(0) == ("android_safari", 46_852)
    assert set(rows["slotprice"]) <= {*PRICES.values(), "other"}
    assert {field.min_count for field in log.spec.fields} == {20}
    for of_test_days in (False, True):
        parts = rows.filter((pl.col("ts") >= 26_773) == of_test_days)["part"]
        assert shares(parts) == pytest.approx({"train": 0.7, "valid": 0.1, "test": 0.2}, abs=0.01)
