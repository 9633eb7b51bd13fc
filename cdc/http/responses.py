"""The meaning of an application's answer for the change that was sent. Pure.

    2xx                        done
    502, 503, 504              away: the application has not seen the change, no attempt is counted
    400, 410, 413, 415, 422    dead: the same request would get the same answer
    any other                  retry later, not before Retry-After

A redirect is not followed. A redirect, a missing path or a refused secret is fixed in the set-up of the application
or the consumer; then the same request is accepted.

For a batch, some of these answers are about the application's state and so about all changes in it. Any other may be
the fault of one of its changes: then they are sent one by one, which shows which.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum, auto
from http import HTTPStatus

AWAY = (502, 503, 504)
DEAD = (400, 410, 413, 415, 422)
_ABOUT_ALL = (*AWAY, 408, 425, 429)
_PHRASES = {status.value: status.phrase for status in HTTPStatus}
_TEXT_MAX = 1_000
_RETRY_AFTER_MAX_S = 86_400.0
"""A wrong clock, on either side, must not delay a change for years."""


class Disposition(Enum):
    DONE = auto()
    AWAY = auto()
    LATER = auto()
    DEAD = auto()


@dataclass(frozen=True, slots=True)
class Answer:
    """``retry_after`` is the header; ``body`` the start of the answer's body."""

    status: int
    retry_after: str | None = None
    body: bytes = b""

    @property
    def meaning(self) -> Disposition:
        if self.status // 100 == 2:
            return Disposition.DONE
        if self.status in AWAY:
            return Disposition.AWAY
        return Disposition.DEAD if self.status in DEAD else Disposition.LATER

    @property
    def about_all(self) -> bool:
        """Whether the answer is about the application's state, and no change's fault."""
        return self.status in _ABOUT_ALL

    @property
    def summary(self) -> str:
        """For the log: without the application's words, which may quote a row."""
        said = f"answered {self.status} {_PHRASES.get(self.status, '')}".rstrip()
        if self.status // 100 == 3:
            said += ", and a redirect is not followed: deliver.to names the final address"
        return said

    @property
    def text(self) -> str:
        """For last_error: with the start of the body, on one line."""
        words = " ".join(self.body.decode("utf-8", "replace").split())
        return f"{self.summary}: {words[:_TEXT_MAX]}" if words else self.summary

    def retry_after_s(self, now: datetime) -> float | None:
        """Seconds to wait at least; None where the header is missing, cannot be read, or names a time in the past."""
        asked = (self.retry_after or "").strip()
        if asked.isascii() and asked.isdecimal():
            seconds = float(asked[:20])  # 20 digits suffice, and do not become inf
        else:
            try:
                until = parsedate_to_datetime(asked)
                # "-0000" is parsed as a time without a zone; in HTTP every time is UTC.
                seconds = (until.replace(tzinfo=until.tzinfo or UTC) - now).total_seconds()
            except (
                ValueError,
                TypeError,
                LookupError,
                OverflowError,
            ):  # a year or a zone of twenty digits, for example
                return None
        return min(seconds, _RETRY_AFTER_MAX_S) if seconds > 0 else None
