"""Files go into the store as they are, once, and a wrong file is refused in one sentence."""

from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from service.errors import LoadError
from service.ingest.bulk_load import load_behaviours, load_features
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
    return [(e.item, e.ts, {**e.item_features, **e.features}) for e in fetched.behaviours]


T = 1_700_000_000
CLICKS = {"user": [1, 2, 1, 1], "item": [10, 10, 20, 10], "ts": [T + 5, T + 6, T + 3, T + 5]}


async def test_clicks_are_loaded_per_user_in_time_order(store: MemoryStore, tmp_path: Path):
    new = await load_behaviours(parquet(tmp_path, CLICKS), store)

    assert new == 4
    assert await past(store, "1") == [("20", T + 3.0, {}), ("10", T + 5.0, {}), ("10", T + 5.0, {})]
    assert await past(store, "2") == [("10", T + 6.0, {})]


async def test_loading_a_file_again_or_in_another_order_changes_nothing(store: MemoryStore, tmp_path: Path):
    await load_behaviours(parquet(tmp_path, CLICKS), store)
    before = await past(store, "1")

    again = await load_behaviours(parquet(tmp_path, {name: values[::-1] for name, values in CLICKS.items()}), store)

    assert again == 0
    assert await past(store, "1") == before


async def test_clicks_take_the_items_stored_features_unless_the_file_has_its_own(store: MemoryStore, tmp_path: Path):
    await store.put_items({"10": {"genre": "war", "year": 1990}})

    await load_behaviours(parquet(tmp_path, {"user": ["a"], "item": ["10"], "ts": [T + 1.5]}), store)
    await load_behaviours(
        parquet(tmp_path, {"user": ["b"], "item": ["10"], "ts": [T + 1.5], "genre": ["own"], "tags": [["x", "y"]]}),
        store,
    )

    assert await past(store, "a") == [("10", T + 1.5, {"genre": "war", "year": 1990})]
    assert await past(store, "b") == [("10", T + 1.5, {"genre": "own", "year": 1990, "tags": ["x", "y"]})]


async def test_only_clicks_of_a_mixed_file_count(store: MemoryStore, tmp_path: Path):
    columns = {"user": ["a", "a"], "item": ["1", "2"], "ts": [T + 1, T + 2], "type": ["impression", "click"]}

    new = await load_behaviours(parquet(tmp_path, columns), store)

    assert new == 1
    assert await past(store, "a") == [("2", T + 2.0, {})]


async def test_given_event_ids_decide_what_is_a_repetition(store: MemoryStore, tmp_path: Path):
    columns = {
        "user": ["a", "a", "a"],
        "item": ["1", "1", "2"],
        "ts": [T + 1, T + 1, T + 2],
        "event_id": ["x", "x", "y"],
    }

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
        ({"user": ["a"], "ts": [T]}, "no column item; there are user, ts"),
        (
            {"user": ["a"], "item": ["1"], "ts": ["noon"]},
            "ts: expected Unix seconds or a Parquet time, got String",
        ),
        ({"user": ["a"], "item": ["1"], "ts": [-1.0]}, "row 0: ts: expected Unix seconds from 1990 on, got -1.0"),
        (
            {"user": ["a"], "item": ["1"], "ts": [1_700_000_000_000]},
            "row 0: ts: expected Unix seconds from 1990 .* 17000",
        ),
        (
            {"user": ["a"], "item": ["1"], "ts": [T], "type": ["video"]},
            "column type: expected click or impression, got video; call a feature otherwise",
        ),
        ({"user": ["a"], "item": ["1"], "ts": [T], "type": [3]}, "column type: expected click or impression, got 3"),
        (
            {"user": ["a", "a"], "item": ["1", "1"], "ts": [T, None]},
            "row 1: ts: expected Unix seconds .*got None",
        ),
        ({"user": ["a", None], "item": ["1", "1"], "ts": [T, T]}, "row 1: column user: expected an id .*got None"),
        ({"user": ["a"], "item": [""], "ts": [T]}, "row 0: column item: expected an id .*got ''"),
        ({"user": ["a" * 257], "item": ["1"], "ts": [T]}, "row 0: column user: expected an id .*got 257 characters"),
        ({"user": ["a"], "item": ["1"], "ts": [T], "day": [date(2026, 1, 1)]}, "column day: .*got Date"),
        ({"user": [["a"]], "item": ["1"], "ts": [T]}, "column user: expected an id .*got \\['a'\\]"),
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
    await load_behaviours(
        parquet(tmp_path, {"user": ["a"] * 2500, "item": ["1"] * 2500, "ts": range(T, T + 2500)}), store
    )

    assert capsys.readouterr().err.startswith("2500 of 2500 clicks, ")


