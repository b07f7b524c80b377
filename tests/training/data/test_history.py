"""A whole log's histories are what the one law gives row by row."""

import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from models.features.history import Event, history
from training.data.history import Windows, clicks_of

# Few users, times and items, so that same-second clicks, repeated clicks and users without any are common.
ROWS = st.lists(
    st.tuples(
        st.integers(-1, 3),  # -1 is nobody
        st.sampled_from([0.0, 1.0, 1.5, 1_795_000_000.25, 1_795_000_000.251]),
        st.sampled_from(["a", "B", "ad10", "ad9", "é", "😀", "ff"]),
        st.integers(0, 1),
    ),
    max_size=25,
)


def table(rows):
    schema = {"group": pl.Int64, "ts": pl.Float64, "item": pl.String, "label": pl.Int8}
    return pl.DataFrame(rows, schema=schema, orient="row")


@given(rows=ROWS)
def test_windows_are_the_law_of_history_row_by_row(rows):
    log = table(rows)

    clicks = clicks_of(log.lazy())
    starts, ends = Windows(clicks)(log)

    for number, (user, ts, _, _) in enumerate(rows):
        mine = [Event(item=i, ts=t, features={}) for u, t, i, label in rows if u == user >= 0 and label]
        expected = [(e.ts, e.item) for e in history(mine, before=ts, limit=1000)]
        seen = clicks[int(starts[number]) : int(ends[number])]
        assert list(zip(seen["ts"], seen["item"], strict=True)) == expected


@given(rows=ROWS, later=ROWS)
def test_what_comes_at_the_same_time_or_later_changes_no_history(rows, later):
    log = table(rows)
    end = max((ts for _, ts, _, _ in rows), default=0.0)
    longer = table([*rows, *((u, end + t, i, label) for u, t, i, label in later)])

    def seen(table):
        clicks = clicks_of(table.lazy())
        starts, ends = Windows(clicks)(table)
        return [clicks[int(s) : int(e)].rows() for s, e in zip(starts, ends, strict=True)]

    assert seen(longer)[: len(rows)] == seen(log)


def test_an_empty_log_has_empty_windows():
    starts, ends = Windows(clicks_of(table([]).lazy()))(table([(0, 1.0, "a", 0)]))

    np.testing.assert_array_equal(starts, [0])
    np.testing.assert_array_equal(ends, [0])
