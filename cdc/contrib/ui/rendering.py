"""Pages from templates. Whatever is shown is escaped: it is others' text."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cdc import __version__
from cdc.core.printable import printable, printable_json, printable_lines
from cdc.core.units import format_bytes, format_duration

_SHORT = 90
_CLOSER_S = 60.0


def environment() -> Environment:
    made = Environment(
        loader=PackageLoader("cdc.contrib.ui"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        moment=_moment, duration=lambda value: "" if value is None else format_duration(value), size=format_bytes,
        short=_short, number=lambda value: f"{value:,}", line=printable,
        lines=printable_lines, latency=_latency, json=printable_json,
    )  # fmt: skip
    made.globals.update(version=__version__)
    return made


def style() -> bytes:
    return resources.files("cdc.contrib.ui").joinpath("style.css").read_bytes()


def _moment(value: datetime | None) -> str:
    return "" if value is None else f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"


def _latency(value: float | None) -> str:
    """As a duration, and where that would be 0 or a few seconds, closer."""
    if value is None:
        return ""
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.1f} s" if value < _CLOSER_S else format_duration(value)


def _short(value: Any) -> str:
    """One line of it."""
    text = printable(str(value if value is not None else "").split("\n", 1)[0])
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"
