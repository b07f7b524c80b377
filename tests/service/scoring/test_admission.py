"""Who is refused before any work is done: against arithmetic by hand."""

import time

import pytest

from service.deadline import Deadline
from service.errors import Refusal
from service.scoring.admission import CAP, EVENT, FADE, Pace


class Clock:
    def __init__(self) -> None:
        self.spent = 0.0

    def __call__(self) -> float:
        return self.spent


def within(ms: float) -> Deadline:
    return Deadline.after(ms, since=time.monotonic())


def answered(pace: Pace, clock: Clock, *, num: int, candidates: int, loop_s: float) -> None:
    for _ in range(num):
        with pace.admitted(candidates, 0.0, within(60_000)):
            clock.spent += loop_s


def test_a_request_that_would_be_late_is_refused_and_leaves_nothing_behind():
    clock = Clock()
    pace = Pace(spent=clock)
    answered(pace, clock, num=1, candidates=100, loop_s=3.0)  # 0.01 s a candidate, with EVENT = 200 of them

    with pace.admitted(100, 2.0, within(60_000)):
        assert pace.ahead_s == pytest.approx(3.0 + 2.0)
        with pytest.raises(Refusal) as refused, pace.admitted(100, 2.0, within(9_900)):
            pytest.fail("it was let in")
        with pace.admitted(100, 2.0, within(10_200)):
            assert pace.ahead_s == pytest.approx(10.0)

    assert refused.value.status == 503
    assert refused.value.reason == "predicted_late"
    assert refused.value.headers is not None and refused.value.headers["Retry-After"] == "5"
    assert pace.ahead_s == 0.0


def test_behind_more_than_its_time_a_request_is_refused_however_small_it_is():
    clock = Clock()
    pace = Pace(spent=clock)
    answered(pace, clock, num=1, candidates=100, loop_s=3.0)
    pace.check(within(0))

    with pace.admitted(100, 2.0, within(60_000)):
        pace.check(within(5_100))
        with pytest.raises(Refusal) as refused:
            pace.check(within(4_900))

    assert refused.value.reason == "predicted_late"


def test_with_nothing_under_way_a_request_is_never_refused():
    clock = Clock()
    pace = Pace(spent=clock)
    answered(pace, clock, num=1, candidates=1, loop_s=1000.0)

    with pace.admitted(1, 1000.0, within(1)):
        pass


def test_what_an_answer_takes_is_learnt_and_forgotten():
    clock = Clock()
    pace = Pace(spent=clock)
    answered(pace, clock, num=10, candidates=100, loop_s=3.0)

    answered(pace, clock, num=1, candidates=100, loop_s=0.3)

    with pace.admitted(100, 0.0, within(60_000)):
        assert pace.ahead_s == pytest.approx((EVENT + 100) * (0.01 + FADE * (0.001 - 0.01)))


def test_what_the_loop_does_between_predictions_does_not_count():
    clock = Clock()
    clock.spent = 50.0
    pace = Pace(spent=clock)
    answered(pace, clock, num=1, candidates=100, loop_s=3.0)

    clock.spent += 500.0
    answered(pace, clock, num=1, candidates=100, loop_s=3.0)

    with pace.admitted(100, 0.0, within(60_000)):
        assert pace.ahead_s == pytest.approx(3.0)


def test_one_answer_says_only_so_much():
    clock = Clock()
    pace = Pace(spent=clock)
    answered(pace, clock, num=1, candidates=100, loop_s=3.0)

    answered(pace, clock, num=1, candidates=100, loop_s=3000.0)

    with pace.admitted(100, 0.0, within(60_000)):
        assert pace.ahead_s == pytest.approx(3.0 * (1 + FADE * (CAP - 1)))


def test_time_that_the_loop_only_waits_does_not_count():
    clock = Clock()
    pace = Pace(spent=clock)
    answered(pace, clock, num=1, candidates=100, loop_s=0.0)

    with pace.admitted(100, 0.0, within(60_000)), pace.admitted(100, 0.0, within(5)):
        assert pace.ahead_s == 0.0


def test_a_request_that_failed_is_no_longer_under_way():
    pace = Pace(spent=Clock())

    with pytest.raises(ZeroDivisionError), pace.admitted(100, 1.0, within(60_000)):
        raise ZeroDivisionError

    assert pace.ahead_s == 0.0
