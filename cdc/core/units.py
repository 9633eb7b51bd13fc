"""Sizes and spans of time as people read and write them: ``1.4 GB``, ``3 h``, ``30d``. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from cdc.core.errors import UsageError

_SIZES = (("TB", 1 << 40), ("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10))
"""Powers of 1024 under the names that PostgreSQL's settings have for them."""
_SPANS = (("days", 86_400.0), ("h", 3_600.0), ("min", 60.0))
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([smhdw])")
_LONGEST_S = 100 * 366 * 86_400
"""Beyond it a date that far back is no history, and further on no timestamp that Python can hold."""


def format_bytes(count: int) -> str:
    """``count`` bytes, such as ``1.4 GB``."""
    for name, factor in _SIZES:
        if abs(count) >= factor:
            return f"{_short(count / factor)} {name}"
    return f"{count} bytes"


def format_duration(seconds: float) -> str:
    """Such as ``3.5 h``."""
    for name, factor in _SPANS:
        if seconds >= 2 * factor:
            return f"{_short(seconds / factor)} {name}"
    return f"{seconds:.0f} s"


def parse_duration(text: str) -> float:
    """Seconds, more than 0: a number and one of s, m, h, d, w. Raises UsageError."""
    found = _DURATION.fullmatch(text.strip())
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 0 < seconds <= _LONGEST_S:
        raise UsageError(
            f"{text!r} is not a span of time", hint="a number above 0 and its unit, at most 100 years: 30d, 12h, 90m"
        )
    return seconds


def parse_moment(text: str) -> datetime | timedelta:
    """A time in ISO 8601, without a zone in UTC; or how long ago: ``2h``, ``2h ago``. Raises UsageError."""
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        try:
            return timedelta(seconds=parse_duration(text.strip().removesuffix(" ago")))
        except UsageError:
            raise UsageError(
                f"{text!r} is no moment",
                hint="a time in ISO 8601, in UTC where it names no zone, or how long ago:"
                " 2026-01-31T18:00:00Z, 2026-01-31T18:00+01:00, 2026-01-31, 2h ago",
            ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.1f}".removesuffix(".0")
