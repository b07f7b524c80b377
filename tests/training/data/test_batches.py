import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.features.history import Event, history
from tests.training.tiny import LENGTH, write_prepared
from training.data.batches import Prepared, in_order, num_batches, shuffled
from training.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Prepared.open(write_prepared(tmp_path_factory.mktemp("data") / "tiny", num_rows=500))


def test_a_batch_has_every_input_of_the_schema_with_its_type_and_shape(data):
    rows = data.rows("train")

    inputs, label_B, _ = rows.take(np.array([3, 1, 4]))

    assert label_B.dtype == torch.float32
    assert inputs.keys() == {i.name for i in data.schema.inputs}
    for wanted in data.schema.inputs:
        shape = [3 if dim in ("U", "C") else dim for dim in wanted.dims]
        assert list(inputs[wanted.name].shape) == shape
        assert str(inputs[wanted.name].dtype) == f"torch.{wanted.dtype}"
    assert inputs["item.item_id"].tolist() == rows.inputs["item.item_id"][[3, 1, 4]].tolist()
    assert inputs["user.user_id"][inputs["user_index"]].tolist() == rows.inputs["user.user_id"][[3, 1, 4]].tolist()


def test_batches_in_order_are_the_files_as_they_stand(data):
    rows = data.rows("valid")

    batches = list(in_order(rows, 7))

    assert [len(b.label_B) for b in batches] == [7] * 14 + [2]
    assert torch.cat([b.label_B for b in batches]).tolist() == rows.label.tolist()
    found = torch.cat([b.inputs["item.item_id"] for b in batches])
    assert found.tolist() == np.load(data.path / "valid" / "item.item_id.npy").tolist()


def test_ages_are_the_seconds_from_each_click_to_its_row(data):
    rows = data.rows("test")
    ts, clicked_at = (np.load(data.path / folder / "ts.npy") for folder in ("test", "events"))

    inputs, *_ = rows.take(np.arange(len(rows)))

    assert inputs["hist_age"].dtype == torch.int64
    for row in range(len(rows)):
        ages = [ts[row] - at for at in clicked_at[rows.start[row] : rows.end[row]]][-LENGTH:]
        assert inputs["hist_age"][row].tolist() == [0] * (LENGTH - len(ages)) + ages
    assert inputs["hist_age"].max() > 900


def test_histories_are_each_users_last_clicks_before_the_row(data):
    rows = data.rows("test")
    first = data.schema.field("item_id")

    inputs, *_ = rows.take(np.arange(len(rows)))

    for row in range(len(rows)):
        clicks = [Event(item=str(e), ts=float(e), features={}) for e in range(rows.start[row], rows.end[row])]
        kept = [int(e.ts) for e in history(clicks, before=float("inf"), limit=LENGTH)]
        expected = [0] * (LENGTH - len(kept)) + rows.events["hist.item_id"][kept].tolist()
        assert inputs["hist.item_id"][row].tolist() == expected
        assert inputs["hist_mask"][row].tolist() == [False] * (LENGTH - len(kept)) + [True] * len(kept)
    assert inputs["hist.item_id"].max() < first.num_ids


@pytest.fixture(scope="module")
def slates(data):
    """The training rows as if the candidates had been shown four at a time, each four to the first one's user."""
    rows = data.rows("train")
    first = np.arange(len(rows)) // 4 * 4
    users = {name: array if name.startswith("item.") else array[first] for name, array in rows.inputs.items()}
    return replace(
        rows, inputs=users, request=first // 4, start=rows.start[first], end=rows.end[first], ts=rows.ts[first]
    )


def test_rows_of_one_request_share_their_user(slates):
    chosen = np.array([9, 0, 8, 3, 17])

    together, label_B, _ = slates.take(chosen)

    user_index = together["user_index"]
    assert len(together["user.user_id"]) == 3
    for n, row in enumerate(chosen):
        alone, label_1, _ = slates.take(np.array([row]))
        assert label_B[n] == label_1[0]
        for name, values in alone.items():
            if name != "user_index":
                own = together[name][n if name.startswith("item.") else user_index[n]]
                assert torch.equal(own, values[0])


