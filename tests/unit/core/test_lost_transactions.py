"""How often in a row a change's transaction was lost, and how long it then waits."""

from __future__ import annotations

from cdc.core import lost_transactions
from cdc.core.lost_transactions import LOSSES_MAX, SESSIONS_MAX, Losses, LostCalls
from tests.changes import change


def test_losses_are_counted_for_each_change_until_it_has_an_outcome() -> None:
    lost, one, other = Losses(), change(1), change(2)
    assert [lost.add([one]) for _ in range(3)] == [1, 2, 3]
    assert lost.add([one, other]) == 4
    assert lost.add([other]) == 2
    lost.forget([one])
    assert (lost.times(one.id), lost.times(other.id)) == (0, 2)
    assert lost.add([one]) == 1


def test_who_loses_a_transaction_is_a_suspect_at_once_and_who_loses_a_session_when_it_is_often() -> None:
    lost, one, other = Losses(), change(1), change(2)
    lost.add([one])
    for _ in range(SESSIONS_MAX - 1):
        lost.add([other], suspect_at=SESSIONS_MAX)
    assert lost.suspects == {one.id}
    lost.add([other], suspect_at=SESSIONS_MAX)
    assert lost.suspects == {one.id, other.id}
    lost.forget([one, other])
    assert lost.suspects == set()


def test_what_was_not_seen_for_long_is_forgotten() -> None:
    lost, first = Losses(), change(1)
    lost.add([first])
    others = [change(seq) for seq in range(2, lost_transactions.REMEMBERED + 2)]
    lost.add(others)
    assert lost.times(first.id) == 0
    assert first.id not in lost.suspects
    assert sum(lost.times(each.id) for each in others) == lost_transactions.REMEMBERED


def test_pauses_grow_up_to_a_bound() -> None:
    lost, one, pauses = LostCalls(), change(1), list[float]()
    for _ in range(LOSSES_MAX - 1):
        lost.transaction_lost([one], blocked=False)
        pauses.append(lost.pause_s(one))
    assert pauses == sorted(pauses)
    assert pauses[0] == 0.1
    assert 10 < sum(pauses) < 60
    for _ in range(1_000):
        lost.transaction_lost([one], blocked=False)
    assert lost.pause_s(one) == pauses[-1]


def test_what_a_call_of_an_earlier_session_brings_is_a_loss_and_not_an_outcome() -> None:
    lost, one = LostCalls(), change(1)
    for _ in range(SESSIONS_MAX):
        began = lost.session
        lost.session_lost()
        lost.call_ended([one], began)
    assert lost.is_suspect(one)
    assert lost.times(one) == SESSIONS_MAX
    lost.call_ended([one], lost.session)
    assert not lost.has(one)


def test_an_obstacle_makes_no_suspect_and_counts_as_lasting_for_a_change_that_ran_alone() -> None:
    lost, one, other = LostCalls(), change(1), change(2)
    for _ in range(LOSSES_MAX - 1):
        assert not lost.transaction_lost([one], blocked=True)
    assert not lost.transaction_lost([one, other], blocked=True)
    assert lost.has(one)
    assert not lost.is_suspect(one)
    assert lost.times(one) == 0
    assert lost.transaction_lost([one], blocked=True)
    assert not lost.transaction_lost([one], blocked=False)
