"""How much a backfill reads next, and when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.core.backfill_pace import PAGE_MAX, BackfillPace, Page, Wait


def wrote(pace: BackfillPace, page: Page, rows: int, now: float, *, first: int = 1) -> None:
    """The page took no time, and wrote so many rows, numbered from ``first`` on."""
    pace.done(page, range(first, first + rows), now, now)


def test_pages_are_full_while_what_was_written_is_settled() -> None:
    pace = BackfillPace(rate=None, backlog=1_000)
    for _ in range(3):
        page = pace.next(0, 0.0)
        assert page == Page(PAGE_MAX, PAGE_MAX)
        wrote(pace, page, PAGE_MAX, 0.0)


def test_it_waits_longer_and_longer_for_a_backlog_that_does_not_shrink() -> None:
    pace = BackfillPace(rate=None, backlog=100)
    waits = [pace.next(95, 0.0) for _ in range(20)]
    assert all(isinstance(each, Wait) and each.backlog for each in waits)
    seconds = [each.seconds for each in waits if isinstance(each, Wait)]
    assert seconds == sorted(seconds)
    assert (seconds[0], seconds[-1]) == (0.005, 0.5)
    assert isinstance(pace.next(40, 0.0), Page)


@given(
    rate=st.floats(0.1, 10_000),
    backlog=st.integers(1, 1_000),
    steps=st.lists(st.tuples(st.floats(0, 1), st.booleans())),
)
def test_the_rate_and_the_backlog_hold_whatever_happens(
    rate: float, backlog: int, steps: list[tuple[float, bool]]
) -> None:
    pace = BackfillPace(rate=rate, backlog=backlog)
    now, unsettled, written, largest = 0.0, 0, 0, 0
    for passed, settles in steps:
        now += passed
        turn = pace.next(unsettled, now)
        if isinstance(turn, Page):
            largest = max(largest, turn.write)
            written, unsettled = written + turn.write, unsettled + turn.write
            wrote(pace, turn, turn.write, now)
        assert unsettled <= backlog
        assert written <= rate * now + largest + 1e-6
        if settles:
            unsettled = 0


def test_a_page_that_met_a_locked_row_is_read_again_smaller_down_to_one_row_and_grows_again() -> None:
    pace = BackfillPace(rate=None, backlog=125)
    sizes, now = list[int](), 0.0
    for _ in range(5):
        pace.locked(now)
        wait = pace.next(0, now)
        assert isinstance(wait, Wait)
        assert wait.locked
        now += 0.25
        page = pace.next(0, now)
        assert isinstance(page, Page)
        sizes.append(page.write)
    assert sizes == [12, 3, 1, 1, 1]
    wrote(pace, Page(1, 1), 1, now)
    assert pace.next(0, now) == Page(2, 2)


def test_a_wait_for_the_rate_after_a_locked_row_is_none_for_the_lock() -> None:
    pace = BackfillPace(rate=1, backlog=50)
    pace.locked(0.0)
    wrote(pace, Page(1, 1), 1, 0.25)
    assert pace.next(0, 0.25) == Wait(0.5)


def test_where_few_rows_are_wanted_more_are_examined_up_to_a_bound_and_fewer_again_where_many_are() -> None:
    pace, examined = BackfillPace(rate=None, backlog=1_000), list[int]()
    for written in [0] * 12 + [PAGE_MAX] * 12:
        page = pace.next(0, 0.0)
        assert isinstance(page, Page)
        examined.append(page.examine)
        wrote(pace, page, written, 0.0)
    assert examined[:4] == [200, 400, 800, 1_600]
    assert examined[12] == 20_000
    assert examined[-1] == 200


def test_while_others_write_it_rests_forty_times_as_long_as_each_page_took_and_a_second_later_no_more() -> None:
    pace = BackfillPace(rate=None, backlog=50)
    pace.done(Page(20, 20), range(1, 21), 0.0, 0.015625)
    assert isinstance(pace.next(0, 0.015625), Page), "nobody else"
    pace.done(Page(20, 20), range(22, 42), 0.015625, 0.03125)
    assert pace.next(0, 0.03125) == Wait(0.5), "21 is another's"
    pace.done(Page(20, 20), range(42, 62), 0.984375, 1.0)
    assert pace.next(0, 1.0) == Wait(0.5), "who writes seldom counts, too"
    pace.done(Page(20, 20), range(62, 82), 1.671875, 1.6875)
    assert isinstance(pace.next(0, 1.6875), Page)


@pytest.mark.parametrize("seqs", [(1, 3), (7, 9)])
def test_what_others_write_during_a_page_counts_from_the_first_page_on(seqs: tuple[int, ...]) -> None:
    pace = BackfillPace(rate=None, backlog=50)
    pace.done(Page(20, 20), seqs, 0.0, 0.5)
    assert isinstance(pace.next(0, 0.5), Wait)


def test_the_rest_after_a_page_has_a_bound_and_the_rate_holds_beside_it() -> None:
    pace = BackfillPace(rate=100, backlog=50)
    pace.done(Page(20, 20), (1, 3), 0.0, 60.0)
    assert isinstance(pace.next(0, 60.9), Wait)
    assert isinstance(pace.next(0, 61.0), Page)
    pace.done(Page(20, 20), range(4, 24), 61.0, 61.001)
    assert isinstance(pace.next(0, 61.1), Wait), "20 rows of 100 a second"
