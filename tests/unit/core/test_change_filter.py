"""Which columns of a change have changed, and which changes a handler's filter leaves out."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc import testing
from cdc.core.change_filter import ChangeFilter
from cdc.core.model import Change

_OMITTED = {"cdc:omitted": "too large"}


def _change(operation: str = "UPDATE", *, old: Any = None, new: Any = None) -> Change:
    return testing.change("order", operation, "1", old=old, new=new)


@pytest.mark.parametrize(
    ("operation", "old", "new", "changed"),
    [
        ("UPDATE", {"id": 1, "total": 5}, {"id": 1, "total": 6}, {"total"}),
        ("UPDATE", {"id": 1}, {"id": 1}, set()),
        ("UPDATE", {"id": 1, "note": None}, {"id": 1, "note": "now"}, {"note"}),
        ("UPDATE", None, {"id": 1, "total": 5}, {"id", "total"}),
        ("UPDATE", {"id": 1}, {"id": 1, "added": None}, {"added"}),
        ("UPDATE", {"id": 1, "removed": None}, {"id": 1}, {"removed"}),
        ("UPDATE", {"id": 1, "file": _OMITTED}, {"id": 1, "file": _OMITTED}, {"file"}),
        ("UPDATE", {"flag": True}, {"flag": 1}, {"flag"}),
        ("UPDATE", {"doc": {"flag": [True]}}, {"doc": {"flag": [1]}}, {"doc"}),
        ("UPDATE", {"price": Decimal("10.1")}, {"price": Decimal("10.10")}, {"price"}),
        ("INSERT", None, {"id": 1, "total": 5}, {"id", "total"}),
        ("DELETE", {"id": 1, "total": 5}, None, {"id", "total"}),
        ("UPDATE", [1], [2], set()),
        ("INSERT", None, None, set()),
    ],
)
def test_changed_names_the_columns_that_differ_or_cannot_be_compared(
    operation: str, old: Any, new: Any, changed: set[str]
) -> None:
    assert _change(operation, old=old, new=new).changed == changed


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ({"status": "new", "total": 1}, {"status": "paid", "total": 1}, True),
        ({"status": "new", "total": 1}, {"status": "new", "total": 2}, False),
        ({"status": _OMITTED}, {"status": _OMITTED}, True),
        (None, {"status": "new"}, True),
        ({"status": "new"}, None, True),
        ({"total": 1}, {"total": 2}, True),
        ("text", "text", True),
        (None, None, True),
    ],
)
def test_a_filter_of_columns_leaves_out_only_what_is_known_not_to_have_changed(
    old: Any, new: Any, wanted: bool
) -> None:
    assert _passes(ChangeFilter(frozenset({"status"})), _change(old=old, new=new)) is wanted


def test_the_function_sees_what_the_handler_would_and_only_if_a_column_has_changed() -> None:
    seen: list[Change] = []

    def when(change: Change) -> bool:
        seen.append(change)
        return bool(change.new)

    wanted = ChangeFilter(frozenset({"status"}), when)
    as_given = _change(new={"as": "given"})
    assert wanted.apply(lambda _: as_given, _change(old={"status": 1}, new={"status": 2})) is as_given
    assert not _passes(wanted, _change(old={"status": 1}, new={"status": 1}))
    assert not _passes(wanted, _change(old={"status": 1}, new={}))
    assert [change.new for change in seen] == [{"as": "given"}, {}]


_scalars = st.sampled_from([None, True, False, 0, 1, "", "1", "true", Decimal(1), Decimal("1.0"), 2**70])
_values = _scalars | st.lists(_scalars, max_size=2) | st.dictionaries(st.just("x"), _scalars)
_rows = st.dictionaries(st.sampled_from("abcd"), _values)


@given(_rows, _rows)
def test_changed_is_what_a_comparison_of_the_texts_says_and_a_filter_of_one_column_agrees(
    old: dict[str, Any], new: dict[str, Any]
) -> None:
    change = _change(old=old, new=new)
    expected = {
        column
        for column in old.keys() | new.keys()
        if column not in old or column not in new or _text(old[column]) != _text(new[column])
    }
    assert change.changed == expected
    for column in old.keys() | new.keys():
        assert _passes(ChangeFilter(frozenset({column})), change) is (column in expected)


def _text(value: Any) -> str:
    return json.dumps(value, default=repr)


def _passes(wanted: ChangeFilter, change: Change) -> bool:
    return wanted.apply(None, change) is not None
