"""Work that is obstructed for a while: when to try it again, and when to report the delay. Pure."""

from __future__ import annotations

_REST_MIN_S, _REST_MAX_S = 0.1, 2.0
"""Between two tries."""
_LOG_EVERY_S = 30.0


class Delay:
    """Times are those of one clock, in seconds. ``since``: the first try in vain; ``until``: the next try."""

    def __init__(self) -> None:
        self.since: float | None = None
        self.until = 0.0
        self._rest_s = 0.0
        self._logged_at: float | None = None

    def begin(self, now: float) -> None:
        """A try was in vain, and the next one is made at once."""
        self.since = now if self.since is None else self.since

    def reports(self, now: float) -> bool:
        """Part of it is obstructed. Returns whether to report it."""
        self.begin(now)
        if self._logged_at is not None and now - self._logged_at < _LOG_EVERY_S:
            return False
        self._logged_at = now
        return True

    def failed(self, now: float) -> bool:
        """A try was in vain, and ``until`` says when to make the next. Returns whether to report it."""
        self._rest_s = min(max(2 * self._rest_s, _REST_MIN_S), _REST_MAX_S)
        self.until = now + self._rest_s
        return self.reports(now)

    def advanced(self) -> None:
        """Part of it was done: the next rest is a short one."""
        self._rest_s = self.until = 0.0

    def done(self, now: float) -> float | None:
        """It was done. Returns for how long, in seconds, it was obstructed; None if nothing of it was reported."""
        delayed_s = None if self.since is None or self._logged_at is None else now - self.since
        self.since = self._logged_at = None
        self.advanced()
        return delayed_s
