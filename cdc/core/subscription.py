"""What a subscription may be called, and where it may begin. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Literal

from cdc.core.errors import NotFoundError, UsageError
from cdc.core.model import SEQ_MAX
from cdc.core.units import parse_moment

DEFAULT = "default"
"""The subscription whose progress is in the columns of ``entity_changes``. No other may have its name."""

Start = Literal["now", "beginning"] | int | datetime | timedelta
"""Where a subscription begins: a number is the first ``seq`` that it takes, a span of time how long ago."""

_NAME = re.compile(r"[a-z0-9_]{1,63}")
_SHOWN = 5


def check_name(name: str) -> str:
    """The name of a subscription. Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of a subscription", hint="1 to 63 lower-case letters, digits and underscores"
        )
    if name == DEFAULT:
        raise UsageError(
            f"{DEFAULT} is the subscription that every outbox has",
            hint="it needs no command: cdc run without --subscription, cdc outbox, cdc status",
        )
    return name


def parse_start(text: str) -> Start:
    """``now``, ``beginning``, a ``seq``, or a time as ``parse_moment`` reads it. Raises UsageError."""
    wanted = text.strip()
    if wanted == "now":
        return "now"
    if wanted == "beginning":
        return "beginning"
    # isdecimal() is true of other scripts' digits, too.
    if wanted.isascii() and wanted.isdecimal():
        if len(wanted) > len(str(SEQ_MAX)) or not 1 <= int(wanted) <= SEQ_MAX:
            raise UsageError(f"{wanted} is no seq", hint=f"1 to {SEQ_MAX}")
        return int(wanted)
    try:
        return parse_moment(wanted)
    except UsageError:
        raise UsageError(
            f"{text!r} is no place to begin at",
            hint="now, beginning, the first seq, or a time: 2026-01-31T18:00Z (UTC without a zone), or 2h ago",
        ) from None


def missing(name: str, names: Iterable[str]) -> NotFoundError:
    """The error for a subscription that is not among ``names``."""
    there = sorted(names)
    close = difflib.get_close_matches(name, there, n=1)
    if close:
        hint = f"did you mean {close[0]}?"
    elif there:
        more = f", and {len(there) - _SHOWN} more" if len(there) > _SHOWN else ""
        hint = f"there are: {', '.join(there[:_SHOWN])}{more}"
    else:
        hint = f"there is none: cdc subscription create {name}"
    return NotFoundError(f"there is no subscription {name}", hint=hint)
