"""Who is next, by hand and as laws: the line has no clock and no thread of its own."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import Refusal
from service.runtime.latency_model import Cost
from service.runtime.scheduler import SHADOW_SHARE, Batch, Line, Queue, Work
from tests.service.engine import Fake, apart, joining, request


def queue(cost: Cost | None = None, *, lanes: int = 1, wait_s: float = 0.0) -> Queue:
    backend = Fake()
    backend.lanes, backend.batch_wait_s = lanes, wait_s
    return Queue(backend=backend, cost=cost or apart())


def work(candidates: int, *, shadow: bool = False, expires: float = math.inf, users: int = 1) -> Work:
    answer: Any = None  # the line does not look at it
    arrays = request(*range(candidates))
    return Work(arrays=arrays, candidates=candidates, users=users, expires=expires, shadow=shadow, answer=answer)


def taken(line: Line, now: float = 0.0) -> Batch:
    batch, _ = line.take(now)
    assert batch is not None
    return batch


def sizes(batch: Batch) -> list[int]:
    return [piece.stop - piece.start for piece in batch.pieces]


@st.composite
def arrivals(draw: st.DrawFn) -> list[tuple[int, Work]]:
    one = st.tuples(st.integers(0, 1), st.integers(1, 40), st.booleans())
    return [(lane, work(size, shadow=shadow)) for lane, size, shadow in draw(st.lists(one, max_size=25))]


@given(arrivals(), st.integers(1, 30), st.booleans())
def test_every_candidate_is_run_once_and_shadow_work_only_when_no_other_waits(
    arriving: list[tuple[int, Work]], piece: int, joins: bool
) -> None:
    line = Line(limit=10**6)
    queues = [queue((joining if joins else apart)(piece)) for _ in range(2)]
    for number, (lane, new) in enumerate(arriving):
        line.put(queues[lane], new, float(number))

    seen: dict[int, list[tuple[int, int]]] = {}
    while (batch := line.take(1e6)[0]) is not None:
        assert batch.candidates == sum(sizes(batch)) <= piece
        assert len({p.work.shadow for p in batch.pieces}) == 1
        if batch.pieces[0].work.shadow:
            assert not any(q.live for q in queues)
        for p in batch.pieces:
            assert p.work in [w for lane, w in arriving if queues[lane] is batch.queue]
            seen.setdefault(id(p.work), []).append((p.start, p.stop))
        line.ended(batch)

    for _, one in arriving:
        pieces = seen[id(one)]
        assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
        assert pieces[-1][1] == one.candidates
    assert line.candidates == 0
    assert line.ahead_s(1e6, shadow=True) == 0
    assert line.is_empty


@given(arrivals())
def test_apart_all_models_together_are_served_in_the_order_of_arrival(arriving: list[tuple[int, Work]]) -> None:
    line = Line(limit=10**6)
    queues = [queue(), queue()]
    for number, (lane, new) in enumerate(arriving):
        line.put(queues[lane], new, float(number))

    order = []
    while (batch := line.take(1e6)[0]) is not None:
        order.append(batch.pieces[0].work)
        line.ended(batch)

    live_first = sorted((new for _, new in arriving), key=lambda new: new.shadow)
    assert list(map(id, order)) == list(map(id, live_first))


@given(arrivals(), st.data())
def test_whoever_leaves_is_not_run_and_takes_no_room(arriving: list[tuple[int, Work]], data: st.DataObject) -> None:
    line = Line(limit=10**6)
    queues = [queue(), queue()]
    for lane, new in arriving:
        line.put(queues[lane], new, 0.0)
    gone = {id(new) for _, new in arriving if data.draw(st.booleans())}
    for lane, new in arriving:
        if id(new) in gone:
            line.leave(queues[lane], new)
            line.leave(queues[lane], new)

    assert line.candidates == sum(new.candidates for _, new in arriving if id(new) not in gone)
    served = set()
    while (batch := line.take(0.0)[0]) is not None:
        served.add(id(batch.pieces[0].work))
        line.ended(batch)
    assert served == {id(new) for _, new in arriving} - gone


def test_a_large_request_is_cut_into_about_equal_pieces() -> None:
    line, model = Line(limit=10**6), queue(apart(piece=100))
    line.put(model, work(101), 0.0)

    pieces = []
    while (batch := line.take(0.0)[0]) is not None:
        pieces += sizes(batch)
        line.ended(batch)

    assert pieces == [51, 50]


def test_requests_are_joined_up_to_the_largest_run_that_pays() -> None:
    line, model = Line(limit=10**6), queue(joining(piece=100))
    for _ in range(5):
        line.put(model, work(30), 0.0)

    assert sizes(taken(line)) == [30, 30, 30]


def test_requests_are_joined_while_one_more_costs_less_than_alone() -> None:
    """Of these a run costs 100 us and each user in it 40 us; joined, a candidate costs 1 us more than alone."""
    line, model = Line(limit=10**6), queue(Cost(a=100e-6, b=1e-6, u=40e-6, d=1e-6, piece=1000))
    for size in (5, 5, 50, 80):
        line.put(model, work(size), 0.0)

    assert sizes(taken(line)) == [5, 5, 50]  # one more saves 100 - 40 us, and costs 80 us


def test_requests_of_two_users_are_not_joined_where_only_larger_runs_would_pay() -> None:
    """Two save one run (100 us) and cost two users (80 us) and a joined candidate's 1 us: worth it up to 20 of them."""
    for each, joined in ((9, [9, 9]), (11, [11])):
        line, model = Line(limit=10**6), queue(Cost(a=100e-6, b=1e-6, u=40e-6, d=1e-6, piece=1000))
        line.put(model, work(each), 0.0)
        line.put(model, work(each), 0.0)

        assert sizes(taken(line)) == joined


