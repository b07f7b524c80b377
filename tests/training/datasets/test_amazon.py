"""Amazon reviews, from each of their forms to a log, and from there to a first step of training."""

import gzip
import json

import numpy as np
import polars as pl
import pytest
import torch

from models import zoo
from tests.shared_data import real
from training.data.batches import Prepared
from training.data.prepare import prepare
from training.datasets import amazon
from training.datasets.amazon import AmazonOptions
from training.errors import UserError

DAY = 86400
ITEMS = [f"B{item:03}" for item in range(12)]
CATEGORIES = {item: ["Tea", "Men's Food", 'The "Best"', "Oil"][number % 4] for number, item in enumerate(ITEMS)}


def purchases():
    """(user, item, day), not in time order: user u buys u + 1 items, two on one day now and then."""
    rng = np.random.default_rng(0)
    return [
        (f"A{u}", ITEMS[i], (n * 2 // 3 + u % 3)) for u in range(9) for n, i in enumerate(rng.permutation(12)[: u + 1])
    ]


def review(user, item, day, **more):
    text = 'Says \\"asin": "B999", \'unixReviewTime\': 1 and ]] {}'
    return {"reviewerID": user, "asin": item, "reviewText": text, "overall": 5.0, "unixReviewTime": day * DAY, **more}


@pytest.fixture
def source(tmp_path):
    lines = [json.dumps(review(*purchase)) for purchase in purchases()]
    with gzip.open(tmp_path / "reviews_Grocery_5.json.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    # As they were published: Python's spelling, not JSON.
    metas = [
        repr(
            {
                "asin": item,
                "title": "Men's",
                "related": {"also_bought": ["B007"]},
                "categories": [["Grocery"], ["Food", c]],
            }
        )
        for item, c in CATEGORIES.items()
    ]
    (tmp_path / "meta_Grocery.json").write_text("\n".join(metas) + "\n")
    return tmp_path


def test_reviews_are_clicks_in_time_order_with_the_last_category_of_their_item(source):
    rows = amazon.load(source).rows.collect()

    clicks = rows.filter(pl.col("label") == 1)
    expected = sorted(purchases(), key=lambda purchase: purchase[2])
    assert clicks.select("user", "item", "ts").rows() == [(user, item, day * DAY) for user, item, day in expected]
    assert dict(rows.select("item", "category").rows()) == CATEGORIES


def test_a_negative_shares_all_but_the_item_and_was_never_bought(source):
    rows = amazon.load(source, AmazonOptions(negatives=3)).rows.collect()

    bought = {(user, item) for user, item, _ in purchases()}
    assert rows["label"].to_list() == [1, 0, 0, 0] * len(bought)
    assert not bought & set(rows.filter(pl.col("label") == 0).select("user", "item").rows())
    for first in range(0, rows.height, 4):
        assert rows[first : first + 4].select("user", "ts", "part").n_unique() == 1


def test_each_users_last_purchase_is_tested_and_the_one_before_validates(source):
    rows = amazon.load(source, AmazonOptions(protocol="last")).rows.collect().filter(pl.col("label") == 1)

    for number in range(9):
        parts = rows.filter(pl.col("user") == f"A{number}")["part"].to_list()
        late = ["valid", "test"] if number >= 2 else []
        assert parts == ["train"] * (number + 1 - len(late)) + late


def test_by_time_no_part_begins_before_the_one_before_it_ends(source):
    rows = amazon.load(source, AmazonOptions(protocol="time")).rows.collect()

    spans = {part: rows.filter(pl.col("part") == part)["ts"].to_numpy() for part in ("train", "valid", "test")}
    assert spans["train"].max() < spans["valid"].min()
    assert spans["valid"].max() < spans["test"].min()


def test_what_is_bought_more_is_drawn_more_where_asked_for(tmp_path):
    lines = ["user_id\titem_id\ttime"]
    lines += [f"{user}\t{1 + (user % 50 == 0)}\t{user * DAY}" for user in range(1, 2000)]
    lines += [f"{user}\t3\t{user * DAY}" for user in range(2000, 4000)]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")

    rows = amazon.load(tmp_path, AmazonOptions(sampling="popularity")).rows.collect()

    drawn = rows.filter((pl.col("label") == 0) & (pl.col("user").cast(pl.Int64) >= 2000))["item"]
    assert (drawn == "2").mean() == pytest.approx(39 / 1999, abs=0.012)
    assert set(drawn) == {"1", "2"}


def test_the_three_forms_hold_the_same_purchases(source, tmp_path):
    ids = [(int(user[1:]), int(item[1:]), day * DAY) for user, item, day in purchases()]
    table = pl.DataFrame(ids, schema=["user", "item", "timestamp"], orient="row")
    csv, parquet = tmp_path / "csv", tmp_path / "parquet"
    csv.mkdir()
    parquet.mkdir()
    table.rename({"user": "user_id", "item": "item_id", "timestamp": "time"}).write_csv(
        csv / "train.csv", separator="\t"
    )
    table.write_parquet(parquet / "interactions.parquet")

    reviews, text, binary = (
        amazon.load(folder).rows.collect().filter(pl.col("label") == 1) for folder in (source, csv, parquet)
    )

    number = pl.col("user", "item").str.strip_chars_start("AB").cast(pl.Int64)
    columns = [number, pl.col("ts"), pl.col("part")]
    assert reviews.select(columns).equals(text.select(columns))
    assert text.equals(binary)
    assert "category" not in text.columns


def test_a_category_file_that_lacks_items_is_noted(source):
    (source / "meta_Grocery.json").write_text(json.dumps({"asin": "B000", "categories": [["Tea"]]}) + "\n")

    log = amazon.load(source)

    assert log.notes == ("11 items have no category in meta_Grocery.json",)
    assert set(log.rows.collect().filter(pl.col("item") == "B000")["category"]) == {"Tea"}


@pytest.mark.parametrize(("late_s", "clock"), [(0, ["weekday", "month"]), (3_600, ["hour", "weekday", "month"])])
def test_the_context_is_the_reviews_clock_with_an_hour_where_times_are_not_all_midnight(tmp_path, late_s, clock):
    table = pl.DataFrame({"user": [1, 1, 2, 2], "item": [1, 2, 3, 4], "timestamp": [0, DAY, 2 * DAY, 3 * DAY + late_s]})
    table.write_parquet(tmp_path / "interactions.parquet")

    fields = [field for field in amazon.load(tmp_path).spec.fields if field.group == "context"]

    assert [field.name for field in fields] == [field.part for field in fields] == clock


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("reviews_A_5.json", '{"reviewerID": "A", "asin": "B", "unixReviewTime": 1}\n{"as', "json, line 2: expected a"),
        ("reviews_A_5.json", '{"reviewerID": "A", "asin": "B"}\n', "json, line 1: expected a JSON object with "),
        ("reviews_A_5.json", '{"reviewerID": "A", "asin": "B", "unixReviewTime": "yesterday"}\n', "json, line 1: "),
        ("reviews_A_5.json", '{"reviewerID": "", "asin": "B", "unixReviewTime": 1}\n', "json, line 1: "),
        ("reviews_A_5.json", "", "json, line 1: expected a row, got an empty file"),
        ("meta_Grocery.json", "{'asin': 'B0', 'categories': [['Tea']]}\n{'asin': 'B1', ", "json, line 2: expected an"),
        ("meta_Grocery.json", "{'asin': 'B0', 'categories': [['Tea']]}\n" * 2, "json: holds item B0 more than once"),
        ("train.csv", "user_id\titem_id\ttime\n1\t2\n", "csv, line 2: expected"),
        ("train.csv", "user_id,item_id,time\n1,2,3\n", "csv, line 1: expected a header with"),
        ("train.csv", "user_id\titem_id\ttime\n1\t2\t1396720544263\n", "csv: expected times in Unix seconds, got 139"),
        ("interactions.parquet", "user,item", "parquet: expected a Parquet file with user, item and timestamp"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_told(source, file, content, message):
    if not file.startswith("meta"):
        (source / "reviews_Grocery_5.json.gz").unlink()
    (source / file).write_text(content)

    with pytest.raises(UserError, match=f"{file.split('.')[0]}.{message}"):
        amazon.load(source)


def test_a_time_far_before_there_were_reviews_is_told(source):
    (source / "reviews_Grocery_5.json.gz").unlink()
    pl.DataFrame({"user": [1], "item": [2], "timestamp": [-(2**62)]}).write_parquet(source / "interactions.parquet")

    with pytest.raises(UserError, match="expected times in Unix seconds, got -46"):
        amazon.load(source)


def test_a_packed_file_that_ends_too_soon_is_told(source):
    file = source / "reviews_Grocery_5.json.gz"
    file.write_bytes(file.read_bytes()[:-40])

    with pytest.raises(UserError, match=r"reviews_Grocery_5.json.gz: expected text in UTF-8"):
        amazon.load(source)


def test_a_folder_with_two_reviews_or_none_is_told(source, tmp_path):
    (source / "reviews_Books_5.json").write_text("")
    with pytest.raises(
        UserError, match=r"expected one file reviews_\*.json, found reviews_Books_5.json, reviews_Grocery_5.json.gz"
    ):
        amazon.load(source)
    with pytest.raises(UserError, match=r"nowhere: expected a folder with reviews_\*.json"):
        amazon.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "options",
    [{"protocol": "random"}, {"sampling": "zipf"}, {"negatives": 0}, {"history_length": 101}, {"seed": -1}],
)
def test_an_option_that_cannot_be_is_told(options):
    with pytest.raises(UserError, match=f"{next(iter(options))} is "):
        AmazonOptions(**options)


def test_a_model_can_be_trained_on_what_was_prepared(source, tmp_path):
    about = prepare("amazon", source, tmp_path / "prepared")
    assert about["num_events"] == len(purchases())
    assert about["click_rate"] == {"train": 0.5, "valid": 0.5, "test": 0.5}
    data = Prepared.open(tmp_path / "prepared")
    batch = data.rows("train").take(np.arange(about["num_rows"]["train"]))
    model = zoo.build("din", {"emb_dim": 4}, data.schema)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(batch.inputs), batch.label_B)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < losses[0]


def test_a_history_holds_the_earlier_days_and_nothing_of_the_same_day(source, tmp_path):
    prepare("amazon", source, tmp_path / "prepared", settings=["negatives=2", "history_length=5"])

    rows = amazon.load(source, AmazonOptions(negatives=2)).rows.collect().sort("ts", maintain_order=True)
    by_part = {part: rows.filter(pl.col("part") == part) for part in ("train", "valid", "test")}
    for part, mine in by_part.items():
        starts, ends = (np.load(tmp_path / "prepared" / part / f"{name}.npy") for name in ("start", "end"))
        earlier = [
            sum(user == row["user"] and day * DAY < row["ts"] for user, _, day in purchases())
            for row in mine.to_dicts()
        ]
        np.testing.assert_array_equal(ends - starts, earlier)


def test_the_real_groceries_are_read_whole():
    log = amazon.load(real("amazon_grocery"))

    rows = log.rows.collect()
    clicks = rows.filter(pl.col("label") == 1)
    assert (clicks.height, rows.height) == (121_892, 243_784)
    assert (clicks["user"].n_unique(), clicks["item"].n_unique(), rows["category"].n_unique()) == (14_681, 8_687, 56)
    assert rows["category"].null_count() == 0
    assert [field.name for field in log.spec.fields if field.group == "context"] == ["weekday", "month"]
    assert log.notes == ()
    assert dict(clicks["part"].value_counts().rows()) == {"train": 92_530, "valid": 14_681, "test": 14_681}
    negatives = rows.filter(pl.col("label") == 0)
    assert negatives.join(clicks, on=["user", "item"], how="semi").is_empty()


def test_the_real_beauty_purchases_are_read_whole():
    log = amazon.load(real("seqrec/amazon2014-beauty"), AmazonOptions(protocol="time", sampling="popularity"))

    rows = log.rows.collect()
    assert rows["label"].sum() == 198_215
    test = rows.filter(pl.col("part") == "test")
    assert test.height / rows.height == pytest.approx(0.1, abs=0.005)
    earlier = rows.filter(pl.col("part") != "test")["ts"].to_numpy()
    assert earlier.max() < test["ts"].to_numpy().min()
