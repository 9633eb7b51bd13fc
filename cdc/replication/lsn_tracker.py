"""The position of a stream, and when a status update is due. Pure: time is an argument.

Positions. Two are kept, and neither ever decreases:

    received    the highest position the server has sent, in a message or in a keepalive
    confirmed   the position that the last status update gave as read; never above received

Confirming waits for no handler: the outbox holds the changes, so a received position may be confirmed at once.
Keepalives count: on a database where no captured table is written only they arrive, and a slot whose reader does not
confirm them keeps WAL without end. The maximum counts, not the last value: some messages carry position 0/0. A position
that the server never sent must not be confirmed: PostgreSQL would accept it, and deliver nothing after a reconnect.

Status updates. One is due for one of three reasons: the server asked, the interval has passed, or the stream ends. Each
asks for an answer, so the time since the last byte distinguishes a quiet server from a dead link.
"""

from __future__ import annotations

from math import inf

from cdc.core.lsn import ZERO, Lsn

STATUS_INTERVAL_MAX_S = 10.0


class LsnTracker:
    """One session's positions and its clock for status updates. ``now`` is monotonic seconds throughout."""

    def __init__(self, *, interval_s: float, now: float) -> None:
        self.received = 0
        """A plain number: it changes with each batch."""
        self.confirmed = ZERO
        self._interval_s = interval_s
        # At once: its answer proves that the link works.
        self.next_status_at = now

    def receive(self, position: int, *, reply_requested: bool = False) -> None:
        """``position`` is the highest of a batch; a lower one than the known changes nothing."""
        if reply_requested:
            self.next_status_at = -inf
        if position > self.received:
            self.received = position

    def confirm(self, now: float) -> Lsn:
        """The position to send in the status update that leaves now."""
        assert self.confirmed <= self.received
        self.confirmed = Lsn(self.received)
        self.next_status_at = now + self._interval_s
        return self.confirmed


def status_interval_s(wal_sender_timeout_s: float) -> float:
    """Six updates within the time after which the server ends a silent link; 0 means that it never does.

    The server asks for one after half of that time, but on version 15 a walsender inside a large transaction rarely
    reads answers: a client that sends only when asked is killed at every attempt.
    """
    return min(STATUS_INTERVAL_MAX_S, wal_sender_timeout_s / 6) if wal_sender_timeout_s > 0 else STATUS_INTERVAL_MAX_S
