"""Prepared data: what stands on disk is what the request form encodes, and nothing leaks from later rows."""

import fcntl
import json
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from models.artifact.golden import request_from_json
from models.features.arrays import concat
from models.features.encoder import Encoder
from models.features.field import OOV, PAD
from models.features.history import Event
from models.features.request import Request
from models.features.schema import Schema
from training.data import prepare as module
from training.data import time_order
from training.data.golden import NUM_REQUESTS, UNKNOWN
from training.data.prepare import prepare
from training.errors import UserError
from training.log import PARTS
from training.simulator.simulate import simulate


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    out = tmp_path_factory.mktemp("log")
    simulate(out, users=60, items=80, rows=4000, seed=2)
    return out


@pytest.fixture(scope="module")
def data(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "prepared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time_order, "BLOCK", 700)  # several blocks, the last one short
        prepare("simulated", source, out)
    return out


@pytest.fixture(scope="module")
def schema(data):
    return Schema.from_json((data / "schema.json").read_bytes())


@pytest.fixture(scope="module")
def log(source):
    """The raw rows, joined here by hand, in the order the parts have when put one after another."""
    ads = {row.pop("id"): row for row in pl.read_parquet(source / "ads.parquet").to_dicts()}
    users = {row.pop("id"): row for row in pl.read_parquet(source / "users.parquet").to_dicts()}
    return pl.read_parquet(source / "impressions.parquet").to_dicts(), users, ads


def arrays_of(data, part, names):
    return {name: np.load(data / part / f"{name}.npy") for name in names}


def test_every_row_on_disk_is_what_the_request_form_encodes(data, schema, log):
    impressions, users, ads = log
    encoder = Encoder(schema)
    everything: dict[str, list[Event]] = {}
    for row in impressions:
        if row["click"]:
            event = Event(item=row["ad"], ts=row["ts"], features=ads[row["ad"]])
            everything.setdefault(row["user"], []).append(event)
    events = {f.stem: np.load(f) for f in (data / "events").iterdir()}
    own = [i.name for i in schema.inputs if not i.name.startswith("hist") and i.name != "user_index"]

    first = 0
    for part in PARTS:
        stored = arrays_of(data, part, own)
        window = encoder.window(events, *(np.load(data / part / f"{name}.npy") for name in ("start", "end", "ts")))
        rows = impressions[first : first + len(window["hist_mask"])]
        # The whole life of the user goes in; the encoder cuts it at the request's own time.
        requests = [
            Request(
                user={"user_id": row["user"], **users[row["user"]]},
                context={"device": row["device"]},
                ts=row["ts"],
                behaviours=everything.get(row["user"], []),
                items={"ad_id": [row["ad"]], **{name: [value] for name, value in ads[row["ad"]].items()}},
                num_items=1,
            )
            for row in rows
        ]
        expected = concat([encoder.encode(request) for request in requests])
        for name, array in (stored | window).items():
            np.testing.assert_array_equal(array, expected[name], err_msg=f"{part} {name}")
        first += len(rows)
    assert first == len(impressions)


def test_labels_and_true_probabilities_stand_beside_their_rows(data, log):
    impressions, _, _ = log

    for name, column in (("label", "click"), ("true_ctr", "true_ctr"), ("true_ctr_top", "true_ctr_top")):
        stored = np.concatenate([np.load(data / part / f"{name}.npy") for part in PARTS])
        np.testing.assert_array_equal(stored, [row[column] for row in impressions])


def test_a_value_seen_only_after_the_training_part_is_unknown(data, schema, log):
    impressions, _, _ = log
    num_train = len(np.load(data / "train" / "label.npy"))
    late = {row["ad"] for row in impressions} - {row["ad"] for row in impressions[:num_train]}
    test = pl.read_parquet(data / "raw" / "test.parquet")

    ids = np.load(data / "test" / "item.ad_id.npy")[test["item"].is_in(list(late)).to_numpy()]

    assert late
    assert len(ids)
    assert set(ids) == {OOV}
    assert not late & set(schema.field("ad_id").vocabulary)


def test_numeric_statistics_come_from_the_training_part(schema, log):
    impressions, _, ads = log
    num_train = 3200

    prices = [ads[row["ad"]]["price"] for row in impressions[:num_train]]

    assert schema.field("price").shift == pytest.approx(np.mean(prices), rel=1e-12)


def test_ids_are_int32_and_numbers_float32_on_disk(data):
    dtypes = {f.stem: np.load(f).dtype for f in (data / "train").iterdir()}

    assert dtypes["user.age"] == dtypes["item.tags"] == np.int32
    assert dtypes["item.price"] == dtypes["label"] == np.float32
    assert dtypes["start"] == dtypes["end"] == dtypes["group"] == np.int64


def test_raw_test_rows_are_the_encoded_ones_in_order(data, log):
    impressions, _, _ = log
    test = pl.read_parquet(data / "raw" / "test.parquet")

    expected = impressions[-test.height :]

    assert test["item"].to_list() == [row["ad"] for row in expected]
    assert test["ts"].to_list() == [row["ts"] for row in expected]
    assert test["device"].to_list() == [row["device"] for row in expected]
    np.testing.assert_array_equal(np.load(data / "test" / "label.npy"), test["label"])
    assert test.group_by("request").agg(pl.col("user").n_unique(), pl.col("ts").n_unique()).max().row(0)[1:] == (1, 1)
    assert test["request"].n_unique() == len({row["request"] for row in expected})


def test_behaviours_are_the_clicks_before_the_first_test_row(data, log):
    impressions, _, _ = log
    first = pl.read_parquet(data / "raw" / "test.parquet")["ts"][0]

    behaviours = pl.read_parquet(data / "raw" / "behaviours.parquet")

    expected = sorted((row["user"], row["ad"], row["ts"]) for row in impressions if row["click"] and row["ts"] < first)
    assert sorted(behaviours.rows()) == expected
    assert any(row["click"] and row["ts"] == first for row in impressions)  # which must not be among them
    assert behaviours["ts"].is_sorted()


def test_raw_features_are_what_the_store_is_loaded_with(data, log):
    _, users, ads = log

    items = pl.read_parquet(data / "raw" / "items.parquet").to_dicts()
    people = pl.read_parquet(data / "raw" / "users.parquet").to_dicts()

    assert {row.pop("id"): row for row in items}.items() <= ads.items()
    assert {row.pop("id"): row for row in people}.items() <= users.items()
    assert len(people) > 50


def test_dataset_json_tells_what_was_prepared(data, schema):
    about = json.loads((data / "dataset.json").read_text())

    assert about["name"] == "simulated"
    assert about["num_rows"] == {"train": 3200, "valid": 400, "test": 400}
    assert about["schema_fingerprint"] == schema.fingerprint
    assert about["num_events"] == len(np.load(data / "events" / "hist.ad_id.npy"))
    assert about["click_rate"]["test"] == pytest.approx(np.load(data / "test" / "label.npy").mean(), abs=1e-6)
    assert about["history_length"] == schema.history_length == 20


def test_preparing_again_gives_the_same_files_and_replaces_them(data, source, tmp_path):
    out = tmp_path / "prepared"
    prepare("simulated", source, out)
    (out / "train" / "left over").touch()

    prepare("simulated", source, out)

    files = sorted(f.relative_to(out) for f in out.rglob("*") if f.is_file())
    assert files == sorted(f.relative_to(data) for f in data.rglob("*") if f.is_file())
    assert all((out / f).read_bytes() == (data / f).read_bytes() for f in files if f.suffix != ".parquet")
    assert [f.name for f in tmp_path.iterdir()] == ["prepared"]


def test_the_data_hash_follows_the_raw_bytes(source, data, tmp_path):
    again = tmp_path / "log"
    again.mkdir()
    for file in source.iterdir():
        (again / file.name).write_bytes(file.read_bytes())
    users = pl.read_parquet(again / "users.parquet")

    users.with_columns(country=pl.lit("XX")).write_parquet(again / "users.parquet")

    before = json.loads((data / "dataset.json").read_text())["data_hash"]
    assert prepare("simulated", source, tmp_path / "same")["data_hash"] == before
    assert prepare("simulated", again, tmp_path / "other")["data_hash"] != before


def test_a_run_that_fails_leaves_nothing_and_keeps_what_was_there(data, source, tmp_path, monkeypatch):
    out = tmp_path / "prepared"
    prepare("simulated", source, out)
    before = (out / "dataset.json").read_bytes()
    monkeypatch.setattr(module, "golden_requests", lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        prepare("simulated", source, out)

    assert [f.name for f in tmp_path.iterdir()] == ["prepared"]
    assert (out / "dataset.json").read_bytes() == before


def test_an_interruption_between_two_renames_keeps_what_was_there(source, tmp_path, monkeypatch):
    out, killed_before = tmp_path / "prepared", tmp_path / f".prepared.writing-{os.getpid()}"
    killed_before.mkdir()
    prepare("simulated", source, out)
    rename = Path.rename

    def interrupted(self, target):
        if target == out and ".writing-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("simulated", source, out)

    assert [f.parent.name for f in tmp_path.rglob("dataset.json")] == ["prepared"]


def test_what_killed_calls_left_is_removed_and_nothing_of_a_living_one(source, tmp_path):
    for name in ("writing-dead", "writing-living", "old-done"):
        (tmp_path / f".prepared.{name}" / "spill").mkdir(parents=True)
    living = os.open(tmp_path / ".prepared.writing-living", os.O_RDONLY)
    fcntl.flock(living, fcntl.LOCK_EX)

    prepare("simulated", source, tmp_path / "prepared")

    assert {path.name for path in tmp_path.iterdir()} == {"prepared", ".prepared.writing-living"}
    os.close(living)


def test_data_whose_replacement_was_killed_between_two_renames_get_their_name_back(source, tmp_path, monkeypatch):
    out = tmp_path / "prepared"
    prepare("simulated", source, out)
    before = (out / "dataset.json").read_bytes()
    out.rename(tmp_path / ".prepared.old-1")
    (tmp_path / ".prepared.writing-1").mkdir()
    monkeypatch.setattr(module, "golden_requests", lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        prepare("simulated", source, out)

    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]
    assert (out / "dataset.json").read_bytes() == before


def test_prepared_data_are_not_replaced_where_runs_or_raw_files_would_go_with_them(source, tmp_path):
    out = tmp_path / "prepared"
    prepare("simulated", source, out)

    with pytest.raises(UserError, match=r"raw: lies in .*prepared, which is replaced"):
        prepare("simulated", out / "raw", out)
    (out / "run").mkdir()
    with pytest.raises(UserError, match="expected a prepared folder and nothing else in it, .* found run"):
        prepare("simulated", source, out)

    assert (out / "raw" / "users.parquet").exists()


def test_a_folder_with_something_else_in_it_is_not_replaced(source, tmp_path):
    (tmp_path / "thesis.txt").touch()

    with pytest.raises(UserError, match="expected a new, an empty or a prepared folder"):
        prepare("simulated", source, tmp_path)
    with pytest.raises(UserError, match=r"thesis.txt/out: expected a folder that can be made"):
        prepare("simulated", source, tmp_path / "thesis.txt" / "out")


def test_an_unknown_data_set_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"movielens-1m, .*frappe, .*simulated.*got criteos"):
        prepare("criteos", tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="got both frappe and"):
        prepare("frappe", tmp_path, tmp_path / "out", tmp_path / "log.yaml")
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        prepare("simulated", tmp_path / "nowhere", tmp_path / "out")


@pytest.fixture(scope="module")
def golden(data):
    return [request_from_json(values) for values in json.loads((data / "golden.json").read_text())]


def test_golden_requests_encode_to_what_the_disk_holds(data, schema, golden):
    test = pl.read_parquet(data / "raw" / "test.parquet")
    events = {f.stem: np.load(f) for f in (data / "events").iterdir()}
    encoder = Encoder(schema)
    compared = 0
    for request in golden[:-4]:
        here = (test["user"] == request.user["user_id"]) & (test["ts"] == request.ts)
        for row in np.flatnonzero((here & (test["item"] == request.items["ad_id"][0])).to_numpy()):
            encoded = encoder.encode(request)
            bounds = [np.load(data / "test" / f"{name}.npy")[row : row + 1] for name in ("start", "end", "ts")]
            for name, array in encoder.window(events, *bounds).items():
                np.testing.assert_array_equal(array, encoded[name])
            for name in ("user.age", "ctx.hour", "ctx.device"):
                assert np.load(data / "test" / f"{name}.npy")[row] == encoded[name][0]
            for name in ("item.ad_id", "item.price", "item.tags"):
                np.testing.assert_array_equal(np.load(data / "test" / f"{name}.npy")[row], encoded[name][0])
            compared += 1
    assert compared >= 10


def test_golden_requests_hold_the_usual_and_the_awkward(schema, golden):
    encoder = Encoder(schema)

    arrays = [encoder.encode(request) for request in golden]

    lengths = [int(a["hist_mask"].sum()) for a in arrays]
    no_history, nobody, unknown, missing = arrays[-4:]
    assert len(golden) == NUM_REQUESTS
    assert {request.num_items for request in golden} == {1, 2, 3, 4}
    assert max(len(request.behaviours) for request in golden) == schema.history_length + 1
    assert max(lengths) == schema.history_length
    assert lengths[-4:-2] == [0, 0]
    assert no_history["user.user_id"][0] != OOV
    assert golden[-3].user == {"user_id": UNKNOWN}
    assert nobody["user.user_id"][0] == OOV
    assert nobody["user.age"][0] == PAD
    for name in ("user.age", "ctx.device", "item.category", "item.tags"):
        assert unknown[name].flat[0] == OOV
        assert missing[name].flat[0] == PAD
    assert unknown["item.price"][0] > 0
    assert missing["item.price"][0] == 0
    assert (unknown["hist.category"][unknown["hist_mask"]] == OOV).all()
    assert (missing["hist.category"] == PAD).all()