async def test_redis_is_loaded_as_memory_is(store: MemoryStore, redis_url: str, tmp_path: Path):
    file = parquet(
        tmp_path,
        {
            "user": [n % 7 for n in range(3000)],
            "item": [n % 11 for n in range(3000)],
            "ts": [T + n // 5 for n in range(3000)],
        },
    )
    redis = RedisStore.connect(redis_url, timeout_s=5.0)

    counts = [await load_behaviours(file, each) for each in (store, redis)]
    pasts = [[await past(each, str(user)) for user in range(7)] for each in (store, redis)]
    await redis.aclose()

    assert counts == [700, 700]  # of each user the newest hundred
    assert pasts[0] == pasts[1]


NOW = T + 1000


async def load(store: MemoryStore, tmp_path: Path, **columns: Any) -> list[tuple[str, float, dict[str, Any]]]:
    clicks = {"user": ["a"] * 3, "item": ["1", "2", "3"], "ts": [T, T + 1, T + 2]} | columns
    await load_behaviours(parquet(tmp_path, clicks), store, now=lambda: NOW)
    return await past(store, "a")


async def test_clicks_ahead_of_now_are_not_loaded_and_are_counted(
    store: MemoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    loaded = await load(store, tmp_path, ts=[T, NOW + 300, NOW + 301])

    assert [item for item, _, _ in loaded] == ["1", "2"]
    assert "1 of 3 clicks are more than 300 s ahead of now, the first in row 2 (2023-" in capsys.readouterr().err


async def test_a_file_of_which_all_clicks_are_ahead_of_now_is_refused(store: MemoryStore, tmp_path: Path):
    with pytest.raises(LoadError, match="3 of 3 clicks are more than 300 s ahead .*are these local times"):
        await load(store, tmp_path, ts=[NOW + 28_800] * 3)


@pytest.mark.parametrize("label", [[0, 1, 0], [False, True, False], [0.0, 1.0, 0.0]])
async def test_only_rows_with_label_1_are_clicks(store: MemoryStore, tmp_path: Path, label: Any):
    assert await load(store, tmp_path, label=label) == [("2", T + 1.0, {})]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"label": [0, 1, 2]}, "column label: expected 0 or 1 in every row, got 2"),
        ({"label": [0, None, 1]}, "column label: expected 0 or 1 in every row, got None"),
        ({"label": ["yes", "no", "no"]}, "column label: expected 0 or 1 in every row, got 'yes'"),
        ({"clicked": [0, 1, 1]}, "column clicked holds 0 and 1 alone: call it label"),
        ({"ts": [20240101] * 3}, "row 0: ts: expected Unix seconds from 1990 on, got 20240101"),
        ({"ts": pl.Series([T] * 3, dtype=pl.Float32)}, "column ts: .* got Float32, which holds them to two minutes"),
    ],
)
async def test_what_would_turn_impressions_into_clicks_or_lose_their_time_is_refused(
    store: MemoryStore, tmp_path: Path, columns: Any, says: str
):
    with pytest.raises(LoadError, match=says):
        await load(store, tmp_path, **columns)


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Shanghai"])
async def test_a_parquet_time_is_utc_unless_it_names_a_zone(store: MemoryStore, tmp_path: Path, unit: Any, zone: Any):
    ts = pl.from_epoch(pl.Series([T, T + 1, T + 2]), time_unit="s").dt.cast_time_unit(unit)
    if zone is not None:
        ts = ts.dt.replace_time_zone("UTC").dt.convert_time_zone(zone)

    assert [at for _, at, _ in await load(store, tmp_path, ts=ts)] == [T, T + 1.0, T + 2.0]


async def test_whole_decimals_are_integers_and_single_precision_is_spelled_short(store: MemoryStore, tmp_path: Path):
    loaded = await load(
        store,
        tmp_path,
        item=pl.Series([Decimal(7), Decimal(8), Decimal(12345678901234567890123)], dtype=pl.Decimal(38, 0)),
        price=pl.Series([Decimal("9.50"), Decimal("0.10"), None], dtype=pl.Decimal(10, 2)),
        rate=pl.Series([0.1, 2.0, None], dtype=pl.Float32),
    )

    assert loaded == [
        ("7", T, {"price": 9.5, "rate": 0.1}),
        ("8", T + 1.0, {"price": 0.1, "rate": 2.0}),
        ("12345678901234567890123", T + 2.0, {}),
    ]


async def test_a_folder_of_parts_without_names_is_loaded_as_one(store: MemoryStore, tmp_path: Path):
    for number in range(3):
        rows = pl.DataFrame({"user": ["a"], "item": [number], "ts": [T + number]})
        rows.write_parquet(tmp_path / f"part-{number}")
    (tmp_path / "_SUCCESS").touch()

    assert await load_behaviours(tmp_path, store, now=lambda: NOW) == 3
    assert [item for item, _, _ in await past(store, "a")] == ["0", "1", "2"]
