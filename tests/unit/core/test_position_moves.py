"""When settles move positions: until their table grows by it, and then again after a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cdc.core.position_moves import PositionMoves

_ENOUGH = 16


def test_they_move_at_once_and_while_the_table_stays_as_it_is() -> None:
    moves = PositionMoves()
    for second in range(100):
        assert moves.allowed(float(second))
        moves.looked(40, _ENOUGH, float(second))


def test_a_table_that_grows_stops_them_for_longer_each_time() -> None:
    moves, now, pages, waits = PositionMoves(), 0.0, 100, []
    moves.looked(pages, _ENOUGH, now)
    for _ in range(9):
        pages += 50
        moves.looked(pages, _ENOUGH, now)
        began = now
        while not moves.allowed(now):
            now += 0.5
        waits.append(now - began)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]


def test_a_small_table_may_grow() -> None:
    moves = PositionMoves()
    for pages in range(_ENOUGH + 1):
        moves.looked(pages, _ENOUGH, 0.0)
    assert moves.allowed(0.0)
    moves.looked(_ENOUGH + 1, _ENOUGH, 0.0)
    assert not moves.allowed(0.0)


def test_the_first_look_knows_of_no_growth() -> None:
    moves = PositionMoves()
    moves.looked(1_000_000, _ENOUGH, 0.0)
    assert moves.allowed(0.0)


def test_a_look_at_which_it_has_not_grown_makes_the_next_wait_shorter_only_while_they_move() -> None:
    moves = PositionMoves()
    for pages in (100, 200, 300, 400):  # waits of 1, 2 and 4 s
        moves.looked(pages, _ENOUGH, 0.0)
    moves.looked(400, _ENOUGH, 3.0)
    moves.looked(400, _ENOUGH, 4.0)
    moves.looked(500, _ENOUGH, 5.0)
    assert not moves.allowed(8.9)
    assert moves.allowed(9.0)


def test_whoever_met_too_many_rows_waits_as_well() -> None:
    moves = PositionMoves()
    moves.wait(10.0)
    assert not moves.allowed(10.9)
    assert moves.allowed(11.0)


@given(st.lists(st.tuples(st.integers(0, 1_000), st.floats(0, 100)), max_size=50))
def test_they_move_again_within_a_minute_whatever_the_looks_say(looks: list[tuple[int, float]]) -> None:
    moves, now = PositionMoves(), 0.0
    for pages, passed in looks:
        now += passed
        moves.looked(pages, _ENOUGH, now)
    assert moves.allowed(now + 60.001)
