"""Criteo's file as it is given, streamed: the same bytes in blocks of any size, and every wrong line named."""

import gzip
import json
import math

import numpy as np
import polars as pl
import pytest

from models.features.encoder import Encoder
from models.features.field import PAD
from models.features.schema import Schema
from tests.shared_data import real
from training.data import time_order
from training.data.prepare import prepare
from training.datasets import criteo
from training.datasets.criteo import CriteoOptions
from training.errors import UserError

NUM_ROWS = 900


def lines(num=NUM_ROWS):
    rng = np.random.default_rng(1)
    for row in range(num):
        numbers = ["" if rng.random() < 0.2 else str(int(rng.pareto(0.5)) - 1) for _ in criteo.NUMBERS]
        words = ["" if rng.random() < 0.1 else f"{rng.integers(4 + n):08x}" for n in range(26)]
        yield "\t".join([str(row % 3 // 2), *numbers, *words])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("criteo") / "train.txt"
    path.write_text("\n".join(lines()) + "\n")
    return path


def files_of(folder):
    return {f.relative_to(folder): f.read_bytes() for f in sorted(folder.rglob("*")) if f.suffix in (".npy", ".json")}


def test_a_file_becomes_a_log_row_by_row(file):
    rows = criteo.load(file).rows.collect()

    for row, line in zip(rows.iter_rows(named=True), lines(), strict=True):
        label, *cells = line.split("\t")
        assert row["label"] == int(label)
        assert [row[name] for name in criteo.NUMBERS] == [float(c) if c else None for c in cells[:13]]
        assert [row[name] for name in criteo.WORDS] == [c or None for c in cells[13:]]
    assert rows["ts"].to_list() == list(range(NUM_ROWS))


def test_blocks_of_any_size_give_the_same_bytes(file, tmp_path, monkeypatch):
    prepare("criteo", file, tmp_path / "whole", settings=["min_count=3"])
    monkeypatch.setattr(time_order, "BLOCK", 37)
    prepare("criteo", file, tmp_path / "small", settings=["min_count=3"])

    assert files_of(tmp_path / "small") == files_of(tmp_path / "whole")


def test_what_is_on_disk_is_what_fitting_and_encoding_all_rows_at_once_gives(file, tmp_path):
    prepare("criteo", file, tmp_path / "out", settings=["min_count=3", "discretise=log_square"])
    log = criteo.load(file, CriteoOptions(min_count=3, discretise="log_square"))
    rows = log.rows.collect()
    parts = {part: rows.filter(pl.col("part") == part).to_dict(as_series=False) for part in ("train", "valid", "test")}

    schema = log.spec.fit(parts["train"])

    assert Schema.from_json((tmp_path / "out" / "schema.json").read_bytes()) == schema
    for part, columns in parts.items():
        arrays = Encoder(schema).encode_items(columns, len(columns["ts"]))
        for name, array in arrays.items():
            np.testing.assert_array_equal(np.load(tmp_path / "out" / part / f"{name}.npy"), array)


def test_numbers_may_stay_numbers(file, tmp_path):
    prepare("criteo", file, tmp_path / "out", settings=["discretise=none", "min_count=1"])
    schema = Schema.from_json((tmp_path / "out" / "schema.json").read_bytes())
    rows = criteo.load(file).rows.filter(pl.col("part") == "train").collect()

    assert schema.field("I1").kind == "numeric"
    assert schema.field("I1").shift == rows["I1"].min() == -1
    assert np.load(tmp_path / "out" / "train" / "item.I1.npy").max() == pytest.approx(1, abs=1e-6)


def test_raw_numbers_of_a_request_fall_where_training_had_them(file, tmp_path):
    prepare("criteo", file, tmp_path / "out", settings=["min_count=1"])
    schema = Schema.from_json((tmp_path / "out" / "schema.json").read_bytes())
    ids = Encoder(schema).encode_items({"I1": [0, 0.0, 2, 3, None, 20]}, 6)["item.I1"]

    def spelled(value):
        return (schema.field("I1").vocabulary or ()).index(value) + 2

    assert ids.tolist() == [
        *[spelled("0")] * 2, spelled("2"), spelled("1"), PAD, spelled(str(math.floor(math.log(20) ** 2)))
    ]  # fmt: skip


@pytest.mark.parametrize(("split", "shares"), [("dynint", (0.7, 0.1, 0.2)), ("x1", (0.72, 0.18, 0.1))])
def test_a_random_split_has_its_shares_and_follows_the_seed(file, split, shares):
    parts = [criteo.load(file, CriteoOptions(split=split, seed=s)).rows.collect()["part"].to_list() for s in (1, 1, 2)]

    assert parts[0] == parts[1] != parts[2]
    for name, share in zip(("train", "valid", "test"), shares, strict=True):
        assert parts[0].count(name) / NUM_ROWS == pytest.approx(share, abs=0.05)


def test_gzip_and_a_csv_file_with_a_header_say_the_same(file, tmp_path):
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(file.read_bytes()))
    header = ["Id", "Label", *criteo.NUMBERS, *criteo.WORDS]
    csv = "\n".join(["\t".join(header), *(f"{row}\t{line}" for row, line in enumerate(lines()))]).replace("\t", ",")
    (tmp_path / "train.csv").write_text(csv.replace("\n", "\r\n"))
    expected = criteo.load(file).rows.collect()

    assert criteo.load(tmp_path).rows.collect().equals(expected)
    assert criteo.load(tmp_path / "train.csv").rows.collect().select(expected.columns).equals(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cells: cells[:20], "line 500: expected 40 values, got 20"),
        (lambda cells: [*cells, "x"], "line 500: expected 40 values, got 41"),
        (lambda _: [], "line 500: expected 40 values, got 1"),
        (lambda cells: ["2", *cells[1:]], "line 500, column label: expected 0 or 1, got '2'"),
        (lambda cells: [*cells[:3], "many", *cells[4:]], "line 500, column I3: expected a whole number or nothing"),
        (lambda cells: [*cells[:20], "a b", *cells[21:]], "line 500, column C7: expected a hashed word or nothing"),
    ],
)
def test_a_wrong_line_is_named(file, tmp_path, change, message):
    text = list(lines())
    text[499] = "\t".join(change(text[499].split("\t")))
    (tmp_path / "train.txt").write_text("\n".join(text) + "\n")

    with pytest.raises(UserError, match=message):
        criteo.load(tmp_path)


