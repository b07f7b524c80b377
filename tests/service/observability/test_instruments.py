"""Counters, gauges and histograms against the obvious way to count the same."""

import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.observability.instruments import MAX_PENDING, MAX_SERIES, OTHER, Counter, Family, Gauge, Histogram

numbers = st.floats(-1e6, 1e6)
edges = st.lists(st.integers(-50, 50), min_size=1, max_size=12, unique=True).map(sorted)
# Integers among the values, so that many of them are exactly an edge.
values = st.lists(st.integers(-60, 60) | st.floats(-60, 60), max_size=200)


@given(edges=edges, values=values)
def test_a_bucket_holds_the_values_up_to_its_edge(edges: list[float], values: list[float]) -> None:
    histogram = Histogram(edges)

    for value in values:
        histogram.observe(value)

    up_to = np.cumsum(histogram.counts).tolist()
    assert up_to == [sum(value <= edge for value in values) for edge in edges] + [len(values)]
    assert histogram.count == len(values)
    assert histogram.sum == pytest.approx(sum(values), abs=1e-9)


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 2000))
def test_the_buckets_are_those_of_numpys_histogram(seed: int, size: int) -> None:
    values = np.random.default_rng(seed).beta(1, 20, size)
    edges = [0.01, 0.02, 0.05, 0.1, 0.5]
    histogram = Histogram(edges)

    histogram.observe_many(values)

    assert histogram.numbers()[1:] == np.histogram(values, [-np.inf, *edges, np.inf])[0].tolist()


@given(edges=edges, batches=st.lists(values, max_size=2 * MAX_PENDING + 1))
def test_many_values_at_once_are_counted_as_one_by_one(edges: list[float], batches: list[list[float]]) -> None:
    together, one_by_one = Histogram(edges), Histogram(edges)

    for batch in batches:
        together.observe_many(np.array(batch, dtype=np.float64))
        for value in batch:
            one_by_one.observe(value)

    assert together.numbers()[1:] == one_by_one.numbers()[1:]
    assert together.sum == pytest.approx(one_by_one.sum, abs=1e-6)


@given(edges=edges, value=st.integers(-60, 60), times=st.integers(0, 50))
def test_a_value_n_times_is_that_value_observed_n_times(edges: list[float], value: int, times: int) -> None:
    at_once, repeated = Histogram(edges), Histogram(edges)

    at_once.observe_n(value, times)
    for _ in range(times):
        repeated.observe(value)

    assert at_once.numbers() == repeated.numbers()


@pytest.mark.parametrize("edges", [[], [1.0, 1.0], [2.0, 1.0], [float("nan"), 1.0]])
def test_edges_that_do_not_ascend_are_refused(edges: list[float]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        Histogram(edges)


def test_a_gauge_goes_up_and_down() -> None:
    gauge = Gauge()

    gauge.set(5)
    gauge.inc(3)
    gauge.dec()

    assert gauge.value == 7


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Threads take turns as often as the interpreter can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_that_count_together_lose_nothing(frequent_switches: None) -> None:
    counter, histogram = Counter(), Histogram([1.0, 2.0])
    together = np.full(3, 1.5)

    def count() -> None:
        for _ in range(20_000):
            counter.inc()
            histogram.observe(1)
            histogram.observe_many(together)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert counter.value == 80_000
    assert histogram.numbers() == [80_000 * 5.5, 80_000, 240_000, 0]


def test_the_same_labels_are_the_same_instrument() -> None:
    family = Family("clicks", "", Counter, ("arm",))

    family.labels("one").inc()
    family.labels("one").inc()
    family.labels("two").inc()

    assert family.snapshot() == {("one",): [2], ("two",): [1]}


def test_an_unknown_value_of_a_bounded_label_is_counted_as_other() -> None:
    family = Family("requests", "", Counter, ("route", "status"))
    family.bound("route", ["/predict"])

    for route in ("/predict", "/a", "/b"):
        family.labels(route, "200").inc()

    assert family.snapshot() == {("/predict", "200"): [1], (OTHER, "200"): [2]}
    assert set(family.children) == set(family.snapshot())


def test_a_family_has_no_more_series_than_its_limit_and_loses_no_count() -> None:
    family = Family("values", "", Counter, ("field",))

    for number in range(MAX_SERIES + 100):
        family.labels(f"field-{number}").inc()

    assert len(family.children) == MAX_SERIES + 1
    assert family.labels(OTHER).value == 100
    assert sum(child.value for child in family.children.values()) == MAX_SERIES + 100


def test_a_wrong_number_of_label_values_is_refused() -> None:
    family = Family("requests", "", Counter, ("route", "status"))

    with pytest.raises(ValueError, match=r"expected a value for each of \('route', 'status'\), got \('/predict',\)"):
        family.labels("/predict")


def test_numbers_of_other_buckets_are_refused() -> None:
    family = Family("seconds", "", lambda: Histogram([1.0, 2.0]), ("op",))

    with pytest.raises(ValueError, match="expected 1 labels and 4 numbers, got .* with 3 numbers"):
        family.restore({("fetch",): [1.0, 2, 3]})


@given(first=values, then=values)
def test_a_restored_histogram_counts_on(first: list[float], then: list[float]) -> None:
    uninterrupted, before, after = (Family("seconds", "", lambda: Histogram([-10, 0, 10])) for _ in range(3))
    for value in first:
        before.labels().observe(value)

    after.restore(before.snapshot())
    for value in then:
        after.labels().observe(value)

    for value in first + then:
        uninterrupted.labels().observe(value)
    assert after.labels().counts == uninterrupted.labels().counts
    assert after.labels().sum == pytest.approx(uninterrupted.labels().sum, abs=1e-6)