def test_nobody_is_made_late_by_company() -> None:
    line, model = Line(limit=10**6), queue(joining())
    line.put(model, work(10, expires=1.011e-3), 0.0)
    line.put(model, work(100), 0.0)

    assert sizes(taken(line)) == [10]


def test_requests_with_other_inputs_are_not_joined() -> None:
    line, model = Line(limit=10**6), queue(joining())
    line.put(model, work(10), 0.0)
    other = work(10)
    other.arrays = {**other.arrays, "item.price": other.arrays["item.number"]}
    line.put(model, other, 0.0)

    assert sizes(taken(line)) == [10]


def test_live_work_is_not_joined_to_shadow_work() -> None:
    line, model = Line(limit=10**6), queue(joining())
    line.put(model, work(10, shadow=True), 0.0)
    line.put(model, work(20), 1.0)

    assert sizes(taken(line, 2.0)) == [20]


def test_what_would_be_scored_too_late_is_refused_on_arrival() -> None:
    """1 ms a run and 1 us a candidate: 1.1 ms each."""
    line, model = Line(limit=10**6), queue()
    line.put(model, work(100), 0.0)
    line.put(queue(), work(100), 0.0)  # another model's: they wait for the same thread

    with pytest.raises(Refusal) as refused:
        line.put(model, work(100, expires=3.29e-3), 0.0)
    line.put(model, work(100, expires=3.31e-3), 0.0)

    assert (refused.value.status, refused.value.reason) == (503, "predicted_late")
    assert refused.value.headers == {"Retry-After": "1"}


def test_with_nothing_before_it_a_request_is_let_in_since_only_runs_correct_what_is_expected() -> None:
    line, model = Line(limit=10**6), queue()

    line.put(model, work(100, expires=1e-3), 0.0)

    assert sizes(taken(line)) == [100]


