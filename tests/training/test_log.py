"""Splits and the completed log."""

from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.features.field import FieldSpec
from models.features.schema import SchemaSpec
from training.data import time_order
from training.data.time_order import complete
from training.errors import UserError
from training.log import PARTS, Log, split_by_time


@given(times=st.lists(st.integers(0, 30), min_size=1, max_size=100))
def test_a_split_by_time_never_goes_back_and_never_tears_one_time_apart(times):
    ts = np.sort(np.array(times, dtype=np.float64))

    parts = split_by_time(ts, valid=0.1, test=0.2)

    numbers = [PARTS.index(part) for part in parts]
    assert numbers == sorted(numbers)
    assert all(a == b for (a, s), (b, t) in pairwise(zip(numbers, ts, strict=True)) if s == t)


def test_cuts_fall_at_the_shares_when_times_differ_and_before_a_tie_when_not():
    assert [len(list(g)) for _, g in groupby(split_by_time(np.arange(10.0), valid=0.1, test=0.1))] == [8, 1, 1]
    tied = np.array([0, 1, 2, 3, 4, 5, 6, 8, 8, 9.0])
    assert [len(list(g)) for _, g in groupby(split_by_time(tied, valid=0.1, test=0.1))] == [7, 2, 1]


SPEC = SchemaSpec(
    user_key="who",
    fields=(
        FieldSpec(name="who", kind="categorical", group="user"),
        FieldSpec(name="device", kind="categorical", group="context"),
        FieldSpec(name="tag", kind="categorical", group="item"),
    ),
)


def log_of(rows):
    columns = ["user", "ts", "device", "label", "part"]
    table = pl.DataFrame(rows, schema=columns, orient="row").with_columns(
        pl.col("user").cast(pl.String), pl.col("ts").cast(pl.Float64), item=pl.lit("i"), tag=pl.lit("t")
    )
    return Log(name="log", source=Path("log.csv"), spec=SPEC, rows=table.lazy(), files=())


def test_rows_of_one_user_time_and_context_are_one_request(tmp_path):
    pairs = [(part, label) for part in PARTS for label in (0, 1)]
    rows: list[tuple[str | None, int, str, int, str]]
    rows = [("u", 1, "tv", 1, "train"), ("u", 1, "tv", 0, "train"), ("u", 1, "pc", 0, "train")]
    rows += [("v", 1, "tv", 0, "train"), (None, 1, "tv", 0, "train"), (None, 1, "tv", 0, "train")]
    rows += [("w", 9, "tv", label, part) for part, label in pairs if part != "train"]

    done = complete(log_of(rows), tmp_path / "spill").collect()

    assert done["request"].to_list() == [0, 0, 1, 2, 3, 4, 5, 5, 5, 5]
    assert done["group"].to_list() == [0, 0, 0, 1, -1, -1, 2, 2, 2, 2]
    assert done["who"].to_list() == done["user"].to_list()


def test_rows_stand_in_time_order_and_within_one_time_as_they_came(tmp_path):
    rows = [("u", 9 - i // 3, str(i), i % 2, PARTS[i % 3]) for i in range(12)]

    done = complete(log_of(rows), tmp_path / "spill").collect()

    assert done["device"].to_list() == ["9", "10", "11", "6", "7", "8", "3", "4", "5", "0", "1", "2"]


@pytest.mark.parametrize(
    ("valid", "message"),
    [
        ([], "the valid part needs rows with label 0 and with label 1, it has no rows"),
        ([1, 1], "2 rows, all with label 1"),
    ],
)
def test_a_part_that_nothing_can_be_judged_by_is_refused(valid, message, tmp_path):
    rows = [("u", 1, "tv", label, part) for part in ("train", "test") for label in (0, 1)]
    rows += [("u", 1, "tv", label, "valid") for label in valid]

    with pytest.raises(UserError, match=message):
        complete(log_of(rows), tmp_path / "spill")


@settings(max_examples=10, deadline=None)
@given(times=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["u", "v", None])), min_size=2, max_size=40))
def test_blocks_and_buckets_of_any_size_give_the_same_rows(times, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spill")
    rows = [(user, ts, "tv", number % 2, "train") for number, (ts, user) in enumerate(times)]
    rows += [("w", 9, "pc", label, part) for part in ("valid", "test") for label in (0, 1)]
    whole = complete(log_of(rows), folder / "whole").collect()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time_order, "BLOCK", 3)
        patch.setattr(time_order, "BUCKET", 5)
        small = complete(log_of(rows), folder / "small").collect()

    assert small.equals(whole)
    assert small["ts"].is_sorted()
