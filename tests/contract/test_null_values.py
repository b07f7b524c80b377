"""Spellings of an absent value: one in a CSV or Parquet file is the same sent over HTTP, stored, or loaded in bulk."""

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from models.features.encoder import Encoder
from models.features.field import OOV, PAD, FieldSpec
from models.features.request import Request
from models.features.schema import Schema, SchemaSpec
from models.features.values import NULL_VALUES, Columns, Value, is_null_text
from service.http.schemas import PredictRequest, scoring_request
from service.ingest.bulk_load import load_behaviours
from service.scoring.request import ScoringRequest
from service.store.memory_store import MemoryStore
from training.data.batches import PARTS, Prepared
from training.data.prepare import prepare
from training.datasets import spelling

START, NUM = 1_700_000_000, 100
NAMED = ("", "?", "-1.0")
TEXTS = ["tv", "phone", "null", "none", *NULL_VALUES, " NULL ", "\\N ", "?", " ?", "-1", "-1.0", "1", "007"]
DESCRIPTION: dict[str, Any] = {
    "label": "clicked", "user": "user_id", "item": "ad", "timestamp": "at", "history_length": 3,
    "split": {"by": "hash", "valid": 0.2, "test": 0.2},
    "fields": [
        {"name": "user_id", "kind": "categorical", "group": "user"},
        {"name": "device", "kind": "categorical", "group": "context", "min_count": 2},
        {"name": "tags", "kind": "multi", "group": "context"},
        {"name": "coins", "kind": "numeric", "group": "context"},
        {"name": "level", "kind": "categorical", "group": "context", "discretise": "winners"},
        {"name": "ad", "kind": "categorical", "group": "item"},
        {"name": "brand", "kind": "categorical", "group": "item"},
        *({"name": n, "kind": "sequence", "group": "behaviour", "of": n} for n in ("ad", "device", "tags", "coins")),
    ],
}  # fmt: skip
CONTEXT = ("device", "tags", "coins", "level")


def rows() -> list[dict[str, Any]]:
    chance = random.Random(3)
    return [
        {
            "clicked": n % 2, "user_id": f"u{n % 4}", "at": START + 60 * n, "ad": f"a{chance.randrange(5)}",
            "brand": chance.choice(TEXTS), "device": chance.choice(TEXTS),
            "tags": [text.strip() for text in chance.choices(TEXTS, k=chance.randrange(4))],
            "coins": chance.choice([-1, 0.5, 20, 300.0, None]), "level": chance.choice([-1, 3, 20, 300.0, None]),
        }
        for n in range(NUM)
    ]  # fmt: skip


