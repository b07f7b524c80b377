"""iPinYou in both of its forms, which say the same."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from training.data.prepare import prepare
from training.datasets import ipinyou
from training.datasets.ipinyou import FIELDS, IpinyouOptions
from training.errors import UserError

SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "ipinyou_sample"
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


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples of real data stand beside the project, not in it")
def test_the_real_sample_is_read():
    rows = ipinyou.load(SAMPLES, IpinyouOptions(min_count=1)).rows.collect()

    assert rows.height == 47_923
    assert rows["label"].sum() == 305
    assert rows["useragent"].value_counts(sort=True).row(0) == ("android_safari", 46_852)
    assert set(rows["slotprice"]) <= {*PRICES.values(), "other"}
