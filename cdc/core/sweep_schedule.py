"""When the periodic sweep of all shards begins, and when it is a full pass. Pure: time is an argument.

A *full pass* starts at the first change of each shard. It comes once in some sweeps, or on request.
"""

from __future__ import annotations

_FULL_PASS_EVERY = 12
"""Sweeps between two passes from zero: a minute at the usual interval."""
_REST, _REST_MAX_S = 20, 600.0
"""The pause after a pass from zero, in times as long as that took, up to a limit. Such a pass goes through the whole
backlog of a type that has no room."""


class SweepSchedule:
    """Times and durations in seconds. ``next_at``: when the next sweep begins."""

    def __init__(self, interval_s: float) -> None:
        self.next_at = 0.0
        self._interval_s = interval_s
        self._sweeps = 0
        self._full_pass_requested = False
        self._full_pass_from: float | None = None
        self._full_pass_after = 0.0

    def interval(self, interval_s: float, now: float) -> None:
        """Sweep at this interval from now on."""
        self._interval_s = interval_s
        self.by(now + interval_s)

    def by(self, at: float) -> None:
        """Begin the next sweep at ``at``, or earlier."""
        self.next_at = min(self.next_at, at)

    def begin(self, now: float) -> None:
        """A sweep begins."""
        self._sweeps = 0 if self._sweeps >= _FULL_PASS_EVERY else self._sweeps + 1
        self.next_at = now + self._interval_s

    def full_pass_due(self, now: float) -> bool:
        """Of the sweep that begins next."""
        return self._sweeps >= _FULL_PASS_EVERY and now >= self._full_pass_after

    def request_full_pass(self) -> None:
        """The next page is the first one of a full pass."""
        self._full_pass_requested, self._full_pass_from = True, None

    def page_requested(self, now: float) -> None:
        if self._full_pass_requested and self._full_pass_from is None:
            self._full_pass_from = now

    @property
    def passing_from_zero(self) -> bool:
        """A full pass has begun and is not complete."""
        return self._full_pass_from is not None

    def full_pass_complete(self, now: float) -> None:
        if self._full_pass_from is not None:
            self._full_pass_after = now + min(_REST * (now - self._full_pass_from), _REST_MAX_S)
            self._full_pass_requested, self._full_pass_from = False, None
