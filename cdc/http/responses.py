"""What an application's answer means for the change it was given. Pure.

    2xx                        done
    502, 503, 504              away: the application has not seen the change, no attempt is counted
    400, 410, 413, 415, 422    dead: the same request would be answered so again
    any other                  again later, not before Retry-After

A redirect is not followed. That, a path that is not there and a secret that is refused are fixed where the application
or the consumer is set up, and then the same request is taken.

Of a batch, some of these speak of the application's state and so of all that is in it. Any other may be the fault of
one of its changes, and then they are sent one by one, which tells of which.
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
"""A clock that is wrong, here or there, must not put a change off for years."""


class Disposition(Enum):
    DONE = auto()
    AWAY = auto()
    LATER = auto()
    DEAD = auto()


@dataclass(frozen=True, slots=True)
class Answer:
    """``retry_after`` is the header; ``body`` the start of what was answered."""

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
        """Whether it is no change's fault."""
        return self.status in _ABOUT_ALL

    @property
    def summary(self) -> str:
        """For the log: nothing of it is the application's words, which may quote a row."""
        said = f"answered {self.status} {_PHRASES.get(self.status, '')}".rstrip()
        if self.status // 100 == 3:
            said += ", and a redirect is not followed: deliver.to names the final address"
        return said

    @property
    def text(self) -> str:
        """For last_error: with the start of the body, in one line."""
        words = " ".join(self.body.decode("utf-8", "replace").split())
        return f"{self.summary}: {words[:_TEXT_MAX]}" if words else self.summary

    def retry_after_s(self, now: datetime) -> float | None:
        """Seconds to wait at least; None where nothing is asked for that can be read, or nothing that lies ahead."""
        asked = (self.retry_after or "").strip()
        if asked.isascii() and asked.isdecimal():
            seconds = float(asked[:20])  # more digits are as good as that many, and do not become inf
        else:
            try:
                until = parsedate_to_datetime(asked)
                # "-0000" is read as a time without a zone; HTTP knows no other than UTC.
                seconds = (until.replace(tzinfo=until.tzinfo or UTC) - now).total_seconds()
            except (
                ValueError,
                TypeError,
                LookupError,
                OverflowError,
            ):  # a year or a zone of twenty digits, and the like
                return None
        return min(seconds, _RETRY_AFTER_MAX_S) if seconds > 0 else None
