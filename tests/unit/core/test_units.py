"""Spans of time."""

from __future__ import annotations

import pytest

from cdc.core.errors import UsageError
from cdc.core.units import parse_duration


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
