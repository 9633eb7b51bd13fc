"""Spans of time as people write them: ``30d``, ``12h``, ``90m``."""

from __future__ import annotations

import re

from cdc.core.errors import UsageError

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([smhdw])")
_LONGEST_S = 100 * 366 * 86_400
"""Beyond it a date that far back is no history, and further on no timestamp that Python can hold."""


def parse_duration(text: str) -> float:
    """Seconds, more than 0: a number and one of s, m, h, d, w. Raises UsageError."""
    found = _DURATION.fullmatch(text.strip())
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 0 < seconds <= _LONGEST_S:
        raise UsageError(
            f"{text!r} is not a span of time", hint="a number above 0 and its unit, at most 100 years: 30d, 12h, 90m"
        )
    return seconds
