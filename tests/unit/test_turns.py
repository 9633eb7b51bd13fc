"""Who runs next, and who would have to wait for something that others use up."""

from __future__ import annotations

from contextlib import closing

from hypothesis import given
from hypothesis import strategies as st

from cdc.model import Key
from cdc.turns import Needs, Turns
from tests.unit.changes import change

_A, _B = Needs("a", "on loop"), Needs("b", "on loop")
_A_SYNC, _B_SYNC = Needs("a", "sync", ("threads",)), Needs("b", "sync", ("threads",))


def _put(turns: Turns, needs: Needs, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        turns.put((needs.entity_type, str(number)), needs)


def _start_all(turns: Turns) -> list[Key]:
    started = []
    while turn := turns.next():
        keys, needs = turn
        turns.started([change(len(started) + place) for place in range(len(keys))], needs)
        started += keys
    return started


def test_types_take_turns_however_long_their_queues_are() -> None:
    turns = Turns()
    _put(turns, _A, 4)
    _put(turns, _B, 2)
    assert [key[0] for key in _start_all(turns)] == ["a", "b", "a", "b", "a", "a"]


def test_the_keys_of_a_type_start_in_the_order_in_which_they_became_ready() -> None:
    turns = Turns()
    _put(turns, _A, 3)
    assert _start_all(turns) == [("a", "0"), ("a", "1"), ("a", "2")]


def test_one_type_does_not_take_every_slot_and_what_comes_later_starts_at_once() -> None:
    turns = Turns(10, sole=False)
    _put(turns, _A, 100)
    assert len(_start_all(turns)) == 6
    _put(turns, _B, 1)
    assert turns.ready == 1
    assert _start_all(turns) == [("b", "0")]


def test_many_types_use_every_slot() -> None:
    turns = Turns(10, sole=False)
    for number in range(100):
        _put(turns, Needs(str(number)), 2)
    assert len(_start_all(turns)) == 10


def test_what_waits_for_a_thread_holds_no_slot_and_leaves_threads_to_others() -> None:
    turns = Turns(100, {"threads": 5}, sole=False)
    _put(turns, _A_SYNC, 50)
    _put(turns, _A, 5)
    started = _start_all(turns)
    assert len(started) == 3 + 5
    _put(turns, _B_SYNC, 5)
    assert _start_all(turns) == [("b", "0")]
    assert turns.ready == 0
    assert turns.waiting(_A_SYNC) == 47


def test_a_slot_and_its_threads_are_free_again_when_the_change_has_ended() -> None:
    turns = Turns(3, {"threads": 1})
    _put(turns, _A_SYNC, 2)
    first = change(1)
    assert turns.next() == ([("a", "0")], _A_SYNC)
    turns.started([first], _A_SYNC)
    assert turns.next() is None
    turns.ended([first])
    turns.ended([first])  # it holds nothing any more
    assert turns.ready == 1
    assert turns.next() == ([("a", "1")], _A_SYNC)


def test_a_run_has_several_keys_of_one_queue_but_no_more_than_may_start() -> None:
    quick, other = Needs("a", "quick", run=3), Needs("b", "other")
    turns = Turns(7, sole=False)
    _put(turns, quick, 5)
    _put(turns, other, 1)
    assert turns.next() == ([("a", "0"), ("a", "1"), ("a", "2")], quick)
    run = [change(number) for number in range(3)]
    turns.started(run, quick)
    assert turns.next() == ([("b", "0")], other)
    turns.started([change(9)], other)
    assert turns.next() == ([("a", "3")], quick)  # with both, one of seven slots would be left
    turns.started([change(4)], quick)
    turns.ended(run)
    assert turns.next() == ([("a", "4")], quick)


def test_of_several_that_end_together_each_gives_back_its_own() -> None:
    turns = Turns(10, {"threads": 3}, sole=False)
    changes = [change(number) for number in range(4)]
    for one, needs in zip(changes, (_A, _B_SYNC, _B_SYNC, _A), strict=True):
        turns.started([one], needs)
    _put(turns, _A_SYNC, 9)
    assert turns.ready == 1
    turns.ended(changes)
    assert turns.ready == 2
    assert len(_start_all(turns)) == 2
    turns.ended(changes)  # they hold nothing any more
    assert turns.ready == 0


def test_the_keys_of_one_handler_are_offered_whatever_their_type_and_the_rest_stays_in_its_place() -> None:
    turns = Turns(pools={"threads": 1})
    _put(turns, _A, 3)
    _put(turns, _B, 1)
    _put(turns, _A_SYNC, 1)
    with closing(turns.of_handler("on loop")) as keys:
        assert [next(keys), next(keys)] == [("a", "0"), ("a", "1")]
        turns.put(("a", "0"), _A)
    with closing(turns.of_handler("on loop")) as keys:
        assert set(keys) == {("a", "2"), ("a", "0"), ("b", "0")}
    assert _start_all(turns) == [("a", "0")]
    assert turns.next() is None


@given(
    slots=st.integers(1, 12),
    threads=st.integers(1, 12),
    sole=st.booleans(),
    counts=st.lists(st.integers(0, 8), min_size=4, max_size=4),
    run=st.integers(1, 5),
)
def test_ready_is_zero_if_and_only_if_nothing_can_start(
    slots: int, threads: int, sole: bool, counts: list[int], run: int
) -> None:
    turns = Turns(slots, {"threads": threads}, sole=sole)
    for needs, count in zip((_A._replace(run=run), _B, _A_SYNC, _B_SYNC), counts, strict=True):
        _put(turns, needs, count)
    running = 0
    while turns.ready:
        turn = turns.next()
        assert turn is not None
        keys, needs = turn
        turns.started([change(running + place) for place in range(len(keys))], needs)
        running += len(keys)
    assert turns.next() is None
    assert running <= slots
