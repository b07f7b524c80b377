"""Files go into the store as they are, once, and a wrong file is refused in one sentence."""

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from service.ingest.bulk_load import LoadError, load_behaviours, load_features
from service.store.codec import unpack_row
from service.store.memory_store import MemoryStore
from service.store.redis_store import RedisStore


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def parquet(folder: Path, columns: Mapping[str, Any]) -> Path:
    file = folder / "rows.parquet"
    pl.DataFrame(columns).write_parquet(file)
    return file


async def past(store: MemoryStore | RedisStore, user: str) -> list[tuple[str, float, dict[str, Any]]]:
    fetched = await store.fetch(user, [], before=1e12, limit=1000)
    return [(e.item, e.ts, dict(e.features)) for e in fetched.behaviours]


CLICKS = {"user": [1, 2, 1, 1], "item": [10, 10, 20, 10], "ts": [5, 6, 3, 5]}


async def test_clicks_are_loaded_per_user_in_time_order(store: MemoryStore, tmp_path: Path):
    new = await load_behaviours(parquet(tmp_path, CLICKS), store)

    assert new == 4
    assert await past(store, "1") == [("20", 3.0, {}), ("10", 5.0, {}), ("10", 5.0, {})]
    assert await past(store, "2") == [("10", 6.0, {})]


async def test_loading_a_file_again_or_in_another_order_changes_nothing(store: MemoryStore, tmp_path: Path):
    await load_behaviours(parquet(tmp_path, CLICKS), store)
    before = await past(store, "1")

    again = await load_behaviours(parquet(tmp_path, {name: values[::-1] for name, values in CLICKS.items()}), store)

    assert again == 0
    assert await past(store, "1") == before


async def test_clicks_take_the_items_stored_features_unless_the_file_has_its_own(store: MemoryStore, tmp_path: Path):
    await store.put_items({"10": {"genre": "war", "year": 1990}})

    await load_behaviours(parquet(tmp_path, {"user": ["a"], "item": ["10"], "ts": [1.5]}), store)
    await load_behaviours(
        parquet(tmp_path, {"user": ["b"], "item": ["10"], "ts": [1.5], "genre": ["own"], "tags": [["x", "y"]]}), store
    )

    assert await past(store, "a") == [("10", 1.5, {"genre": "war", "year": 1990})]
    assert await past(store, "b") == [("10", 1.5, {"genre": "own", "year": 1990, "tags": ["x", "y"]})]


async def test_only_clicks_of_a_mixed_file_count(store: MemoryStore, tmp_path: Path):
    columns = {"user": ["a", "a"], "item": ["1", "2"], "ts": [1, 2], "type": ["impression", "click"]}

    new = await load_behaviours(parquet(tmp_path, columns), store)

    assert new == 1
    assert await past(store, "a") == [("2", 2.0, {})]


async def test_given_event_ids_decide_what_is_a_repetition(store: MemoryStore, tmp_path: Path):
    columns = {"user": ["a", "a", "a"], "item": ["1", "1", "2"], "ts": [1, 1, 2], "event_id": ["x", "x", "y"]}

    assert await load_behaviours(parquet(tmp_path, columns), store) == 2


async def test_features_are_loaded_for_users_and_items(store: MemoryStore, tmp_path: Path):
    users = {"age": [25, None], "user": ["a", "b"]}
    items = {"movie": [7, 8], "year": [1990.0, 2000.0], "genres": [["war", "drama"], []]}

    assert await load_features("users", parquet(tmp_path, users), store) == 2
    assert await load_features("items", parquet(tmp_path, items), store) == 2

    fetched = await store.fetch("a", ["7", "8"], before=0, limit=1)
    assert fetched.user == {"age": 25}
    assert [unpack_row(packed) for packed in fetched.items] == [
        {"year": 1990.0, "genres": ["war", "drama"]},
        {"year": 2000.0, "genres": []},
    ]
    assert (await store.fetch("b", [], before=0, limit=1)).user == {}


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({}, "no column"),
        ({"user": ["a"], "ts": [1]}, "no column item; there are user, ts"),
        ({"user": ["a"], "item": ["1"], "ts": ["noon"]}, "column ts: expected Unix seconds, got String"),
        ({"user": ["a"], "item": ["1"], "ts": [-1.0]}, "row 0: ts: expected Unix seconds, got -1.0"),
        ({"user": ["a"], "item": ["1"], "ts": [1_700_000_000_000]}, "row 0: ts: expected Unix seconds, got 17000"),
        (
            {"user": ["a"], "item": ["1"], "ts": [1], "type": ["video"]},
            "column type: expected click or impression, got video; call a feature otherwise",
        ),
        ({"user": ["a"], "item": ["1"], "ts": [1], "type": [3]}, "column type: expected click or impression, got 3"),
        ({"user": ["a", "a"], "item": ["1", "1"], "ts": [1, None]}, "row 1: ts: expected Unix seconds, got None"),
        ({"user": ["a", None], "item": ["1", "1"], "ts": [1, 1]}, "row 1: column user: expected an id .*got None"),
        ({"user": ["a"], "item": [""], "ts": [1]}, "row 0: column item: expected an id .*got ''"),
        ({"user": ["a" * 257], "item": ["1"], "ts": [1]}, "row 0: column user: expected an id .*got 257 characters"),
        ({"user": ["a"], "item": ["1"], "ts": [1], "day": [date(2026, 1, 1)]}, "column day: .*got Date"),
        ({"user": [["a"]], "item": ["1"], "ts": [1]}, "column user: expected an id .*got \\['a'\\]"),
    ],
)
async def test_a_wrong_file_of_clicks_is_refused(store: MemoryStore, tmp_path: Path, columns: Any, says: str):
    with pytest.raises(LoadError, match=says):
        await load_behaviours(parquet(tmp_path, columns), store)


async def test_features_too_large_to_keep_are_refused(store: MemoryStore, tmp_path: Path):
    file = parquet(tmp_path, {"item": ["1", "2"], "row": ["x", "x" * 10_000]})

    with pytest.raises(LoadError, match="row 1: features take 10"):
        await load_features("items", file, store)


async def test_a_file_that_is_no_parquet_is_refused_by_name(store: MemoryStore, tmp_path: Path):
    file = tmp_path / "clicks.csv"
    file.write_text("user,item,ts\n")

    with pytest.raises(LoadError, match=r"clicks.csv: not a readable Parquet file: .+"):
        await load_behaviours(file, store)
    with pytest.raises(LoadError, match=r"none.parquet: not a readable Parquet file: .+"):
        await load_features("items", tmp_path / "none.parquet", store)


async def test_progress_ends_with_the_whole(store: MemoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    await load_behaviours(parquet(tmp_path, {"user": ["a"] * 2500, "item": ["1"] * 2500, "ts": range(2500)}), store)

    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "1000 of 2500 clicks",
        "2000 of 2500 clicks",
        "2500 of 2500 clicks",
    ]


async def test_redis_is_loaded_as_memory_is(store: MemoryStore, redis_url: str, tmp_path: Path):
    file = parquet(
        tmp_path,
        {
            "user": [n % 7 for n in range(3000)],
            "item": [n % 11 for n in range(3000)],
            "ts": [n // 5 for n in range(3000)],
        },
    )
    redis = RedisStore.connect(redis_url, timeout_s=5.0)

    counts = [await load_behaviours(file, each) for each in (store, redis)]
    pasts = [[await past(each, str(user)) for user in range(7)] for each in (store, redis)]
    await redis.aclose()

    assert counts == [3000, 3000]
    assert pasts[0] == pasts[1]
