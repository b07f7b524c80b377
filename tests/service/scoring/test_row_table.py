"""A row is taken as it was put, and is fresh only for its time and while it is made of the same."""

import numpy as np

from service.scoring.row_table import EMPTY_SLOT, RowTable, RowWarnings

COLUMNS = {"ids": (np.int64, 2), "price": (np.float32, 1)}
ROWS = {
    "ids": np.array([[4, 5], [6, 7], [8, 9]]),
    "price": np.array([[0.5], [1.5], [2.5]], dtype=np.float32),
}
EMPTY = {"ids": np.array([1, 2])}


def table(capacity: int = 3) -> RowTable:
    return RowTable(COLUMNS, capacity=capacity, empty=EMPTY)


def test_rows_are_taken_as_they_were_put() -> None:
    rows = table()
    rows.put(["a", "b", "c"], ROWS, rows=[0, 2], until=[1.0] * 3, warnings={})

    slots = rows.find(["c", "b", "a", "c"], 4)

    assert slots[1] == EMPTY_SLOT
    assert rows.take("ids", slots).tolist() == [[8, 9], [1, 2], [4, 5], [8, 9]]
    assert rows.take("price", slots)[:, 0].tolist() == [2.5, 0.0, 0.5, 2.5]


def test_a_row_has_more_time_only_while_it_is_made_of_the_same() -> None:
    rows = table()
    rows.put(["a", "b"], ROWS, rows=[0, 1], until=[1.0, 1.0, 1.0], warnings={}, sources=[b"old", b"old", None])

    rows.extend_ttl({"a": b"old", "b": b"new", "gone": b"old"}, until=9.0)

    assert rows.stale(rows.find(["a", "b", "gone"], 3), 5.0).tolist() == [1, 2]


def test_the_oldest_row_is_replaced_with_its_warnings() -> None:
    rows = table(capacity=2)
    odd = RowWarnings(unknown=("genres",))
    rows.put(["a", "b", "c"], ROWS, rows=[0, 1], until=[9.0] * 3, warnings={0: odd})
    assert rows.warnings(rows.find(["b", "a"], 2)) == {1: odd}

    rows.put(["a", "b", "c"], ROWS, rows=[2], until=[9.0] * 3, warnings={})

    slots = rows.find(["a", "b", "c"], 3)
    assert slots[0] == EMPTY_SLOT
    assert rows.take("ids", slots)[1:].tolist() == [[6, 7], [8, 9]]
    assert rows.warnings(slots) == {}
