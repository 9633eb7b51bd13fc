"""When something that was tried in vain is tried again, and how often that is told."""

from __future__ import annotations

from cdc.core.delay import Delay


def test_the_pauses_grow_up_to_a_bound_and_start_again_after_a_success() -> None:
    delay, now, rests = Delay(), 100.0, []
    for _ in range(7):
        delay.failed(now)
        rests.append(round(delay.until - now, 6))
        now = delay.until
    assert rests == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    delay.done(now)
    assert delay.until == 0.0
    delay.failed(now)
    assert round(delay.until - now, 6) == 0.1


def test_it_is_logged_at_once_and_then_each_half_minute() -> None:
    delay = Delay()
    assert [delay.failed(now) for now in (0.0, 1.0, 29.9, 30.0, 31.0, 60.0)] == [True, False, False, True, False, True]


def test_it_says_since_when_and_for_how_long() -> None:
    delay = Delay()
    assert delay.done(1.0) is None
    delay.failed(2.0)
    delay.failed(3.0)
    assert delay.since == 2.0
    assert delay.done(5.0) == 3.0
    assert delay.since is None
    assert delay.done(6.0) is None


def test_what_is_done_before_it_was_reported_is_not_reported_either() -> None:
    delay = Delay()
    delay.begin(1.0)
    assert (delay.since, delay.until) == (1.0, 0.0)
    assert delay.done(2.0) is None
    assert delay.since is None


def test_part_of_it_that_is_obstructed_is_reported_and_rests_nothing() -> None:
    delay = Delay()
    delay.begin(1.0)
    assert [delay.reports(now) for now in (2.0, 3.0)] == [True, False]
    assert delay.until == 0.0
    assert delay.done(4.0) == 3.0


def test_after_part_of_it_was_done_the_next_rest_is_short() -> None:
    delay = Delay()
    for now in (1.0, 2.0):
        delay.failed(now)
    delay.advanced()
    assert delay.until == 0.0
    delay.failed(3.0)
    assert round(delay.until - 3.0, 6) == 0.1
    assert delay.since == 1.0
