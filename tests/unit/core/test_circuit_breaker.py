"""When a handler rests, and how the end of an outage is found."""

from __future__ import annotations

import math

import pytest

from cdc.core.circuit_breaker import AFTER_MAX_S, KEYS, PAUSE_MIN_S, STEADY_S, BreakerState, CircuitBreaker


def _opened(now: float = 0.0) -> CircuitBreaker:
    breaker = CircuitBreaker()
    assert [breaker.unavailable(key, "away", now) for key in range(KEYS)] == [False] * (KEYS - 1) + [True]
    return breaker


def _half_open(now: float = 0.0) -> CircuitBreaker:
    breaker = _opened(now)
    assert breaker.try_half_open(now + breaker.wait_s(now))
    return breaker


@pytest.mark.parametrize(
    ("told", "state"),
    [
        (["a"] * 100, BreakerState.CLOSED),
        (["a", "b"] * 50, BreakerState.CLOSED),
        (["a", "b", "ok", "c", "a"], BreakerState.CLOSED),
        (["a", "failed", "b", "failed"] * 9, BreakerState.CLOSED),
        (["a", "b", "c"], BreakerState.OPEN),
        (["a", "failed", "b", "a", "c"], BreakerState.OPEN),
        (["ok", "certain"], BreakerState.OPEN),
        (["certain", "ok", "failed", "a"], BreakerState.OPEN),  # what began before is old
    ],
)
def test_it_opens_after_several_keys_in_a_row_or_at_once_where_it_can_be_no_keys_affair(
    told: list[str], state: BreakerState
) -> None:
    breaker = CircuitBreaker()
    for each in told:
        match each:
            case "ok":
                breaker.succeeded(0.0)
            case "failed":
                breaker.failed(0.0)
            case key:
                breaker.unavailable(key, "away", 0.0, certain=key == "certain")
    assert breaker.state is state
    assert breaker.why == ("away" if state is BreakerState.OPEN else "")


def test_one_call_at_a_time_finds_out_and_its_success_lets_all_through() -> None:
    breaker = _opened()
    assert (breaker.room, breaker.try_half_open(0.0), breaker.state) == (0, False, BreakerState.OPEN)
    assert breaker.try_half_open(PAUSE_MIN_S)
    assert (breaker.room, breaker.wait_s(1.0)) == (1, math.inf)
    breaker.trial(1)
    assert breaker.room == 0
    assert breaker.succeeded(1.0)
    breaker.trial(-1)
    assert not breaker.tripped
    assert not breaker.troubled
    assert not breaker.succeeded(1.0), "it closes once"


def test_a_trial_that_is_cut_off_changes_nothing_and_makes_room_for_another() -> None:
    breaker = _half_open()
    breaker.trial(1)
    breaker.trial(-1)
    assert (breaker.state, breaker.room) == (BreakerState.HALF_OPEN, 1)


def test_the_success_of_the_trial_counts_also_when_an_old_call_has_opened_it_again_meanwhile() -> None:
    breaker = _half_open()
    breaker.trial(1)
    breaker.unavailable("old", "away", 1.0)
    assert breaker.state is BreakerState.OPEN
    assert breaker.succeeded(1.0)


def test_pauses_double_up_to_a_bound_and_a_failure_of_another_kind_leaves_them_as_they_are() -> None:
    breaker, now, pauses = _opened(), 0.0, []
    for _ in range(8):
        pauses.append(breaker.wait_s(now))
        now += pauses[-1]
        assert breaker.try_half_open(now)
        breaker.failed(now)
        assert breaker.wait_s(now) == pytest.approx(pauses[-1])
        now += pauses[-1]
        assert breaker.try_half_open(now)
        breaker.unavailable("k", "away", now)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.0, 3.0, 3.0])


@pytest.mark.parametrize(("steady_s", "pause_s"), [(STEADY_S - 1, 0.2), (STEADY_S + 1, PAUSE_MIN_S)])
def test_what_comes_and_goes_is_asked_at_the_pace_that_was_reached(steady_s: float, pause_s: float) -> None:
    breaker = _half_open()
    breaker.unavailable("k", "away", 1.0)
    assert breaker.try_half_open(2.0)
    assert breaker.succeeded(2.0)
    now = 2.0 + steady_s
    assert breaker.unavailable("k", "away", now, certain=True)
    assert breaker.wait_s(now) == pytest.approx(pause_s)


@pytest.mark.parametrize(("asked_s", "waits_s"), [(0.01, PAUSE_MIN_S), (30.0, 30.0), (86_400.0, AFTER_MAX_S)])
def test_retry_after_is_respected_up_to_a_bound(asked_s: float, waits_s: float) -> None:
    breaker = CircuitBreaker()
    breaker.unavailable("k", "away", 0.0, certain=True, after_s=asked_s)
    assert breaker.wait_s(0.0) == waits_s
