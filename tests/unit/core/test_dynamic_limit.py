"""The limit that follows what is free."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.core.dynamic_limit import DynamicLimit


def _take_all(quota: DynamicLimit, user: str) -> int:
    """Take places for as long as there are any; how many that were."""
    taken = 0
    while quota.admits(user):
        quota.take(user)
        taken += 1
    return taken


@pytest.mark.parametrize(("factor", "gets"), [(2, 1333), (4, 1600), (8, 1777)])
def test_one_that_takes_all_it_can_get_is_left_its_part(factor: int, gets: int) -> None:
    assert _take_all(DynamicLimit(2000, factor), "a") == pytest.approx(gets, abs=1)


@pytest.mark.parametrize(("users", "each"), [(2, 40), (3, 28), (10, 9)])
def test_those_that_take_turns_get_the_same_and_leave_room_for_one_more(users: int, each: int) -> None:
    quota = DynamicLimit(100, 2)
    names = [str(number) for number in range(users)]
    while any(quota.admits(name) for name in names):
        for name in names:
            if quota.admits(name):
                quota.take(name)
    held = [100 - quota.free, *(quota.room(name) for name in names)]
    assert held[0] == pytest.approx(users * each, abs=users)
    assert held[1:] == [0] * users
    assert quota.admits("one more")


def test_whoever_comes_after_three_that_give_nothing_back_finds_room() -> None:
    quota = DynamicLimit(20, 2)
    assert [_take_all(quota, user) for user in "abc"] == [13, 4, 2]
    assert quota.admits("d")


@given(size=st.integers(1, 50))
def test_many_that_want_little_use_every_place(size: int) -> None:
    quota = DynamicLimit(size, 2)
    for user in range(size):
        assert quota.admits(user)
        quota.take(user)
    assert quota.free == 0
    assert not quota.admits("one more")


def test_a_place_that_is_not_free_yet_is_not_held_against_who_has_done_with_it() -> None:
    quota = DynamicLimit(30, 2)
    held = _take_all(quota, "a")
    for _ in range(5):
        quota.leave("a")
    assert quota.free == 30 - held
    assert quota.room("a") > 0
    quota.vacate()
    assert quota.free == 31 - held


def test_a_limit_rises_when_others_go() -> None:
    quota = DynamicLimit(30, 2)
    _take_all(quota, "a")
    before = _take_all(quota, "b")
    for _ in range(10):
        quota.give("a")
    assert quota.room("b") > 0
    assert before + _take_all(quota, "b") > before


@given(size=st.integers(0, 50))
def test_the_only_one_there_is_may_have_everything(size: int) -> None:
    assert _take_all(DynamicLimit(size, 4, sole=True), "a") == size


@given(
    size=st.integers(0, 60),
    factor=st.integers(1, 8),
    sole=st.booleans(),
    steps=st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=80),
)
def test_room_is_what_could_be_taken_and_no_more_is_held_than_there_is(
    size: int, factor: int, sole: bool, steps: list[tuple[str, bool]]
) -> None:
    quota = DynamicLimit(size, factor, sole=sole)
    for user, gives in steps:
        if gives and user in quota.users:
            quota.give(user)
        elif quota.admits(user):
            quota.take(user)
    assert 0 <= quota.free <= size
    for user in "abcde":
        room = quota.room(user)
        taken = _take_all(quota, user)
        assert taken == room
        for _ in range(taken):
            quota.give(user)
    quota.clear()
    assert quota.free == size
    assert not quota.users
