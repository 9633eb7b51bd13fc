"""Places in a list, and documents against each other."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc.contrib.ui.documents_diff import Column, columns, text
from cdc.contrib.ui.places import read_place, written_place
from cdc.core.errors import UsageError
from cdc.core.fast_change import Json
from cdc.core.model import SEQ_MAX
from cdc.postgres.search import SearchPlace


@given(st.none() | st.datetimes(timezones=st.just(UTC)), st.integers(0, SEQ_MAX))
def test_a_place_survives_a_url(at: datetime | None, seq: int) -> None:
    assert read_place(written_place(SearchPlace(at, seq))) == SearchPlace(at, seq)


@given(st.text())
def test_any_text_is_a_place_or_is_refused(given_text: str) -> None:
    with suppress(UsageError):
        assert isinstance(read_place(given_text), SearchPlace)


def test_columns_that_differ_come_first_and_keep_their_digits() -> None:
    old, new = Json(b'{"a": 1.10, "b": "x", "c": [1, {"d": null}]}'), Json(b'{"a": 1.10, "b": "y", "e": true}')
    assert columns(old, new) == [
        Column("b", '"x"', '"y"'), Column("e", None, "true"), Column("c", '[1, {"d": null}]', None),
        Column("a", "1.10", "1.10"),
    ]  # fmt: skip
    assert [each.state for each in columns(old, new) or []] == ["changed", "added", "removed", "same"]


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (None, None, None),
        (Json(b"1"), None, None),
        (None, Json(b'{"a": 1}'), [Column("a", None, "1")]),
        ("no JSON", "x", None),
    ],
)
def test_what_is_no_object_has_no_columns(old: object, new: object, found: object) -> None:
    assert columns(old, new) == found


def test_a_long_value_is_cut_and_says_so() -> None:
    [only] = columns(None, Json(b'{"a": "' + b"x" * 100_000 + b'"}')) or []
    assert only.new is not None
    assert len(only.new) < 5_000
    assert "100,002 characters" in only.new
    assert text(Json(b"1.10")) == "1.10"
    assert text(None) is None