@pytest.fixture(scope="module", params=[("csv", NULL_VALUES), ("parquet", NAMED)], ids=["csv", "parquet"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder, (form, null_values) = tmp_path_factory.mktemp("nulls"), request.param
    (folder / "log.yaml").write_text(yaml.safe_dump(DESCRIPTION | {"null_values": list(null_values)}))
    table = pl.DataFrame(rows(), schema_overrides={"coins": pl.Float64, "level": pl.Float64}, strict=False)
    if form == "csv":
        table.with_columns(pl.col("tags").list.join("|")).write_csv(folder / "log.csv")
    else:
        table.write_parquet(folder / "log.parquet")
    prepare(None, folder / f"log.{form}", folder / "data", folder / "log.yaml")
    return Prepared.open(folder / "data")


def request_of(row: dict[str, Any]) -> ScoringRequest:
    """What the service makes of a row that a client sends."""
    candidate = {"id": row["ad"], "features": {"brand": row["brand"]}}
    body = {
        "ts": row["at"], "user": {"id": row["user_id"]}, "context": {name: row[name] for name in CONTEXT},
        "candidates": [candidate],
    }  # fmt: skip
    sent = msgspec.json.decode(json.dumps(body), type=PredictRequest)
    return scoring_request(sent, now=0.0, max_candidates=1)


async def test_a_row_sent_as_json_is_encoded_as_the_file_was_and_so_are_its_clicks_from_the_store(
    data: Prepared, tmp_path: Path
) -> None:
    encoder, store = Encoder(data.schema), MemoryStore()
    clicks = pl.DataFrame([row for row in rows() if row["clicked"]], schema_overrides={"coins": pl.Float64})
    renamed = clicks.select(pl.col("user_id").alias("user"), pl.col("ad").alias("item"), pl.col("at").alias("ts"))
    renamed.with_columns(clicks.select(CONTEXT)).write_parquet(tmp_path / "clicks.parquet")
    await load_behaviours(tmp_path / "clicks.parquet", store)
    by_time = {row["at"]: row for row in rows()}

    for part in PARTS:
        encoded, times = data.rows(part), np.load(data.path / part / "ts.npy")
        for place, at in enumerate(times.tolist()):
            row, inputs = by_time[int(at)], encoded.take(np.array([place])).inputs
            asked = request_of(row)
            stored = await store.fetch(row["user_id"], [], before=at, limit=3)
            arrays = encoder.encode(
                Request(
                    user={"user_id": asked.user}, context=asked.context, ts=asked.ts, behaviours=stored.behaviours,
                    items={"ad": asked.candidates.ids, "brand": asked.candidates.column("brand")}, num_items=1,
                )
            )  # fmt: skip
            for name, array in arrays.items():
                np.testing.assert_array_equal(array, inputs[name].numpy(), err_msg=f"{name} of {row}")


@pytest.mark.parametrize("null_values", [NULL_VALUES, NAMED])
@given(text=st.sampled_from(TEXTS) | st.text(max_size=3))
def test_a_table_and_the_encoder_call_the_same_text_absent(null_values: tuple[str, ...], text: str) -> None:
    present = pl.select(spelling.present(pl.lit(text), null_values)).item()

    assert (present is None) == is_null_text(text, null_values)


@lru_cache
def schema_with(null_values: tuple[str, ...]) -> Schema:
    kinds: dict[str, Any] = {
        "word": {"kind": "categorical"},
        "words": {"kind": "multi", "max_values": 3},
        "number": {"kind": "numeric"},
        "level": {"kind": "categorical", "discretise": "log_square"},
    }
    groups = (("context", "c_"), ("item", "i_"))
    fields = [
        FieldSpec(name=prefix + name, group=group, null_values=null_values, **kind)
        for group, prefix in groups
        for name, kind in kinds.items()
    ]
    values: dict[str, list[Value]] = {
        "word": ["tv", "?", -1, 5], "words": [["tv", "?"], [-1], [5], []], "number": [0, 2, -1, 4],
        "level": [0, 3, -1, 20],
    }  # fmt: skip
    columns: Columns = {prefix + name: column for _, prefix in groups for name, column in values.items()}
    return SchemaSpec(fields=tuple(fields)).fit(columns)


TEXT_VALUE = st.sampled_from(["?", " ? ", "-1", "-1.0", "tv", "5", "new", ""])
NUMBER = st.sampled_from([-1, -1.0, 0, 0.5, 5, 2.5, 1e9])


@given(word=TEXT_VALUE | NUMBER, words=st.lists(TEXT_VALUE | NUMBER, max_size=4), number=NUMBER)
def test_a_null_value_is_encoded_as_nothing_in_every_kind_of_field_alone_and_in_a_column(
    word: Value, words: list[Any], number: float
) -> None:
    encoder, without = Encoder(schema_with(NAMED)), Encoder(schema_with(()))
    values: dict[str, Value] = {"word": word, "words": words, "number": number, "level": number}

    def encoded(by: Encoder, row: dict[str, Value]) -> dict[str, np.ndarray]:
        items: Columns = {f"i_{name}": [value] for name, value in row.items()}
        return by.encode(
            Request(
                user={}, context={f"c_{n}": v for n, v in row.items()}, ts=0.0, behaviours=(), items=items, num_items=1
            )
        )

    def is_null(value: Any) -> bool:
        return value == -1 or (isinstance(value, str) and value.strip() in ("", "?", "-1", "-1.0"))

    arrays = encoded(encoder, values)

    plain: dict[str, Value] = {name: None if is_null(value) else value for name, value in values.items()}
    plain["words"] = [value for value in words if not is_null(value)]
    for name, array in encoded(encoder, plain).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    for name in ("word", "words", "number", "level"):
        np.testing.assert_array_equal(arrays[f"ctx.c_{name}"], arrays[f"item.i_{name}"], err_msg=name)
    if is_null(word) and word not in ("", " ? ", "-1.0"):
        assert encoded(without, values)["item.i_word"] > OOV  # without null values it is known
        assert arrays["item.i_word"] == PAD


def test_a_schema_learns_nothing_from_null_values() -> None:
    schema = schema_with(NAMED)

    assert schema.field("i_word").vocabulary == ("5", "tv")
    assert schema.field("i_words").vocabulary == ("5", "tv")
    assert schema.field("i_number").shift == 2  # of 0, 2 and 4
    assert schema.field("i_level").vocabulary == ("-1", "2", "5")  # of 0, 3 and 20: the level -1 is no null value


def test_a_schema_of_before_null_values_were_in_it_encodes_as_it_did() -> None:
    old = schema_with(())

    assert "null_values" not in old.to_json()
    ids = Encoder(Schema.from_json(old.to_json())).encode_items({"i_word": ["NULL", "?", None]}, 3)["item.i_word"]
    assert ids.tolist() == [OOV, 4, PAD]  # its vocabulary is -1, 5, ? and tv
