"""What is read next, and when a wake-up may be trusted to keep order."""

from __future__ import annotations

import pytest

from cdc.intake import Fetch, Intake, Snapshot, Sweep
from cdc.model import WakeUp

_ROOM, _SWEEP_ROOM = 100, 10


@pytest.fixture
def intake() -> Intake:
    """Streaming, and one shard that is live."""
    made = Intake(sweep_interval_s=5.0, queue_capacity=4)
    made.own([0])
    made.streaming(connected=True)
    _pass(made, 0.0, Snapshot(10, 10))
    _pass(made, 0.1, Snapshot(10, 10))
    assert made.live_shards == 1
    return made


def _ask(intake: Intake, now: float) -> Fetch | Sweep | None:
    return intake.next(now, _ROOM, _SWEEP_ROOM)


def _pass(intake: Intake, now: float, snapshot: Snapshot, *seqs: int) -> Sweep:
    sweep = _ask(intake, now)
    assert isinstance(sweep, Sweep), sweep
    intake.swept(sweep, [WakeUp(seq, 0) for seq in seqs], {}, snapshot, now)
    return sweep


def test_a_shard_taken_over_is_swept_from_its_first_change_on() -> None:
    intake = Intake(sweep_interval_s=5.0)
    intake.own([3])
    sweep = _ask(intake, 0.0)
    assert isinstance(sweep, Sweep)
    assert sweep.positions[3][:2] == (0, 0)


def test_a_live_shard_is_read_by_number(intake: Intake) -> None:
    intake.rung([WakeUp(7, 0)])
    assert _ask(intake, 0.2) == Fetch((WakeUp(7, 0),))
    assert _ask(intake, 0.2) is None


def test_a_wake_up_for_somebody_elses_shard_is_ignored(intake: Intake) -> None:
    intake.rung([WakeUp(7, 1)])
    assert intake.queue_length == 0


def test_a_number_that_is_not_visible_is_looked_for_again_within_milliseconds_and_in_every_fetch(
    intake: Intake,
) -> None:
    intake.rung([WakeUp(7, 0)])
    fetch = _ask(intake, 1.0)
    assert isinstance(fetch, Fetch)
    intake.fetched(fetch, set(), Snapshot(20, 21), 1.0)
    assert intake.wait_s(1.0) == pytest.approx(0.001)
    assert _ask(intake, 1.0) is None
    intake.rung([WakeUp(8, 0)])
    assert _ask(intake, 1.0005) == Fetch((WakeUp(7, 0), WakeUp(8, 0)))


def test_the_looks_for_a_hanging_commit_come_at_most_a_twentieth_of_a_second_apart(intake: Intake) -> None:
    intake.rung([WakeUp(7, 0)])
    now, looks = 1.0, 0
    while now < 2.0:
        fetch = _ask(intake, now)
        assert isinstance(fetch, Fetch)
        intake.fetched(fetch, set(), Snapshot(20, 21), now)
        assert intake.wait_s(now) <= 0.05 + 1e-9
        now += intake.wait_s(now)
        looks += 1
    assert 20 <= looks <= 40


def test_a_number_whose_transaction_has_ended_unseen_was_settled_before_and_is_forgotten(intake: Intake) -> None:
    intake.rung([WakeUp(7, 0)])
    fetch = _ask(intake, 1.0)
    assert isinstance(fetch, Fetch)
    intake.fetched(fetch, set(), Snapshot(20, 21), 1.0)
    fetch = _ask(intake, 1.1)
    assert isinstance(fetch, Fetch)
    intake.fetched(fetch, set(), Snapshot(21, 22), 1.1)
    assert _ask(intake, 1.2) is None


