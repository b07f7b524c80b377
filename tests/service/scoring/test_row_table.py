"""A row is taken as it was put, whatever its inputs are: side by side in one array, of two types, or lists."""

import numpy as np

from models.features.field import Input
from service.scoring.row_table import NOTHING, Table

INPUTS = [
    Input(name="item.brand", dtype="int64", dims=("C",)),
    Input(name="item.size", dtype="int64", dims=("C",)),
    Input(name="item.price", dtype="float32", dims=("C",)),
    Input(name="item.tags", dtype="int64", dims=("C", 2)),
]
ROWS = {
    "item.brand": np.array([1, 2, 3]),
    "item.size": np.array([10, 20, 30]),
    "item.price": np.array([0.5, 1.5, 2.5], dtype=np.float32),
    "item.tags": np.array([[4, 5], [6, 7], [8, 9]]),
}


def test_rows_are_taken_as_they_were_put_each_input_in_one_piece() -> None:
    table = Table(INPUTS, capacity=3)
    table.put(["a", "b", "c"], ROWS, until=[1.0] * 3, notes={}, rows=[0, 2])

    slots = table.find(["c", "b", "a", "c"], 4)
    taken = table.take(slots)

    assert slots[1] == NOTHING
    for name, values in ROWS.items():
        wanted = np.stack([values[2], np.zeros_like(values[0]), values[0], values[2]])
        np.testing.assert_array_equal(taken[name], wanted)
        assert taken[name].dtype == values.dtype and taken[name].flags.c_contiguous


def test_a_row_has_more_time_only_while_it_is_made_of_the_same() -> None:
    table = Table(INPUTS, capacity=3)
    table.put(["a", "b"], ROWS, until=[1.0, 1.0, 1.0], notes={}, rows=[0, 1], sources=[b"old", b"old", None])

    table.renew({"a": b"old", "b": b"new", "gone": b"old"}, until=9.0)

    assert table.stale(table.find(["a", "b", "gone"], 3), 5.0).tolist() == [False, True, True]
