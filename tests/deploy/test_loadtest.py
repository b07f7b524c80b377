"""The load generator: its plan, its arithmetic, its search for the knee."""

import json
import math
from collections import Counter

import msgspec
import numpy as np
import pytest
from loadtest.arrivals import Zipf, lognormal, poisson
from loadtest.capacity import TOLERANCE, find_knee
from loadtest.errors import BenchError
from loadtest.request_bodies import RequestMix, read_requests
from loadtest.results import NO_ANSWER, OK, PRIOR, Outcome, figures, merge, percentile_ms, share_within
from scipy import stats

from models.features.field import Group
from service.http import schemas
from tests.service import tiny


def outcome(latency_s=(), status=None, *, lag_s=None, due_s=None, busy=0.1, candidates=10) -> Outcome:
    num = len(latency_s)
    return Outcome(
        due_s=np.array(np.arange(num) if due_s is None else due_s, dtype=np.float64),
        lag_s=np.array([0.0] * num if lag_s is None else lag_s),
        latency_s=np.array(latency_s, dtype=np.float64),
        status=np.array([OK] * num if status is None else status, dtype=np.int16),
        candidates=np.full(num, candidates, dtype=np.int32),
        degraded=np.zeros(num, dtype=np.bool_),
        seconds=2.0,
        busy=busy,
    )


# --- the plan ---


def test_requests_are_due_as_a_poisson_process_has_them():
    due_s = poisson(1000, 20, np.random.default_rng(1))

    gaps = np.diff(due_s, prepend=0.0)

    assert due_s[-1] < 20 and abs(len(due_s) - 20_000) < 5 * math.sqrt(20_000)
    assert stats.kstest(gaps, "expon", args=(0, 1 / 1000)).pvalue > 0.01
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.03


def test_the_same_seed_draws_the_same_plan():
    one, same, other = (poisson(100, 5, np.random.default_rng(seed)) for seed in (1, 1, 2))

    np.testing.assert_array_equal(one, same)
    assert len(one) != len(other) or (one != other).any()


def test_candidates_have_their_median_and_their_cap():
    sizes = lognormal(50_000, np.random.default_rng(1), median=100, cap=1000)

    assert sizes.min() >= 1 and sizes.max() == 1000
    assert np.median(sizes) == pytest.approx(100, rel=0.03)
    assert (sizes > 1000 / 2).mean() == pytest.approx(stats.norm.sf(math.log(500.5 / 100) / 0.7), rel=0.1)


def test_popular_ones_come_as_often_as_zipf_says():
    drawn = Counter(Zipf(50, 1.0).draw(100_000, np.random.default_rng(1)).tolist())

    harmonic = sum(1 / k for k in range(1, 51))
    for rank in (0, 1, 9, 49):
        assert drawn[rank] / 100_000 == pytest.approx(1 / (rank + 1) / harmonic, rel=0.1)


def test_a_request_names_an_item_once_if_there_are_enough():
    few, draw = Zipf(20, 1.0), np.random.default_rng(1)

    assert sorted(few.distinct(20, draw).tolist()) == list(range(20))
    assert len(set(few.distinct(7, draw).tolist())) == 7
    assert set(few.distinct(30, draw).tolist()) == set(range(20))


@pytest.mark.parametrize("form", ["list", "columnar"])
def test_bodies_fit_the_schema_they_are_drawn_from(form):
    groups: frozenset[Group] = frozenset({"context", "user", "item"})
    mix = RequestMix(form=form, candidates=4, timeout_ms=20.0, schema=tiny.SCHEMA, sent=groups)

    body = mix.draw(1, np.random.default_rng(3))[0]

    request = msgspec.json.decode(body.content, type=schemas.PredictRequest)
    sent = msgspec.json.decode(body.content)
    rows = sent["candidates"]
    if form == "columnar":
        rows = [{"id": i, "features": {n: rows[n][k] for n in rows if n != "id"}} for k, i in enumerate(rows["id"])]
    assert body.candidates == 4 and request.timeout_ms == 20
    assert sorted(row["id"] for row in rows) == ["a1", "a2", "a3", "a4"]
    assert sent["user"]["features"]["gender"] in ("F", "M") and set(sent["context"]) == {"device"}
    assert all(set(row["features"]["genres"]) <= {"x", "y", "z"} for row in rows)
    assert all(isinstance(row["features"]["price"], float) for row in rows)


def test_both_forms_ask_for_the_same():
    one, other = (RequestMix(form=f, candidates=5).draw(3, np.random.default_rng(7)) for f in ("list", "columnar"))

    for a, b in zip(one, other, strict=True):
        rows, columns = (json.loads(body.content)["candidates"] for body in (a, b))
        assert [row["id"] for row in rows] == columns["id"]


