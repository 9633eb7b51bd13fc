"""The label of an entity type has few values, whatever is in the table."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cdc.core.model import ChangeState
from cdc.observability.largest_types import LARGEST, NAMES_MAX, LargestTypes
from cdc.observability.metrics import OTHER
from cdc.observability.snapshots import TypeStatus

_READ = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 1000), max_size=60)


def _read(counts: dict[str, int]) -> list[TypeStatus]:
    return [TypeStatus(name, {ChangeState.FRESH: count}) for name, count in counts.items()]


def test_the_largest_have_their_names_and_the_rest_is_other() -> None:
    read = _read({f"t{number:02}": number for number in range(1, 31)})
    *shown, rest = LargestTypes().of(replace(each, oldest_ready_age_s=float(each.name[1:])) for each in read)
    assert [each.name for each in shown] == [f"t{number:02}" for number in range(30, 10, -1)]
    assert (rest.name, rest.changes, rest.oldest_ready_age_s) == (OTHER, {ChangeState.FRESH: sum(range(1, 11))}, 10)


def test_a_type_that_is_called_other_is_among_the_others() -> None:
    assert [each.name for each in LargestTypes().of(_read({OTHER: 5, "order": 1}))] == ["order", OTHER]


def test_nothing_left_out_is_no_other() -> None:
    assert LargestTypes().of([]) == ()
    assert [each.name for each in LargestTypes().of(_read({"order": 1}))] == ["order"]


@given(st.lists(_READ, max_size=30))
def test_names_have_a_bound_for_ever_and_no_change_is_left_out(reads: list[dict[str, int]]) -> None:
    largest, names = LargestTypes(), set[str]()
    for counts in reads:
        shown = largest.of(_read(counts))
        assert len(shown) <= LARGEST + 1
        assert sum(sum(each.changes.values()) for each in shown) == sum(counts.values())
        names |= {each.name for each in shown}
    assert len(names - {OTHER}) <= NAMES_MAX


def test_a_name_that_was_shown_stays_shown_where_others_have_used_up_what_there_is() -> None:
    largest = LargestTypes()
    largest.of(_read({"order": 9}))
    for number in range(0, 2 * NAMES_MAX, LARGEST):
        largest.of(_read({f"made up {one}": 1 for one in range(number, number + LARGEST)}))
    assert {each.name for each in largest.of(_read({"order": 1, "new": 5}))} == {"order", OTHER}
