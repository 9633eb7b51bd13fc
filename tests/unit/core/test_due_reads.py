"""When waiting changes are read, and which of their types."""

from __future__ import annotations

import pytest

from cdc.core.due_reads import DueReads


class _Window:
    """How many changes of each type it takes; a page of ten is worth while."""

    def __init__(self) -> None:
        self.free: dict[str, int] = {}

    def __call__(self, entity_type: str) -> tuple[int, int]:
        return self.free.get(entity_type, 100), 10


@pytest.fixture
def window() -> _Window:
    return _Window()


@pytest.fixture
def due(window: _Window) -> DueReads:
    """Nothing is due until 60.0: all types were read at 0.0."""
    made = DueReads(window, sweep_interval_s=60.0, poll_interval_s=1.0)
    _read(made, 0.0)
    return made


def _read(due: DueReads, now: float, **answer: object) -> list[str]:
    """A read that takes no time. Returns the types that it left out."""
    without = due.begin(now, ["a", "b"])
    given = {"rejected": (), "next_due_s": None, "go_on": None, "more": False}
    due.done(now, **{**given, **answer})  # type: ignore[arg-type]
    return list(without)


def _at(due: DueReads, now: float = 0.0, *, scarce: bool = False) -> float:
    return due.next_at(now, scarce=scarce)


def test_the_first_read_is_due_at_once(window: _Window) -> None:
    assert _at(DueReads(window, sweep_interval_s=60.0, poll_interval_s=1.0)) == 0.0


def test_after_all_types_the_next_read_comes_with_the_next_due_change_or_the_interval(due: DueReads) -> None:
    assert _at(due) == 60.0
    _read(due, 60.0, next_due_s=7.0)
    assert _at(due) == 67.0


def test_what_settles_brings_the_next_read_forward_also_during_one(due: DueReads) -> None:
    due.within(5.0, 1.0)
    assert _at(due) == 6.0
    due.begin(6.0, [])
    due.within(2.0, 6.0)
    due.done(6.0, rejected=(), next_due_s=None, go_on=None, more=False)
    assert _at(due) == 8.0


def test_a_read_that_did_not_reach_all_types_goes_on_at_once_and_forgets_no_due_time(due: DueReads) -> None:
    _read(due, 60.0, go_on=7, next_due_s=3.0)
    assert (due.start, _at(due, 60.0)) == (7, 60.0)
    _read(due, 60.5, next_due_s=30.0)
    assert (due.start, _at(due)) == (None, 63.0)


def test_a_page_that_was_full_is_followed_by_another(due: DueReads) -> None:
    _read(due, 60.0, more=True)
    assert _at(due) == 60.0


def test_a_type_without_room_is_left_out_until_it_has_room_or_once_an_interval(due: DueReads, window: _Window) -> None:
    window.free["a"] = 5
    due.within(0.0, 0.5)
    assert _read(due, 0.5) == ["a"]
    assert (list(due.left_out), _at(due, 0.6)) == (["a"], 1.5)
    assert _read(due, 1.5) == [], "some room is room, once an interval"
    window.free["a"] = 0
    assert _read(due, 2.5) == ["a"]
    window.free["a"] = 10
    assert _at(due, 2.6) == 2.6


def test_a_type_whose_changes_were_rejected_waits_for_room_as_well(due: DueReads, window: _Window) -> None:
    window.free["b"] = 0
    _read(due, 60.0, rejected={"b": {0: 1}})
    assert "b" in due.left_out
    assert _at(due, 60.1) == 61.0


def test_while_the_window_has_little_room_reads_keep_the_interval(due: DueReads) -> None:
    _read(due, 60.0, more=True)
    assert _at(due, 60.1, scarce=True) == 61.0


@pytest.mark.parametrize(("took_s", "rests_s"), [(0.1, 0.4), (60.0, 1.0)])
def test_reads_that_take_long_leave_time_for_others(due: DueReads, took_s: float, rests_s: float) -> None:
    due.begin(60.0, [])
    due.done(60.0 + took_s, rejected=(), next_due_s=0.0, go_on=None, more=True)
    assert _at(due) == pytest.approx(60.0 + took_s + rests_s)
