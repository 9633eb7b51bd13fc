"""Spans of time, and moments."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from cdc.core.errors import UsageError
from cdc.core.units import parse_duration, parse_moment


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45s", 45), ("90m", 5_400), ("12h", 43_200), ("30d", 2_592_000), ("2w", 1_209_600), ("1.5 h", 5_400),
     (" 1d ", 86_400)],
)  # fmt: skip
def test_a_number_and_its_unit_are_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "30", "d", "0d", "-1d", "1 month", "1d12h", "1e3s", "1,5h", "inf d", "999999w", "²d"]
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_duration(text)
    assert "30d, 12h, 90m" in refused.value.hint


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-01-31", datetime(2026, 1, 31, tzinfo=UTC)),
        ("2026-01-31 18:00", datetime(2026, 1, 31, 18, tzinfo=UTC)),
        ("2026-01-31T18:00:00.5Z", datetime(2026, 1, 31, 18, 0, 0, 500_000, tzinfo=UTC)),
        ("2026-01-31T18:00+01:00", datetime(2026, 1, 31, 17, tzinfo=UTC)),
        (" 2h ", timedelta(hours=2)),
        ("2 h ago", timedelta(hours=2)),
    ],
)
def test_a_moment_is_iso_8601_or_how_long_ago_it_was(text: str, moment: datetime | timedelta) -> None:
    assert parse_moment(text) == moment


@pytest.mark.parametrize("text", ["", "soon", "now", "18:00", "2026", "2026-02-30", "31.01.2026", "-2h", "1e3s"])
def test_what_is_no_moment_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_moment(text)
    assert "2026-01-31T18:00:00Z" in refused.value.hint
    assert "2h" in refused.value.hint