def test_the_run_under_way_counts_for_what_is_left_of_it() -> None:
    line, model = Line(limit=10**6), queue()
    line.put(model, work(1000), 0.0)  # 2 ms
    taken(line, 0.0)

    assert line.ahead_s(0.5e-3) == pytest.approx(1.5e-3)
    assert line.ahead_s(2e-3) == pytest.approx(0)
    assert line.ahead_s(1.002) == pytest.approx(1.0)  # it hangs: who has 100 ms need not wait for it


def test_what_has_expired_is_never_run() -> None:
    line, model = Line(limit=10**6), queue()
    line.put(model, work(1, expires=1.0), 0.0)
    line.put(model, work(2, expires=3.0), 0.0)
    line.put(model, work(3, expires=2.0, shadow=True), 0.0)

    assert sizes(taken(line, 2.0)) == [2]
    assert line.candidates == 0 or line.take(2.0)[0] is None


def test_a_full_line_refuses_and_one_request_of_any_size_is_never_too_long() -> None:
    line, model = Line(limit=100), queue()
    line.put(model, work(500), 0.0)
    taken(line)
    line.put(model, work(60), 0.0)

    with pytest.raises(Refusal) as refused:
        line.put(model, work(41), 0.0)
    line.put(model, work(40), 0.0)

    assert (refused.value.status, refused.value.reason) == (503, "overloaded")


def test_shadow_work_goes_when_live_work_needs_the_room() -> None:
    line, model = Line(limit=100), queue()
    shadows = [work(10, shadow=True) for _ in range(2)]
    for shadow in shadows:
        line.put(model, shadow, 0.0)

    assert line.put(model, work(80), 0.0) == []
    assert line.put(model, work(5), 0.0) == shadows[:1]
    assert line.candidates == 95


def test_shadow_work_is_not_let_in_while_much_is_waiting() -> None:
    line, model = Line(limit=100), queue()
    line.put(model, work(int(100 * SHADOW_SHARE) + 1), 0.0)

    with pytest.raises(Refusal) as refused:
        line.put(model, work(1, shadow=True), 0.0)

    assert refused.value.reason == "shadow_dropped"


def test_shadow_work_takes_no_time_from_what_live_work_is_promised() -> None:
    line, model = Line(limit=10**6), queue()
    for _ in range(10):
        line.put(model, work(100, shadow=True), 0.0)

    line.put(model, work(100, expires=1.2e-3), 0.0)

    assert not taken(line).pieces[0].work.shadow


def test_on_a_gpu_a_request_waits_a_moment_for_company_and_a_full_run_does_not() -> None:
    line, model = Line(limit=10**6), queue(joining(piece=100), wait_s=0.001)
    line.put(model, work(60), 5.0)

    assert line.take(5.0) == (None, 5.001)
    line.put(model, work(30), 5.0005)
    assert line.take(5.0006) == (None, 5.001)
    line.put(model, work(30), 5.0007)

    assert sizes(taken(line, 5.0007)) == [60, 30]
    assert line.take(5.0007)[0] is None


def test_a_wait_ends_in_a_run() -> None:
    line, model = Line(limit=10**6), queue(joining(piece=100), wait_s=0.001)
    line.put(model, work(60), 5.0)

    assert sizes(taken(line, 5.001)) == [60]


def test_a_model_has_no_more_runs_under_way_than_it_can() -> None:
    line, model, other = Line(limit=10**6, threads=3), queue(lanes=1), queue(lanes=2)
    for one in (model, model, other, other, other):
        line.put(one, work(1), 0.0)

    batches = [taken(line) for _ in range(3)]

    assert [batch.queue for batch in batches] == [model, other, other]
    assert line.take(0.0) == (None, math.inf)
    line.ended(batches[0])
    assert taken(line).queue is model


def test_two_threads_halve_the_wait() -> None:
    line, model = Line(limit=10**6, threads=2), queue()
    for _ in range(4):
        line.put(model, work(100), 0.0)

    assert line.ahead_s(0.0) == pytest.approx(2.2e-3)
