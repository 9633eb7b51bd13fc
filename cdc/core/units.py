"""Sizes and spans of time as people read them: ``1.4 GB``, ``3 h``. Pure."""

from __future__ import annotations

_SIZES = (("TB", 1 << 40), ("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10))
"""Powers of 1024 under the names that PostgreSQL's settings have for them."""
_SPANS = (("days", 86_400.0), ("h", 3_600.0), ("min", 60.0))


def size(count: int) -> str:
    """``count`` bytes, such as ``1.4 GB``."""
    for name, factor in _SIZES:
        if abs(count) >= factor:
            return f"{_short(count / factor)} {name}"
    return f"{count} bytes"


def span(seconds: float) -> str:
    """Such as ``3.5 h``."""
    for name, factor in _SPANS:
        if seconds >= 2 * factor:
            return f"{_short(seconds / factor)} {name}"
    return f"{seconds:.0f} s"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.1f}".removesuffix(".0")
