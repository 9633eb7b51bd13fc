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

    def failed(self, now: float) -> bool:
        """A try was in vain. Returns whether to report it."""
        self.since = now if self.since is None else self.since
        self._rest_s = min(max(2 * self._rest_s, _REST_MIN_S), _REST_MAX_S)
        self.until = now + self._rest_s
        if self._logged_at is not None and now - self._logged_at < _LOG_EVERY_S:
            return False
        self._logged_at = now
        return True

    def done(self, now: float) -> float | None:
        """It was done. Returns for how long, in seconds, it was obstructed; None if it was not."""
        delayed_s = None if self.since is None else now - self.since
        self.since = self._logged_at = None
        self._rest_s = self.until = 0.0
        return delayed_s