def test_shuffling_keeps_the_rows_of_a_request_together(slates):
    whole = slates.take(np.arange(len(slates))).inputs["item.price"].tolist()
    request_of = {price: row // 4 for row, price in enumerate(whole)}

    prices = torch.cat([b.inputs["item.price"] for b in shuffled(slates, 64, seed=1, epoch=0)]).tolist()

    order = [request_of[price] for price in prices]
    assert order == [r for r in dict.fromkeys(order) for _ in range(4)]
    assert order != sorted(order)


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own(data):
    rows = data.rows("train")
    position = {tuple(v): n for n, v in enumerate(zip(rows.inputs["item.price"], rows.end, strict=True))}

    def visited(seed, epoch):
        batches = list(shuffled(rows, 64, seed=seed, epoch=epoch))
        prices = torch.cat([b.inputs["item.price"] for b in batches]).tolist()
        return [len(b.label_B) for b in batches], prices

    sizes, prices = visited(1, 0)

    assert len(position) == len(rows)
    assert sorted(prices) == sorted(rows.inputs["item.price"].tolist())
    assert len(sizes) == num_batches(len(rows), 64) == 5
    assert set(sizes) == {60}
    assert visited(1, 0) == (sizes, prices)
    assert visited(1, 1)[1] != prices
    assert visited(2, 0)[1] != prices


@pytest.mark.parametrize("skip", [0, 1, 4, 5])
def test_skipping_batches_leaves_the_others_as_they_were(data, skip):
    rows = data.rows("train")
    whole = [b.inputs["item.price"].tolist() for b in shuffled(rows, 64, seed=1, epoch=2)]

    rest = [b.inputs["item.price"].tolist() for b in shuffled(rows, 64, seed=1, epoch=2, skip=skip)]

    assert rest == whole[skip:]


def test_a_folder_that_is_no_prepared_data_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no prepared data set \(schema.json: No such file"):
        Prepared.open(tmp_path)


def test_damaged_data_is_refused_naming_the_file(tmp_path):
    folder = write_prepared(tmp_path / "tiny", num_rows=100)
    (folder / "train" / "label.npy").unlink()
    np.save(folder / "valid" / "label.npy", np.zeros(3, np.float32))
    (folder / "golden.json").write_text(json.dumps([{"user": {}}]))
    data = Prepared.open(folder)

    with pytest.raises(UserError, match=r"train/label\.npy"):
        data.rows("train")
    with pytest.raises(UserError, match="different lengths"):
        data.rows("valid")
    with pytest.raises(UserError, match=r"golden\.json"):
        data.golden_requests()


@pytest.mark.parametrize("file", ["label", "start"])
def test_an_empty_file_is_one_clear_error(tmp_path, file):
    data = write_prepared(tmp_path / "data", num_rows=200)
    (data / "train" / f"{file}.npy").write_bytes(b"")

    with pytest.raises(UserError, match=f"{file}.npy: missing or damaged"):
        Prepared.open(data).rows("train")


@pytest.mark.parametrize("folder", ["train", "events"])
def test_data_prepared_before_there_were_ages_is_refused(tmp_path, folder):
    data = write_prepared(tmp_path / "data", num_rows=200)
    (data / folder / "ts.npy").unlink()

    with pytest.raises(UserError, match=rf"{folder}/ts.npy: missing or damaged, prepare the data set again"):
        Prepared.open(data).rows("train")


def test_histories_of_other_rows_are_refused(tmp_path):
    data = write_prepared(tmp_path / "data", num_rows=200)
    np.save(data / "train" / "end.npy", np.load(data / "train" / "end.npy")[:-1])

    with pytest.raises(UserError, match="arrays have different lengths"):
        Prepared.open(data).rows("train")


@pytest.mark.parametrize("content", ["", "[]", "{}", "[1]", "[{}]"])
def test_damaged_golden_requests_are_one_clear_error(tmp_path, content):
    data = write_prepared(tmp_path / "data", num_rows=200)
    (data / "golden.json").write_text(content)

    with pytest.raises(UserError, match="golden.json: .*damaged, prepare the data set again"):
        Prepared.open(data).golden_requests()


def test_data_that_were_prepared_anew_while_in_use_are_refused(tmp_path):
    data = Prepared.open(write_prepared(tmp_path / "data"))
    shutil.rmtree(tmp_path / "data")
    write_prepared(tmp_path / "data", seed=1)

    with pytest.raises(UserError, match="was prepared anew, with other rows or options, while it was in use"):
        data.rows("test")
