"""When a settle may move the positions of a subscription itself. Pure: time and sizes are arguments.

Theory
------
A position that moves is a new version of its row. As a rule the server takes the former one away by the next. While
somebody holds an old snapshot (a dump, a long report) it may take none away: versions pile up, the table grows, and
each look at a position walks over all of its versions. So where the table has grown since the look before, settles
write a row for each change instead, and positions move once a second. Then they try again: after a second, and after
twice as long each time that it has grown meanwhile, as it does without them as well, more slowly.

The same where so many rows lie between the positions (what waits, is dead, or is done behind a slow change) that a
settle would look at more of them than it saves.
"""

from __future__ import annotations

_WAIT_MIN_S, _WAIT_MAX_S = 1.0, 60.0


class PositionMoves:
    """Whether settles may move positions, by the size of their table at each look."""

    def __init__(self) -> None:
        self._pages: int | None = None
        self._wait_s = 0.0
        self._again_at = 0.0

    def allowed(self, now: float) -> bool:
        """``now``: seconds of a clock that does not go back."""
        return now >= self._again_at

    def looked(self, pages: int, enough: int, now: float) -> None:
        """Their table has so many pages. Up to ``enough`` of them are no reason to wait."""
        grown = self._pages is not None and pages > max(self._pages, enough)
        self._pages = pages
        if grown:
            self.wait(now)
        elif self.allowed(now):
            self._wait_s /= 2

    def wait(self, now: float) -> None:
        """None moves for a time, longer than the last one."""
        self._wait_s = min(max(2 * self._wait_s, _WAIT_MIN_S), _WAIT_MAX_S)
        self._again_at = now + self._wait_s
