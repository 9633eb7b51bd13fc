"""Pages through the fresh changes of a shard, in ``seq`` order, again and again. Pure.

Theory
------
A page reads the fresh rows above the shard's *cursor*, and among those below it the *late* ones: written by a
transaction that had not ended when the page before was read (its id is not below that page's ``xmin``). Together that
is everything the new snapshot shows and the old one did not. The scan itself begins at the *floor*: after a page up to
number n, only transactions without an end may still bring numbers below n; once ``xmin`` has passed that page's
``next_xid`` there are none, and n becomes the floor. Dead index entries below it, which a snapshot held elsewhere keeps
alive, are not walked again. A number is drawn after its transaction got its id (the capture trigger fires after the row
was written). Rows inserted by hand need not follow that order: a full pass, once in a while, finds them.

The first pass begins at the floor that the owners before have kept (``kept_floor``); a full pass begins at zero.

So a position says: of the rows up to the cursor, those of transactions below ``since`` have been read, and of the rows
up to the floor, all. The same holds for any part of the rows. So a part may be *split* off with a copy of the position,
and *joined* again when it has caught up, at the lower of the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from typing import NamedTuple

RETRY_MIN_S = 0.001
REPASS_MAX_S = 0.5
_AWAITED_MAX = 100
_REPASSES = 10
"""From RETRY_MIN_S to REPASS_MAX_S, each twice as late as the one before."""


class Snapshot(NamedTuple):
    """A read's view: transactions below ``xmin`` had ended, and none from ``next_xid`` on had an id yet.

    ``next_xid`` is not the ``xmax`` of PostgreSQL's snapshots, above which a transaction may well be running.
    """

    xmin: int
    next_xid: int


class Position(NamedTuple):
    """Where the sweep of a shard is; see the theory above. ``since`` is the ``xmin`` of the page before."""

    floor: int
    cursor: int
    since: int


class Scanned(NamedTuple):
    """How far a sweep got in a shard, and whether there may be more. 0: it did not begin."""

    seq: int
    more: bool


class ShardCursor:
    """The passes through one shard: where they are, and when the next one begins."""

    __slots__ = (
        "acquired_at_serial",
        "awaited",
        "behind",
        "candidate",
        "floor",
        "live",
        "lost_at_serial",
        "lost_at_xid",
        "reading",
        "repass_at",
        "repass_pause_s",
        "repasses_left",
        "seq",
        "since",
    )

    def __init__(self, serial: int, floor: int = 0) -> None:
        self.acquired_at_serial = serial
        """The last sweep that was requested before the shard was acquired: it may belong to an earlier ownership."""
        self.reading = True
        """A pass is under way."""
        self.behind = True
        """No pass has been completed since the beginning, or since a change could not be taken in. Then, until
        ``repass_at``, no wake-up begins one."""
        self.floor = self.seq = floor
        self.since = 0
        self.candidate: tuple[int, int] | None = None
        """(number, id): the number becomes the floor once xmin has reached that id."""
        self.live = False
        self.lost_at_xid: int | None = None
        """next_xid after the last loss; None: the loss is younger than any snapshot read."""
        self.lost_at_serial = serial
        """The last sweep that was requested before the loss: its snapshot may be older than the loss."""
        self.repass_at = 0.0
        self.repass_pause_s = RETRY_MIN_S
        self.awaited: set[int] = set()
        """Numbers that a wake-up named, and that no page has shown since."""
        self.repasses_left = _REPASSES
        """How many passes are still made, because changes may exist for which no wake-up came."""

    @property
    def position(self) -> Position:
        return Position(self.floor, self.seq, self.since)

    @property
    def catching_up(self) -> bool:
        """A pass is under way or to come, the periodic ones aside."""
        return self.reading or (not self.live and self.repass_at < inf)

    def lose(self, serial: int) -> None:
        self.live = False
        self.lost_at_xid = None
        self.lost_at_serial = serial
        self.repass_pause_s = RETRY_MIN_S
        self.awaited.clear()
        self.repasses_left = _REPASSES
        self.reading = True

    def rewind(self, seq: int) -> None:
        """Read again what is above ``seq``."""
        self.seq = seq
        self.floor = min(self.floor, seq)
        self.candidate = None
        self.behind = True
        self.reading = True

    def split(self) -> ShardCursor:
        """A cursor for a part of the rows."""
        part = ShardCursor(self.acquired_at_serial)
        part.floor, part.seq, part.since = self.position
        return part

    def join(self, part: ShardCursor) -> None:
        """Pass through that part again as well. It has caught up: its cursor may be anywhere."""
        self.floor = min(self.floor, part.floor)
        self.since = min(self.since, part.since)

    def pause(self, now: float) -> None:
        """Go on after REPASS_MAX_S."""
        self.reading = False
        self.repass_at = now + REPASS_MAX_S

    def page_read(self, reached: int, snapshot: Snapshot) -> None:
        """All that the snapshot shows up to ``reached`` has been taken in."""
        self.seq, self.since = reached, snapshot.xmin
        if self.candidate and snapshot.xmin >= self.candidate[1]:
            self.floor = max(self.floor, min(self.candidate[0], reached))
            self.candidate = None
        if self.candidate is None and reached > self.floor:
            self.candidate = (reached, snapshot.next_xid)

    def pass_complete(self, serial: int, snapshot: Snapshot, now: float, *, from_own_slot: bool) -> None:
        self.reading = self.behind = False
        if from_own_slot and self.lost_at_xid is not None and snapshot.xmin >= self.lost_at_xid:
            self.live = True
        if self.live:
            return
        if self.lost_at_xid is None and serial > self.lost_at_serial:
            self.lost_at_xid = snapshot.next_xid
        # A wake-up may come early. After some passes without a new one the periodic sweep is enough, unless the proof
        # that makes the shard live is still to come.
        self.repasses_left = max(0, self.repasses_left - 1)
        if self.repass_pause_s > REPASS_MAX_S:
            self.awaited.clear()
        again = from_own_slot or self.repasses_left or self.awaited
        self.repass_at = now + min(self.repass_pause_s, REPASS_MAX_S) if again else inf
        self.repass_pause_s *= 2

    def touch(self, seq: int | None = None) -> None:
        """A wake-up, for that number or for any: pass now, and again soon in case it was early."""
        if seq is None or len(self.awaited) >= _AWAITED_MAX:
            self.repasses_left = _REPASSES
        else:
            self.awaited.add(seq)
        self.reading = self.reading or not self.behind
        self.repass_pause_s = RETRY_MIN_S


def ends_of(rows: Iterable[tuple[int, int]], per_shard: int) -> dict[int, Scanned]:
    """How far each shard got in a sweep whose pages end at ``per_shard`` rows."""
    counts: dict[int, int] = {}
    last: dict[int, int] = {}
    for seq, number in rows:
        counts[number] = counts.get(number, 0) + 1
        last[number] = seq
    return {number: Scanned(last[number], count >= per_shard) for number, count in counts.items()}
