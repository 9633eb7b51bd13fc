from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.core.lsn import ZERO, Lsn
from cdc.core.reconnect import ReconnectState
from cdc.replication.lsn_tracker import LsnTracker, status_interval_s

positions = st.integers(0, 2**64 - 1)


@given(st.lists(positions | st.just("confirm"), max_size=30))
def test_positions_only_rise_and_no_more_is_confirmed_than_was_received(steps: list[int | str]) -> None:
    progress, sent = LsnTracker(interval_s=1.0, now=0.0), [0]
    for step in steps:
        before = progress.received, progress.confirmed
        if isinstance(step, int):
            progress.receive(step)
            sent.append(step)
        else:
            assert progress.confirm(0.0) == max(sent)
        assert (progress.received, progress.confirmed) >= before
        assert progress.confirmed <= progress.received == max(sent)


def test_a_status_update_is_due_at_once_then_after_each_interval() -> None:
    progress = LsnTracker(interval_s=2.0, now=100.0)
    assert progress.next_status_at <= 100.0
    assert progress.confirm(100.0) == ZERO
    assert progress.next_status_at == 102.0


def test_a_status_update_is_due_when_the_server_asks_and_once_for_each_question() -> None:
    progress = LsnTracker(interval_s=2.0, now=100.0)
    progress.confirm(100.0)
    progress.receive(Lsn.parse("0/10"), reply_requested=True)
    progress.receive(Lsn.parse("0/20"))
    assert progress.next_status_at < 100.1
    assert str(progress.confirm(100.1)) == "0/20"
    assert progress.next_status_at == pytest.approx(102.1)


@pytest.mark.parametrize(
    ("timeout_s", "interval_s"), [(15.0, 2.5), (3.0, 0.5), (60.0, 10.0), (600.0, 10.0), (0.0, 10.0)]
)
def test_the_interval_leaves_several_updates_within_the_servers_patience(timeout_s: float, interval_s: float) -> None:
    assert status_interval_s(timeout_s) == interval_s


def silence(attempts: ReconnectState, **brought: Any) -> ReconnectState:
    return attempts.after(**{"stalled": True, "advanced": False, "talked_s": 1.0, **brought})


def test_the_limit_doubles_with_each_silence_that_brought_nothing_up_to_ten_minutes() -> None:
    attempts, limits = ReconnectState(30.0), []
    for _ in range(7):
        limits.append(attempts.stall_limit_s)
        attempts = silence(attempts)
    assert limits == [30, 60, 120, 240, 480, 600, 600]


def test_a_session_that_brought_something_new_or_lived_long_starts_afresh() -> None:
    attempts = silence(silence(ReconnectState(30.0)))
    assert attempts.stall_limit_s == 120
    assert silence(attempts, advanced=True).stall_limit_s == 60
    assert silence(attempts, talked_s=121.0).stall_limit_s == 60
    assert attempts.after(stalled=False, advanced=True, talked_s=0.0) == ReconnectState(30.0, failures=1, silences=0)


def test_a_refusal_in_between_does_not_shorten_the_limit_again() -> None:
    attempts = silence(ReconnectState(30.0)).after(stalled=False, advanced=False, talked_s=0.0)
    assert attempts.stall_limit_s == 60


def broken_off(attempts: ReconnectState, **brought: Any) -> ReconnectState:
    return attempts.after(**{"stalled": False, "advanced": False, "talked_s": 1.0, "broken_off": True, **brought})


def test_sessions_that_break_off_one_after_another_and_come_no_further_are_stuck() -> None:
    attempts, stuck = ReconnectState(30.0), []
    for _ in range(6):
        stuck.append(attempts.stuck)
        attempts = broken_off(attempts)
    assert stuck == [False] * 5 + [True]


def test_only_coming_further_is_a_way_out_not_talking_long() -> None:
    attempts = ReconnectState(30.0, dead_ends=4)
    assert broken_off(attempts, talked_s=600.0).stuck
    assert not broken_off(attempts, advanced=True).stuck
    assert broken_off(attempts, advanced=True).dead_ends == 0


def test_ends_that_the_wal_cannot_have_caused_do_not_count() -> None:
    attempts = ReconnectState(30.0, dead_ends=4)
    assert silence(attempts).dead_ends == 4
    assert attempts.after(stalled=False, advanced=False, talked_s=0.0).dead_ends == 4


@given(st.integers(1, 5000), st.floats(0, 1, exclude_max=True), st.booleans(), st.booleans())
def test_pauses_are_jittered_and_bounded(failures: int, fraction: float, permanent: bool, standby: bool) -> None:
    pause_s = ReconnectState(30.0, failures=failures).pause_s(fraction, permanent=permanent, standby=standby)
    assert 0.05 <= pause_s <= (60 if permanent else 30)
    if standby:
        assert pause_s <= 5


def test_pauses_grow_from_a_tenth_of_a_second_to_half_a_minute() -> None:
    ceilings = [
        ReconnectState(30.0, failures=n).pause_s(1.0, permanent=False, standby=False) for n in (0, 1, 2, 3, 9, 10, 99)
    ]
    assert ceilings == [0.1, 0.1, 0.2, 0.4, 25.6, 30.0, 30.0]