def test_replayed_requests_keep_all_but_their_deadline(tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"candidates": [{"id": 1}], "ts": 5}\n\n{"candidates": {"id": [1, 2]}, "timeout_ms": 1}\n')

    first, second = read_requests(file, 30.0)

    assert json.loads(first.content) == {"candidates": [{"id": 1}], "ts": 5, "timeout_ms": 30.0}
    assert (first.candidates, second.candidates) == (1, 2)
    file.write_text('{"candidates": [{"id": 1}]}\n{"user": {}}\n')
    with pytest.raises(BenchError, match=r"line 2: expected a body of /predict with candidates"):
        read_requests(file, 30.0)


# --- the arithmetic ---


@pytest.mark.parametrize("num", [1, 2, 99, 100, 101, 1000])
@pytest.mark.parametrize("share", [0.5, 0.99, 0.999])
def test_a_percentile_is_the_smallest_value_that_this_share_does_not_exceed(num, share):
    values = np.random.default_rng(num).exponential(size=num)

    found = percentile_ms(values, share)

    assert found == pytest.approx(1000 * next(v for v in sorted(values) if (values <= v).mean() >= share - 1e-12))
    assert percentile_ms(values[:0], share) is None


def test_figures_of_a_run_are_those_counted_by_hand():
    latency_s = [0.001, 0.002, 0.030, 0.004, 0.005, 0.001, math.nan, 0.006]
    run = outcome(latency_s, [OK, OK, OK, 503, 504, PRIOR, NO_ANSWER, 422])

    found = figures(run, deadline_s=0.020)

    assert (found.requests, found.offered_per_s, found.errors) == (8, 4.0, 2)
    assert (found.goodput_per_s, found.late_per_s, found.refused_per_s) == (1.0, 0.5, 1.5)
    assert (found.p50_ms, found.p99_ms, found.refused_p99_ms) == (2.0, 30.0, 5.0)
    assert found.candidates_per_s == 15
    assert share_within(run, 0.020) == 2 / 8


def test_several_generators_are_one_run():
    parts = [outcome([0.001] * 3, busy=0.2), outcome([0.002] * 2, busy=0.5)]

    both = merge(parts)

    assert len(both.status) == 5 and both.busy == 0.5 and both.seconds == 2.0
    assert figures(both, 1.0).offered_per_s == 2.5


def test_a_part_of_a_run_holds_the_requests_due_in_its_spans():
    run = outcome([0.001] * 5, due_s=[0.0, 0.5, 1.0, 1.5, 2.0])

    inside = run.due_within([(0.4, 1.1), (1.9, 3.0)])

    assert inside.tolist() == [False, True, True, False, True]
    assert run.subset(inside, 1.8).due_s.tolist() == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("run", "invalid_reason"),
    [
        (outcome([0.1] * 100), None),
        (outcome([0.1] * 100, busy=0.95), "took 95% of its core"),
        (outcome([0.1] * 100, lag_s=[0.0] * 98 + [0.002] * 2), "more than 2.00 ms late"),
        (outcome([0.004] * 100, lag_s=[0.0] * 98 + [0.0005] * 2), "sent 0.50 ms late, of a p99 of 4.00 ms"),
        (outcome([0.004] * 100, lag_s=[0.0] * 99 + [0.0005]), None),
    ],
)
def test_results_are_invalid_where_the_generator_was_the_limit(run, invalid_reason):
    reason = figures(run, 1.0).invalid_reason

    assert reason is None if invalid_reason is None else invalid_reason in (reason or "")


# --- the search ---


@pytest.mark.parametrize("start", [1.0, 300.0, 950.0, 20_000.0])
def test_the_search_finds_the_knee_of_a_queue(start):
    # M/M/1: the time in the system is exponential with rate mu - lambda, so its p99 is ln 100 / (mu - lambda).
    mu, bound_s = 1000.0, 0.010
    knee = mu - math.log(100) / bound_s

    def holds(rate: float) -> bool:
        return rate < mu and math.log(100) / (mu - rate) <= bound_s

    found = find_knee(holds, holds, start=start)

    assert knee / (1 + TOLERANCE) <= found <= knee


def test_one_spoilt_window_does_not_move_the_knee():
    calls: Counter[float] = Counter()

    def holds(rate: float) -> bool:
        calls[rate] += 1
        return rate <= 500 and calls[rate] > 1

    assert find_knee(holds, lambda _: True, start=400) == pytest.approx(500, rel=TOLERANCE)


def test_a_rate_that_was_lucky_gives_way_to_one_that_lasts():
    found = find_knee(lambda rate: rate <= 600, lambda rate: rate <= 500, start=400)

    assert found == pytest.approx(500, rel=TOLERANCE)


def test_a_service_that_keeps_no_promise_has_no_knee():
    with pytest.raises(BenchError, match="there is no knee"):
        find_knee(lambda _: False, lambda _: True, start=100)
    with pytest.raises(BenchError, match="there is no knee"):
        find_knee(lambda rate: rate < 500, lambda _: False, start=100)
