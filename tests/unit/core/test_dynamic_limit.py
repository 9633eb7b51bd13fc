"""The limit that follows what is free."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.core.dynamic_limit import DynamicLimit


def _acquire_all(limit: DynamicLimit, user: str) -> int:
    """Take places for as long as there are any; how many that were."""
    taken = 0
    while limit.admits(user):
        limit.acquire(user)
        taken += 1
    return taken


@pytest.mark.parametrize(("factor", "gets"), [(2, 1333), (4, 1600), (8, 1777)])
def test_one_that_takes_all_it_can_get_is_left_its_part(factor: int, gets: int) -> None:
    assert _acquire_all(DynamicLimit(2000, factor), "a") == pytest.approx(gets, abs=1)


@pytest.mark.parametrize(("users", "each"), [(2, 40), (3, 28), (10, 9)])
def test_those_that_take_turns_get_the_same_and_leave_room_for_one_more(users: int, each: int) -> None:
    limit = DynamicLimit(100, 2)
    names = [str(number) for number in range(users)]
    while any(limit.admits(name) for name in names):
        for name in names:
            if limit.admits(name):
                limit.acquire(name)
    held = [100 - limit.free, *(limit.room(name) for name in names)]
    assert held[0] == pytest.approx(users * each, abs=users)
    assert held[1:] == [0] * users
    assert limit.admits("one more")


def test_after_three_that_give_nothing_back_the_next_finds_room() -> None:
    limit = DynamicLimit(20, 2)
    assert [_acquire_all(limit, user) for user in "abc"] == [13, 4, 2]
    assert limit.admits("d")


@given(size=st.integers(1, 50))
def test_many_that_want_little_use_every_place(size: int) -> None:
    limit = DynamicLimit(size, 2)
    for user in range(size):
        assert limit.admits(user)
        limit.acquire(user)
    assert limit.free == 0
    assert not limit.admits("one more")


def test_a_place_that_is_not_free_yet_is_not_held_against_who_has_done_with_it() -> None:
    limit = DynamicLimit(30, 2)
    held = _acquire_all(limit, "a")
    for _ in range(5):
        limit.end_use("a")
    assert limit.free == 30 - held
    assert limit.room("a") > 0
    limit.vacate()
    assert limit.free == 31 - held


def test_a_limit_rises_when_others_go() -> None:
    limit = DynamicLimit(30, 2)
    _acquire_all(limit, "a")
    before = _acquire_all(limit, "b")
    for _ in range(10):
        limit.release("a")
    assert limit.room("b") > 0
    assert before + _acquire_all(limit, "b") > before


@given(size=st.integers(0, 50))
def test_the_only_one_there_is_may_have_everything(size: int) -> None:
    assert _acquire_all(DynamicLimit(size, 4, sole=True), "a") == size


@given(
    size=st.integers(0, 60),
    factor=st.integers(1, 8),
    sole=st.booleans(),
    steps=st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=80),
)
def test_room_is_what_could_be_taken_and_no_more_is_held_than_there_is(
    size: int, factor: int, sole: bool, steps: list[tuple[str, bool]]
) -> None:
    limit = DynamicLimit(size, factor, sole=sole)
    for user, gives in steps:
        if gives and user in limit.users:
            limit.release(user)
        elif limit.admits(user):
            limit.acquire(user)
    assert 0 <= limit.free <= size
    for user in "abcde":
        room = limit.room(user)
        taken = _acquire_all(limit, user)
        assert taken == room
        for _ in range(taken):
            limit.release(user)
    limit.clear()
    assert limit.free == size
    assert not limit.users
