"""Admission control: who would be late is refused before any work for it, and nobody else."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.deadline import Deadline
from service.errors import WouldBeLate
from service.scoring.admission import AdmissionController


def within(seconds: float) -> Deadline:
    return Deadline.after(seconds * 1000, since=time.monotonic())


def test_a_request_behind_more_work_than_its_deadline_leaves_is_refused():
    admission = AdmissionController()
    for _ in range(10):
        admission.admit(1.0, within(60))

    with pytest.raises(WouldBeLate) as refused:
        admission.admit(1.0, within(10.5))
    admission.admit(1.0, within(11.5))

    assert refused.value.retry_after_s == pytest.approx(10.0)


def test_with_nothing_under_way_every_request_is_let_in():
    admission = AdmissionController()

    admission.check(within(0.001))
    admission.admit(3600.0, within(0.001))

    with pytest.raises(WouldBeLate):
        admission.check(within(60))


def test_what_is_released_makes_room_again():
    admission = AdmissionController()
    admission.admit(5.0, within(60))
    admission.admit(5.0, within(60))

    admission.release(5.0)
    admission.admit(0.1, within(6))

    with pytest.raises(WouldBeLate):
        admission.admit(1.0, within(5.5))


@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=50))
def test_the_backlog_is_the_sum_of_what_is_under_way_and_nothing_is_left_over(seconds):
    admission = AdmissionController()
    for each in seconds:
        admission.admit(each, within(1e9))
    assert admission.backlog_s == pytest.approx(sum(seconds))

    for each in seconds:
        admission.release(each)

    assert admission.backlog_s == 0.0
