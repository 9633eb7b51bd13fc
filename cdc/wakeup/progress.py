"""Where a stream stands, when it must speak, and how long it bears silence. Pure: time is an argument.

Positions. Two are kept, and both are only ever raised:

    received    the highest position the server has sent, in a message or in a keepalive
    confirmed   what the server was told we have read; never above received

Nothing waits for a handler: the outbox is the truth, so what was received may be confirmed at once. Keepalives count:
on a database where nothing we watch is written they are all that comes, and a slot whose reader does not confirm them
keeps WAL without end. The maximum counts, not the last value: some messages carry position 0/0. A position the server
never sent must not be confirmed: PostgreSQL would believe it, and deliver nothing after the next reconnect.

Status updates. One is due for one of three reasons: the server asked, the interval has passed, or we leave. Each asks
for an answer, so the time since the last byte tells a quiet server from a dead link.

Silence. A server that decodes a huge transaction of other tables sends nothing for a while and is not dead, yet from
here it looks the same. After ``stall limit`` the link is given up; if the next session ends in silence too and has
brought nothing, the limit doubles, else the same transaction would be decoded for ever.

Dead ends. Something in the WAL may break whoever decodes it: a row that is too large, a fault in the plugin, at worst
one that takes the whole server down. Sessions that were broken off one after another, and came no further than those
before, have met it: the slot must be made anew behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cdc.lsn import ZERO, Lsn
from cdc.retry import Policy, ceiling_s

STALL_LIMIT_MAX_S = 600.0
STATUS_INTERVAL_MAX_S = 10.0
PERMANENT_PAUSE_S = 60.0
"""Between two looks at a refusal that an operator must mend."""
STANDBY_PAUSE_MAX_S = 5.0
"""Between two knocks at a slot that another consumer holds: how long the doorbell is silent when that one dies."""
DEAD_ENDS_MAX = 5
"""Sessions that came no further, before the slot is made anew: with the pauses between them a few seconds."""
_RECONNECT = Policy(base_s=0.1, cap_s=30.0)


class Due(StrEnum):
    """Why a status update is due now."""

    REQUESTED = "requested"
    INTERVAL = "interval"
    LEAVING = "leaving"


class Progress:
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

    def due(self, now: float) -> Due | None:
        if self._leaving:
            return Due.LEAVING
        if self._requested:
            return Due.REQUESTED
        return Due.INTERVAL if now >= self.next_status_at else None

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


@dataclass(frozen=True, slots=True)
class Attempts:
    """What earlier sessions teach the next one."""

    stall_limit_base_s: float
    failures: int = 0
    silences: int = 0
    dead_ends: int = 0

    @property
    def stuck(self) -> bool:
        return self.dead_ends >= DEAD_ENDS_MAX

    @property
    def stall_limit_s(self) -> float:
        return float(min(STALL_LIMIT_MAX_S, self.stall_limit_base_s * 2 ** min(self.silences, 16)))

    def after(self, *, stalled: bool, advanced: bool, talked_s: float, broken_off: bool = False) -> Attempts:
        """After a session ended or was refused. ``broken_off``: after its start, and neither by us nor in good order.

        ``advanced``: it brought a position no session had reached. ``talked_s``: from its start to its last byte; who
        talked for longer than the stall limit was not cut off in one transaction. Either makes a fresh start. A mere
        byte does not: the keepalive at the beginning comes in front of the transaction that hangs or breaks it.
        """
        # However long it talked: decoding up to the place that breaks it may take minutes, each time.
        dead_ends = 0 if advanced else self.dead_ends + int(broken_off)
        if advanced or talked_s > self.stall_limit_s:
            return Attempts(self.stall_limit_base_s, failures=1, silences=int(stalled), dead_ends=dead_ends)
        return Attempts(self.stall_limit_base_s, self.failures + 1, self.silences + int(stalled), dead_ends)

    def pause_s(self, fraction: float, *, permanent: bool, standby: bool) -> float:
        """Seconds until the next attempt; ``fraction`` in [0, 1) is the throw of the dice.

        Never less than half the ceiling: consumers that lost one server together come back spread out, not at once.
        """
        longest = PERMANENT_PAUSE_S if permanent else ceiling_s(_RECONNECT, max(1, self.failures))
        if standby:
            longest = min(longest, STANDBY_PAUSE_MAX_S)
        return longest * (0.5 + fraction / 2)