def test_dropped_wake_ups_are_counted_and_their_shard_is_swept_until_the_loss_is_proved_harmless(
    intake: Intake,
) -> None:
    assert intake.rung([WakeUp(seq, 0) for seq in range(1, 8)]) == 3
    _pass(intake, 1.0, Snapshot(30, 40), 1, 2, 3)
    assert intake.live_shards == 0, "transactions up to 39 may have rung and be invisible still"
    _pass(intake, 1.1, Snapshot(39, 50))
    assert intake.live_shards == 0
    _pass(intake, 1.2, Snapshot(40, 50))
    assert intake.live_shards == 1


def test_a_sweep_that_was_under_way_when_wake_ups_were_lost_proves_nothing(intake: Intake) -> None:
    intake.lost()
    sweep = _ask(intake, 1.0)
    assert isinstance(sweep, Sweep)
    intake.lost()
    intake.swept(sweep, [], {}, Snapshot(30, 30), 1.0)
    _pass(intake, 1.1, Snapshot(30, 31))
    assert intake.live_shards == 0
    _pass(intake, 1.2, Snapshot(31, 31))
    assert intake.live_shards == 1


def test_the_floor_rises_only_when_no_open_transaction_can_bring_a_lower_number(intake: Intake) -> None:
    intake.lost()
    _pass(intake, 1.0, Snapshot(30, 40), 5, 9)
    assert _pass(intake, 1.1, Snapshot(39, 41)).positions[0] == (0, 9, 30)
    assert _pass(intake, 1.2, Snapshot(40, 42)).positions[0] == (0, 9, 39)
    intake.lost()
    assert _pass(intake, 1.3, Snapshot(42, 42)).positions[0] == (9, 9, 40)


def test_a_full_page_is_followed_by_the_next_from_where_it_ended() -> None:
    intake = Intake(sweep_interval_s=5.0)
    intake.own([0])
    first = intake.next(0.0, 2, 1)
    assert isinstance(first, Sweep)
    intake.swept(first, [WakeUp(4, 0), WakeUp(6, 0)], {}, Snapshot(10, 10), 0.0)
    second = intake.next(0.0, 2, 1)
    assert isinstance(second, Sweep)
    assert second.positions[0].cursor == 6


def test_what_could_not_be_taken_in_is_read_again_from_there(intake: Intake) -> None:
    intake.lost()
    sweep = _ask(intake, 1.0)
    assert isinstance(sweep, Sweep)
    intake.swept(sweep, [WakeUp(5, 0), WakeUp(9, 0)], {0: 9}, Snapshot(30, 30), 1.0)
    assert _ask(intake, 1.0) is None, "not at once: there is no room"
    again = _ask(intake, 1.6)
    assert isinstance(again, Sweep)
    assert again.positions[0].cursor == 8


def test_a_sweep_waits_for_room_and_a_fetch_does_not(intake: Intake) -> None:
    intake.rung([WakeUp(7, 0)])
    assert isinstance(intake.next(1.0, 1, _SWEEP_ROOM), Fetch)
    intake.lost()
    assert intake.next(1.0, _SWEEP_ROOM - 1, _SWEEP_ROOM) is None
    assert isinstance(intake.next(1.0, _SWEEP_ROOM, _SWEEP_ROOM), Sweep)


def test_relayed_wake_ups_make_a_shard_be_swept_at_once_and_never_read_by_number(intake: Intake) -> None:
    intake.streaming(connected=False)
    _pass(intake, 1.0, Snapshot(30, 30))
    _pass(intake, 1.0 + intake.wait_s(1.0), Snapshot(30, 30))
    assert intake.live_shards == 0
    intake.rung([WakeUp(7, 0)])
    assert intake.queue_length == 0
    _pass(intake, 1.5, Snapshot(30, 30), 7)


def test_the_periodic_sweep_comes_round_and_now_and_then_begins_at_zero(intake: Intake) -> None:
    now, fulls = 0.0, 0
    for _ in range(30):
        now += 5.0
        if intake.full_pass_due(now):
            fulls += 1
            assert list(intake.restart()) == [0]
        _pass(intake, now, Snapshot(50, 50))
    assert fulls == 2
