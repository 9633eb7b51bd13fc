"""How many changes share a transaction."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cdc.core.transaction_batching import AdaptiveBatchSize


def _grown(grouping: AdaptiveBatchSize, each_s: float, rounds: int = 20) -> AdaptiveBatchSize:
    for _ in range(rounds):
        grouping.committed(grouping.limit, grouping.limit * each_s)
    return grouping


def test_the_first_change_of_a_handler_runs_alone() -> None:
    assert AdaptiveBatchSize(50).limit == 1


def test_groups_of_a_quick_handler_grow_to_the_most() -> None:
    assert _grown(AdaptiveBatchSize(50), 0.0001).limit == 50


def test_groups_stay_so_small_that_none_takes_longer_than_100_ms() -> None:
    assert _grown(AdaptiveBatchSize(50), 0.02).limit == 5
    assert _grown(AdaptiveBatchSize(50), 2.0).limit == 1


def test_a_handler_that_becomes_slow_gets_small_groups_soon() -> None:
    grouping = _grown(AdaptiveBatchSize(50), 0.0001)
    grouping.committed(50, 5.0)
    assert grouping.limit <= 5


def test_groups_halve_with_each_one_that_is_rolled_back() -> None:
    grouping = _grown(AdaptiveBatchSize(40), 0.0001)
    limits = []
    for _ in range(7):
        grouping.rolled_back()
        limits.append(grouping.limit)
    assert limits == [20, 10, 5, 2, 1, 1, 1]


def test_a_group_smaller_than_it_might_have_been_proves_nothing_about_larger_ones() -> None:
    grouping = AdaptiveBatchSize(50)
    for _ in range(10):
        grouping.committed(1, 0.0001)
    assert grouping.limit == 2


def test_a_handler_that_was_captured_once_may_be_again() -> None:
    grouping = AdaptiveBatchSize(50)
    grouping.committed(1, 0.001, captured=True)
    grouping.committed(1, 0.001)
    assert grouping.captured


@given(st.integers(1, 50), st.lists(st.one_of(st.none(), st.floats(0, 1_000))))
def test_a_group_has_one_change_at_least_and_never_more_than_the_most(most: int, events: list[float | None]) -> None:
    grouping = AdaptiveBatchSize(most)
    for seconds in events:
        if seconds is None:
            grouping.rolled_back()
        else:
            grouping.committed(grouping.limit, seconds)
        assert 1 <= grouping.limit <= most
