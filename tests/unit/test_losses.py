"""How often in a row a change's transaction was lost, and how long it then waits."""

from __future__ import annotations

from cdc import losses
from cdc.losses import LOSSES_MAX, Losses, pause_s
from tests.unit.changes import change


def test_losses_are_counted_for_each_change_until_it_has_an_outcome() -> None:
    lost, one, other = Losses(), change(1), change(2)
    assert [lost.add([one]) for _ in range(3)] == [1, 2, 3]
    assert lost.add([one, other]) == 4
    assert lost.add([other]) == 2
    lost.forget([one])
    assert one.id not in lost
    assert other.id in lost
    assert lost.add([one]) == 1


def test_what_was_not_heard_of_for_long_is_forgotten() -> None:
    lost, first = Losses(), change(1)
    lost.add([first])
    lost.add([change(seq) for seq in range(2, losses._REMEMBERED + 2)])
    assert first.id not in lost
    assert len(lost._times) == losses._REMEMBERED


def test_pauses_grow_up_to_a_bound() -> None:
    pauses = [pause_s(times) for times in range(1, LOSSES_MAX)]
    assert pauses == sorted(pauses)
    assert pauses[0] == 0.1
    assert 10 < sum(pauses) < 60
    assert pause_s(10_000) == pauses[-1]