def test_a_truncated_gzip_file_is_told_so_and_leaves_nothing(file, tmp_path):
    packed = gzip.compress(file.read_bytes())
    (tmp_path / "train.txt.gz").write_bytes(packed[: len(packed) // 2])

    with pytest.raises(UserError, match=r"train.txt.gz"):
        prepare("criteo", tmp_path, tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["train.txt.gz"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("discretise=ln", r"discretise.*got 'ln'"),
        ("min_count=0", "min_count is from 1"),
        ("min_count=few", "--set min_count: .*got 'few'"),
        ("discretize=none", "no such option; did you mean discretise"),
        ("winners", "--set wants key=value, got 'winners'"),
    ],
)
def test_a_wrong_option_is_told(file, tmp_path, setting, message):
    with pytest.raises(UserError, match=message):
        prepare("criteo", file, tmp_path / "out", settings=[setting])


def test_options_are_recorded_and_part_of_the_hash(file, tmp_path):
    abouts = [
        prepare("criteo", file, tmp_path / "out", settings=["min_count=3", f"split={split}"])
        for split in ("dynint", "dynint", "x1")
    ]

    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["options"] == {
        "discretise": "winners", "min_count": 3, "split": "x1", "seed": 2026,
    }  # fmt: skip
    assert abouts[0]["data_hash"] == abouts[1]["data_hash"] != abouts[2]["data_hash"]


@pytest.mark.parametrize(
    ("name", "num_rows"),
    [("kaggle2014_train.tiny.csv", 1999), ("deepctr_criteo_sample.txt", 200), ("torch_rechub_criteo_sample.csv", 115)],
)
def test_the_real_samples_are_read(name, num_rows):
    rows = criteo.load(real("criteo_sample") / name).rows.collect()

    assert abs(rows.height - num_rows) <= 1
    assert rows["label"].is_in([0, 1]).all()
    assert 0 < rows["I2"].null_count() + rows["C22"].null_count() < 2 * rows.height
