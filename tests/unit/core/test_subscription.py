"""Names of subscriptions, and where they may begin."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from cdc.core.errors import UsageError
from cdc.core.subscription import Start, check_name, missing, parse_start


@pytest.mark.parametrize("name", ["a", "search_2", "0", "_", "x" * 63])
def test_names_are_those_that_a_slot_may_have(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "A", "a-b", "a b", "x" * 64, "é", "٣", "a\n", "default"])
def test_others_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        check_name(name)


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("now", "now"),
        ("beginning", "beginning"),
        (" now ", "now"),
        ("1", 1),
        ("0000000000000000042", 42),
        ("9223372036854775807", 2**63 - 1),
        ("2h", timedelta(hours=2)),
        ("2026-01-31T18:00Z", datetime(2026, 1, 31, 18, tzinfo=UTC)),
        ("2026-01-31", datetime(2026, 1, 31, tzinfo=UTC)),
        ("2026-01-31T18:00+01:00", datetime(2026, 1, 31, 17, tzinfo=UTC)),
    ],
)
def test_a_beginning_is_a_word_a_number_or_a_time(text: str, start: Start) -> None:
    assert parse_start(text) == start


@pytest.mark.parametrize("text", ["", "Now", "end", "0", "-1", "1.5", "9223372036854775808", "1" * 5_000, "٣", "0d"])
def test_others_are_no_beginning(text: str) -> None:
    with pytest.raises(UsageError):
        parse_start(text)


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["search", "billing"], "did you mean search?"),
        (["audit", "billing"], "there are: audit, billing"),
        ([f"x{n}" for n in range(7)], "there are: x0, x1, x2, x3, x4, and 2 more"),
        ([], "there is none: cdc subscription create serch"),
    ],
)
def test_what_is_missing_is_answered_with_what_there_is(names: list[str], hint: str) -> None:
    assert missing("serch", names).hint == hint
