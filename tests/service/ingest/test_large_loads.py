"""A load larger than memory: cut into parts on disk, the same in the store, going on where it was interrupted."""

import fcntl
import random
import shutil
import tempfile
from contextlib import aclosing
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import redis

from service.__main__ import main
from service.errors import LoadError
from service.ingest import bulk_load, partitions
from service.ingest.bulk_load import load_behaviours, load_features
from service.store.click_table import ClickTable
from service.store.codec import unpack_row
from service.store.feature_store import StoreUnavailable
from service.store.keys import KeySpace
from service.store.memory_store import MemoryStore
from service.store.redis_store import RedisStore

T = 1_700_000_000
USERS = 40


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Parts and blocks of few rows, in a folder that the test can look into."""
    monkeypatch.setattr(partitions, "ROWS_A_PART", 150)
    monkeypatch.setattr(bulk_load, "_ROWS_A_BLOCK", 97)
    monkeypatch.setattr(bulk_load, "_FEATURES_A_BLOCK", 2)
    folder = tmp_path / "parts"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def rows(*, seed: int, size: int = 700, event_ids: bool = False) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    found: list[dict[str, Any]] = []
    for n in range(size):
        row = {
            # One user has more clicks than a part has rows.
            "user": draw.choice([0, draw.randrange(USERS)]),
            "item": f"ad {draw.randrange(4)}",
            "ts": T + draw.randrange(size // 10) / 2,
            "label": int(draw.random() < 0.8),
            "brand": draw.choice([None, "nike", f"rare {n}"]),
        }
        if event_ids:
            row["event_id"] = f"e{draw.randrange(size)}" if not found or draw.random() < 0.9 else found[-1]["event_id"]
        found.append(row)
    return found


def written(tmp_path: Path, log: list[dict[str, Any]]) -> Path:
    file = tmp_path / "log.parquet"
    pl.DataFrame(log, infer_schema_length=None).write_parquet(file, row_group_size=100)
    return file


def entries(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def pasts(store: MemoryStore | RedisStore) -> list[list[tuple[str, float, Any]]]:
    found = []
    for user in range(USERS):
        behaviours = (await store.fetch(str(user), [], before=1e12, limit=1000)).behaviours
        found.append([(e.item, e.ts, e.features.get("brand")) for e in behaviours])
    return found


def newest(log: list[dict[str, Any]], keep: int) -> list[list[tuple[str, float]]]:
    """Written as the contract says it: the clicks of a user sorted by time and item, the newest of them."""
    clicks = [[(r["item"], r["ts"]) for r in log if r["user"] == user and r["label"]] for user in range(USERS)]
    return [sorted(each, key=lambda c: (c[1], c[0]))[-keep:] for each in clicks]


async def test_parts_on_disk_end_as_the_newest_clicks_of_each_user(tmp_path: Path, small_parts: Path):
    log = rows(seed=1)
    store = MemoryStore(max_clicks=20)

    new = await load_behaviours(written(tmp_path, log), store)

    expected = newest(log, 20)
    assert [[(item, ts) for item, ts, _ in past] for past in await pasts(store)] == expected
    assert new == sum(map(len, expected))
    assert entries(small_parts) == []


@pytest.mark.parametrize("event_ids", [False, True])
async def test_a_load_in_parts_is_a_load_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, redis_url: str, event_ids: bool
):
    file = written(tmp_path, rows(seed=2, event_ids=event_ids))
    values = []

    for rows_a_part in (10_000, 150):
        monkeypatch.setattr(partitions, "ROWS_A_PART", rows_a_part)
        with redis.Redis.from_url(redis_url) as server:
            server.flushall()
            async with aclosing(RedisStore.connect(redis_url, timeout_s=5.0)) as store:
                assert await load_behaviours(file, store) > 0
                assert await load_behaviours(file, store) == 0
                values.append(await pasts(store))

    assert values[0] == values[1]


class FailingStore(MemoryStore):
    """Fails before some merge."""

    def __init__(self, *, merges: int) -> None:
        super().__init__(max_clicks=20)
        self.merges = merges
        self.num_clicks: list[int] = []

    async def merge(self, clicks: ClickTable, *, max_per_s: float | None = None) -> list[int | None]:
        if len(self.num_clicks) == self.merges:
            raise StoreUnavailable("gone")
        self.num_clicks.append(len(clicks))
        return await super().merge(clicks, max_per_s=max_per_s)


async def interrupted(file: Path, store_name: str = "one", *, merges: int = 3) -> FailingStore:
    store = FailingStore(merges=merges)
    with pytest.raises(StoreUnavailable):
        await load_behaviours(file, store, store_name=store_name)
    store.merges = -1
    return store


async def test_an_interrupted_load_goes_on_with_the_parts_that_are_left(
    tmp_path: Path, small_parts: Path, capsys: pytest.CaptureFixture[str]
):
    log = rows(seed=3)
    file = written(tmp_path, log)
    once = FailingStore(merges=-1)
    await load_behaviours(file, once)
    capsys.readouterr()

    store = await interrupted(file)
    said = capsys.readouterr().err.splitlines()[-1]
    done = list(store.num_clicks)
    await load_behaviours(file, store, store_name="one", resume=True)

    assert 0 < len(done) < len(store.num_clicks)
    assert store.num_clicks == once.num_clicks
    assert await pasts(store) == await pasts(once)
    of_all = f" of {sum(row['label'] for row in log)} clicks are in the store"
    assert said.endswith(f"{of_all}; the same command with --resume goes on")
    assert capsys.readouterr().err.splitlines()[0] == said.partition(";")[0] + ": going on"
    assert entries(small_parts) == []


@pytest.mark.parametrize("change", ["another store", "another file", "no resume"])
async def test_only_the_same_load_goes_on(tmp_path: Path, change: str):
    file = written(tmp_path, rows(seed=4))
    await interrupted(file)
    if change == "another file":
        written(tmp_path, rows(seed=5))
    store = FailingStore(merges=-1)

    name = "another" if change == "another store" else "one"
    await load_behaviours(file, store, store_name=name, resume=change != "no resume")

    once = MemoryStore(max_clicks=20)
    await load_behaviours(file, once)
    assert await pasts(store) == await pasts(once)


async def test_a_load_that_is_under_way_is_not_begun_again(tmp_path: Path, small_parts: Path):
    file = written(tmp_path, rows(seed=6))
    await interrupted(file)
    (folder,) = entries(small_parts)

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LoadError, match="another load of the same file into the same store is under way"):
            await load_behaviours(file, MemoryStore(), store_name="one")


async def test_nothing_of_a_file_with_a_wrong_last_row_is_loaded(tmp_path: Path, small_parts: Path):
    file = written(tmp_path, [*rows(seed=7), {"user": 1, "item": "", "ts": T, "label": 1, "brand": None}])
    store = FailingStore(merges=-1)

    with pytest.raises(LoadError, match="row 700: column item: expected an id"):
        await load_behaviours(file, store)

    assert store.num_clicks == []
    assert entries(small_parts) == []


async def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, small_parts: Path):
    file = written(tmp_path, rows(seed=8))
    shutil.rmtree(small_parts)

    with pytest.raises(LoadError, match="clicks cannot be kept there meanwhile: .* TMPDIR names another place"):
        await load_behaviours(file, MemoryStore())


async def test_users_whose_pasts_cannot_be_read_are_counted_when_all_others_are_loaded(tmp_path: Path, redis_url: str):
    log = rows(seed=9)
    with redis.Redis.from_url(redis_url) as server:
        for user in ("3", "5"):
            server.set(KeySpace("cs").behaviours(user), b"\x03 of later")
        async with aclosing(RedisStore.connect(redis_url, timeout_s=5.0)) as store:
            with pytest.raises(LoadError, match="2 users have pasts in the store of a newer layout"):
                await load_behaviours(written(tmp_path, log), store)
            lengths = [len(past) for past in await pasts(store)]

    assert lengths == [0 if user in (3, 5) else len(past) for user, past in enumerate(newest(log, 100))]


async def test_a_load_takes_the_time_that_its_rate_leaves_it(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
):
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    log = [row | {"label": 1} for row in rows(seed=1, size=140)]
    async with aclosing(RedisStore.connect(redis_url, timeout_s=5.0)) as store:
        monkeypatch.setattr("service.store.redis_store.asyncio.sleep", sleep)
        await load_behaviours(written(tmp_path, log), store, max_per_s=0.1)

    assert waits[-1] == pytest.approx(sum(map(len, newest(log, 100))) / 0.1, rel=0.02)


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf", "many"])
def test_a_rate_is_above_zero(rate: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["load-behaviours", "x.parquet", "--max-per-second", rate])

    assert "--max-per-second" in capsys.readouterr().err


async def test_a_column_has_one_type_in_all_blocks(tmp_path: Path):
    prices = [Decimal("1.00"), Decimal("2.00"), Decimal("3.50"), Decimal("4.00"), None]
    sizes = [Decimal(1), Decimal(2), Decimal(12345678901234567890123), Decimal(4), Decimal(5)]
    columns = {
        "item": [1, 2, 3, 4, 5],
        "price": pl.Series(prices, dtype=pl.Decimal(10, 2)),
        "size": pl.Series(sizes, dtype=pl.Decimal(38, 0)),
    }
    file = tmp_path / "items.parquet"
    pl.DataFrame(columns).write_parquet(file)
    store = MemoryStore()

    assert await load_features("items", file, store) == 5

    items = [unpack_row(each) for each in (await store.fetch(None, list("12345"), before=0, limit=1)).items]
    assert items == [
        {"price": 1.0, "size": "1"}, {"price": 2.0, "size": "2"}, {"price": 3.5, "size": "12345678901234567890123"},
        {"price": 4.0, "size": "4"}, {"size": "5"},
    ]  # fmt: skip
    assert all(type(row["price"]) is float for row in items[:4] if row)
