"""Where a page ends, as a text in a URL."""

from __future__ import annotations

from datetime import UTC, datetime

from cdc.core.errors import UsageError
from cdc.core.model import SEQ_MAX
from cdc.postgres.search import SearchPlace

_DIGITS_MAX = 19


def written_place(place: SearchPlace | None) -> str | None:
    """Microseconds: what the server distinguishes."""
    if place is None:
        return None
    at = "" if place.at is None else place.at.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return f"{at}_{place.seq}"


def read_place(text: str | None) -> SearchPlace | None:
    """Raises UsageError."""
    if text is None:
        return None
    at, _, seq = text.rpartition("_")
    is_number = seq.isascii() and seq.isdecimal() and len(seq) <= _DIGITS_MAX and int(seq) <= SEQ_MAX
    try:
        moment = datetime.fromisoformat(at) if at else None
        moment = moment and (moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    except (ValueError, OverflowError):
        is_number = False
    if not is_number:
        raise UsageError("after is no place", hint="it is the next of the page before")
    return SearchPlace(moment, int(seq))
