"""Where a stream stands, and when it must speak. Pure: time is an argument.

Positions. Two are kept, and both are only ever raised:

    received    the highest position the server has sent, in a message or in a keepalive
    confirmed   what the server was told we have read; never above received

Nothing waits for a handler: the outbox is the truth, so what was received may be confirmed at once. Keepalives count:
on a database where nothing we watch is written they are all that comes, and a slot whose reader does not confirm them
keeps WAL without end. The maximum counts, not the last value: some messages carry position 0/0. A position the server
never sent must not be confirmed: PostgreSQL would believe it, and deliver nothing after the next reconnect.

Status updates. One is due for one of three reasons: the server asked, the interval has passed, or we leave. Each asks
for an answer, so the time since the last byte tells a quiet server from a dead link.
"""

from __future__ import annotations

from enum import StrEnum

from cdc.core.lsn import ZERO, Lsn

STATUS_INTERVAL_MAX_S = 10.0


class UpdateReason(StrEnum):
    """Why a status update is due now."""

    REQUESTED = "requested"
    INTERVAL = "interval"
    LEAVING = "leaving"


class LsnTracker:
    """One session's positions and its clock for status updates. ``now`` is monotonic seconds throughout."""

    def __init__(self, *, interval_s: float, now: float) -> None:
        self.received = ZERO
        self.confirmed = ZERO
        self._interval_s = interval_s
        # At once: the answer proves that the link works.
        self.next_status_at = now
        self._requested = False
        self._leaving = False

    def receive(self, position: int, *, reply_requested: bool = False) -> None:
        """``position`` is the highest of a batch; lower ones than known change nothing."""
        self._requested = self._requested or reply_requested
        if position > self.received:
            self.received = Lsn(position)

    def leave(self) -> None:
        self._leaving = True

    def due(self, now: float) -> UpdateReason | None:
        if self._leaving:
            return UpdateReason.LEAVING
        if self._requested:
            return UpdateReason.REQUESTED
        return UpdateReason.INTERVAL if now >= self.next_status_at else None

    def confirm(self, now: float) -> Lsn:
        """The position to send in the status update that leaves now."""
        assert self.confirmed <= self.received
        self.confirmed = self.received
        self.next_status_at = now + self._interval_s
        self._requested = False
        return self.confirmed


def status_interval_s(wal_sender_timeout_s: float) -> float:
    """Six updates within the time after which the server gives us up; 0 means that it never does.

    The server asks after half of that time, and on version 15 a walsender inside a large transaction reads our
    answers only now and then: a client that speaks when asked is killed at every attempt.
    """
    return min(STATUS_INTERVAL_MAX_S, wal_sender_timeout_s / 6) if wal_sender_timeout_s > 0 else STATUS_INTERVAL_MAX_S
