"""What to read next from the outbox, and when. Pure: time is an argument, reading is somebody else's business.

Theory
------
Two ways lead to a change. *By number*: a wake-up names it, and the fetch touches that row alone. *By sweep*: the
fresh changes of a shard are paged through in ``seq`` order. Fetching by number is what makes a wake-up cheap;
sweeping is what makes losing one harmless. Both must keep order, though rows become visible in another order than
their numbers were drawn. What both rest on: the successor of a change can only be written once that change is
visible, so whoever reads everything that *one* snapshot shows never sees a successor without its predecessor.

**Sweep.** A page reads the fresh rows above the shard's *cursor*, and among those below it the *late* ones: written
by a transaction that had not ended when the page before was read (its id is not below that page's ``xmin``).
Together that is everything the new snapshot shows and the old one did not. The scan itself begins at the *floor*:
after a page up to number n, only transactions without an end may still bring numbers below n; once ``xmin`` has
passed that page's ``next_xid`` there are none, and n becomes the floor. Dead index entries below it, which a snapshot
held elsewhere keeps alive, are not walked again. A number is drawn after its transaction got its id (the capture
trigger fires after the row was written). For rows inserted by hand that need not hold: a pass from zero, now and
then, finds what slipped through.

**By number.** Wake-ups arrive in commit order. As long as *every* wake-up since some moment was kept, and a rung
number that is not visible yet is looked for in every later fetch until it is there, no fetch can see a successor and
miss its predecessor. A shard of which that is true is *live*. A wake-up that was lost (start, takeover, reconnect,
overflow) belongs to a transaction that had an id when it was lost: a pass whose ``xmin`` is not below the ``next_xid``
of that moment has seen it, and makes the shard live again. Until then the shard is swept at each wake-up instead of
fetched by number: as quick, only dearer. That is how it stays where the wake-ups are not *first-hand*, read from the
slot by this process: who relays them may lose some without our hearing of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from cdc.model import WakeUp

_LOOK_AGAIN_MIN_S = 0.001
_LOOK_AGAIN_MAX_S = 0.05
"""A commit waiting for a synchronous standby stays invisible for as long as that takes; found within this much of
its release. 20 cheap queries a second, only while such a commit hangs."""
_LOOK_AGAIN_FOR_S = 60.0
_REPASS_MAX_S = 0.5
_FETCH_MAX = 500
_UNSEEN_MAX = 2_000
_FULL_PASS_EVERY = 12
"""Sweeps between two passes from zero: a minute at the usual interval."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A read's view: transactions below ``xmin`` had ended, and none from ``next_xid`` on had an id yet.

    ``next_xid`` is not the ``xmax`` of PostgreSQL's snapshots, above which a transaction may well be running.
    """

    xmin: int
    next_xid: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Read these changes by number."""

    wakeups: tuple[WakeUp, ...]


class Position(NamedTuple):
    """Where the sweep of a shard stands; see the theory above. ``since`` is the ``xmin`` of the page before."""

    floor: int
    cursor: int
    since: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """Read the next ``per_shard`` fresh changes of each shard: above the cursor, and late ones above the floor.

    ``serial`` numbers the sweeps of an intake.
    """

    positions: Mapping[int, Position]
    per_shard: int
    serial: int


@dataclass(frozen=True, slots=True)
class Found:
    """What a fetch brought about: rung changes found at once, found late, given up, and still looked for."""

    at_once: int = 0
    late: int = 0
    given_up: int = 0


class _Unseen:
    """A rung number that was not visible when first looked for."""

    __slots__ = ("next_look", "next_xid", "shard", "since")

    def __init__(self, shard: int, since: float, next_xid: int) -> None:
        self.shard = shard
        self.since = since
        self.next_xid = next_xid
        self.next_look = since + _LOOK_AGAIN_MIN_S


class _Shard:
    __slots__ = (
        "again_at",
        "candidate",
        "cursor",
        "floor",
        "live",
        "lost_at",
        "lost_in",
        "patience",
        "reading",
        "since",
    )

    def __init__(self) -> None:
        self.reading = True
        """A pass is under way."""
        self.floor = self.cursor = self.since = 0
        self.candidate: tuple[int, int] | None = None
        """(number, id): the number becomes the floor once xmin has reached that id."""
        self.live = False
        self.lost_at: int | None = None
        """next_xid after the last loss; None: the loss is younger than any snapshot we know."""
        self.lost_in = 0
        """The sweep that had been asked for last: its snapshot may be older than the loss."""
        self.again_at = 0.0
        self.patience = _LOOK_AGAIN_MIN_S

    @property
    def position(self) -> Position:
        return Position(self.floor, self.cursor, self.since)

    def lose(self, serial: int) -> None:
        self.live = False
        self.lost_at = None
        self.lost_in = serial
        self.patience = _LOOK_AGAIN_MIN_S
        self.reading = True

    def rewind(self, seq: int) -> None:
        """Read again what is above ``seq``."""
        self.cursor = seq
        self.floor = min(self.floor, seq)
        self.candidate = None

    def page_read(self, reached: int, snapshot: Snapshot) -> None:
        """All that the snapshot shows up to ``reached`` has been taken in."""
        self.cursor, self.since = reached, snapshot.xmin
        if self.candidate and snapshot.xmin >= self.candidate[1]:
            self.floor = max(self.floor, min(self.candidate[0], reached))
            self.candidate = None
        if self.candidate is None and reached > self.floor:
            self.candidate = (reached, snapshot.next_xid)

    def pass_complete(self, serial: int, snapshot: Snapshot, now: float, *, first_hand: bool) -> None:
        self.reading = False
        if first_hand and self.lost_at is not None and snapshot.xmin >= self.lost_at:
            self.live = True
        if self.live:
            return
        if self.lost_at is None and serial > self.lost_in:
            self.lost_at = snapshot.next_xid
        # A wake-up may have been early; after some looks without a new one the periodic sweep is enough, except where
        # a proof is still to come.
        again = first_hand or self.patience <= _REPASS_MAX_S
        self.again_at = now + min(self.patience, _REPASS_MAX_S) if again else inf
        self.patience *= 2

    def touch(self) -> None:
        """A wake-up: look now, and again soon if it was early."""
        self.reading = True
        self.patience = _LOOK_AGAIN_MIN_S


class Intake:
    """``queue_capacity``: wake-ups kept; more than that are dropped and their shards swept instead."""

    def __init__(self, *, sweep_interval_s: float, queue_capacity: int = 20_000) -> None:
        self._sweep_interval_s = sweep_interval_s
        self._queue_capacity = queue_capacity
        self._shards: dict[int, _Shard] = {}
        self._rung: dict[int, int] = {}
        self._unseen: dict[int, _Unseen] = {}
        self._next_sweep = 0.0
        self._sweeps = 0
        self._sweep_next = False
        self._serial = 0
        self._first_hand = False

    # --- what is where ---------------------------------------------------------------------------------------------

    @property
    def queue_length(self) -> int:
        return len(self._rung)

    @property
    def live_shards(self) -> int:
        return sum(shard.live for shard in self._shards.values())

    @property
    def catching_up(self) -> bool:
        """A pass is under way somewhere."""
        return any(shard.reading for shard in self._shards.values())

    # --- in --------------------------------------------------------------------------------------------------------

    def own(self, shards: Iterable[int]) -> None:
        """Shards taken over: swept from their first change on, at once."""
        for shard in shards:
            self._shards.setdefault(shard, _Shard())

    def disown(self, shards: Iterable[int]) -> None:
        for shard in set(shards):
            self._shards.pop(shard, None)
            self._forget_wakeups(shard)

    def interval(self, sweep_interval_s: float, now: float) -> None:
        """From now on sweep this often."""
        self._sweep_interval_s = sweep_interval_s
        self._next_sweep = min(self._next_sweep, now + sweep_interval_s)

    def streaming(self, *, connected: bool) -> None:
        """From now on wake-ups come first-hand, or do so no more. What rang before may have been missed."""
        self._first_hand = connected
        if not connected:
            self._rung.clear()
            self._unseen.clear()
        self.lost()

    def lost(self) -> None:
        """Wake-ups may have been missed until now."""
        for shard in self._shards.values():
            shard.lose(self._serial)

    def restart(self) -> Collection[int]:
        """Sweep every shard from its first change on. Returns the shards, for ``Lanes.forget_unread``."""
        for shard in self._shards.values():
            shard.rewind(0)
            shard.reading = True
        return self._shards.keys()

    def rung(self, wakeups: Iterable[WakeUp]) -> int:
        """Take wake-ups in, in the order of their arrival. Returns how many were dropped for lack of room."""
        dropped = 0
        for seq, number in wakeups:
            shard = self._shards.get(number)
            if shard is None:
                continue
            if not shard.live:
                shard.touch()
            if not self._first_hand:
                continue
            if len(self._rung) >= self._queue_capacity:
                dropped += 1
                shard.lose(self._serial)
                continue
            self._rung[seq] = number
        return dropped

    # --- out -------------------------------------------------------------------------------------------------------

    def full_pass_due(self, now: float) -> bool:
        """Time to pass from zero, once in a while; the caller then calls ``restart``."""
        return now >= self._next_sweep and self._sweeps >= _FULL_PASS_EVERY

    def next(self, now: float, room: int, sweep_room: int) -> Fetch | Sweep | None:
        """What to read now, with ``room`` for that many changes; None: nothing.

        A sweep waits until there is room for ``sweep_room``: pages of a few rows would cost more than they bring.
        Fetches and sweeps take turns, so that neither a backlog nor a flood of wake-ups shuts out the other.
        """
        self._begin_passes(now)
        choices = (self._sweep, self._fetch) if self._sweep_next else (self._fetch, self._sweep)
        for choice in choices:
            if request := choice(now, room, sweep_room):
                self._sweep_next = isinstance(request, Fetch)
                return request
        return None

    def wait_s(self, now: float) -> float:
        """Seconds until ``next`` may have something that it has not now, wake-ups aside."""
        times = [self._next_sweep]
        times += [unseen.next_look for unseen in self._looked_for().values()]
        times += [shard.again_at for shard in self._shards.values() if not shard.live and not shard.reading]
        return max(0.0, min(times) - now)

    def fetched(self, request: Fetch, seen: Collection[int], snapshot: Snapshot, now: float) -> Found:
        """The answer to a fetch: the numbers that were visible, the snapshot it was read with."""
        at_once = late = given_up = 0
        for seq, shard in request.wakeups:
            first_look = self._unseen.get(seq)
            if seq in seen:
                late += first_look is not None
                at_once += first_look is None
                self._unseen.pop(seq, None)
            elif first_look is None:
                given_up += self._look_again_for(seq, shard, snapshot, now)
            elif snapshot.xmin >= first_look.next_xid:
                del self._unseen[seq]  # its transaction has ended, and still it is not fresh: settled already
            elif now - first_look.since > _LOOK_AGAIN_FOR_S:
                del self._unseen[seq]
                given_up += self._give_up(shard)
            else:
                pause = min(max(now - first_look.since, _LOOK_AGAIN_MIN_S), _LOOK_AGAIN_MAX_S)
                first_look.next_look = now + pause
        return Found(at_once, late, given_up)

    def swept(
        self, request: Sweep, rows: Sequence[WakeUp], refused: Mapping[int, int], snapshot: Snapshot, now: float
    ) -> int:
        """The answer to a sweep. ``refused``: shard -> first number that could not be taken in.

        Returns how many of the rows had been rung for.
        """
        counts = dict.fromkeys(request.positions, 0)
        last = dict.fromkeys(request.positions, 0)
        rung = 0
        for seq, number in rows:
            counts[number] += 1
            last[number] = seq
            rung += self._rung.pop(seq, None) is not None or self._unseen.pop(seq, None) is not None
        for number, position in request.positions.items():
            shard = self._shards.get(number)
            if shard is None or shard.position != position:
                continue  # given away, or sent back to its beginning, while the read was under way
            full = counts[number] >= request.per_shard
            shard.page_read(last[number] if full else max(position.cursor, last[number]), snapshot)
            if number in refused:
                self.refused({number: refused[number]}, now)
            elif not full:
                shard.pass_complete(request.serial, snapshot, now, first_hand=self._first_hand)
        return rung

    def refused(self, refused: Mapping[int, int], now: float) -> None:
        """Changes from these numbers on were read and could not be taken in: read them again, a little later."""
        for number, seq in refused.items():
            if shard := self._shards.get(number):
                shard.lose(self._serial)
                shard.rewind(min(shard.cursor, seq - 1))
                shard.reading = False
                shard.again_at = now + _REPASS_MAX_S

    # --- inside ----------------------------------------------------------------------------------------------------

    def _begin_passes(self, now: float) -> None:
        periodic = now >= self._next_sweep
        if periodic:
            self._sweeps = 0 if self._sweeps >= _FULL_PASS_EVERY else self._sweeps + 1
            self._next_sweep = now + self._sweep_interval_s
        for shard in self._shards.values():
            if periodic or (not shard.live and not shard.reading and now >= shard.again_at):
                shard.reading = True

    def _fetch(self, now: float, room: int, _sweep_room: int) -> Fetch | None:
        limit = min(room, _FETCH_MAX)
        if limit <= 0:
            return None
        chosen = [WakeUp(seq, number) for seq, number in self._rung_and_live(limit)]
        looked_for = self._looked_for()
        if not chosen and not any(unseen.next_look <= now for unseen in looked_for.values()):
            return None
        for seq, _ in chosen:
            del self._rung[seq]
        return Fetch((*(WakeUp(seq, unseen.shard) for seq, unseen in looked_for.items()), *chosen))

    def _looked_for(self) -> dict[int, _Unseen]:
        """What every fetch looks for again; of a shard that is not live, a pass does."""
        return {seq: unseen for seq, unseen in self._unseen.items() if self._by_number(unseen.shard)}

    def _by_number(self, number: int) -> bool:
        shard = self._shards[number]
        return shard.live and not shard.reading

    def _rung_and_live(self, limit: int) -> list[tuple[int, int]]:
        chosen: list[tuple[int, int]] = []
        for seq, number in self._rung.items():
            if self._by_number(number):
                chosen.append((seq, number))
                if len(chosen) == limit:
                    break
        return chosen

    def _sweep(self, _now: float, room: int, sweep_room: int) -> Sweep | None:
        reading = [(number, shard.position) for number, shard in self._shards.items() if shard.reading]
        if not reading or room < max(sweep_room, 1):
            return None
        per_shard = max(1, room // len(reading))
        self._serial += 1
        return Sweep(dict(reading[: room // per_shard]), per_shard, self._serial)

    def _look_again_for(self, seq: int, shard: int, snapshot: Snapshot, now: float) -> int:
        if len(self._unseen) >= _UNSEEN_MAX:
            return self._give_up(shard)
        self._unseen[seq] = _Unseen(shard, now, snapshot.next_xid)
        return 0

    def _give_up(self, number: int) -> int:
        if shard := self._shards.get(number):
            shard.lose(self._serial)
        return 1

    def _forget_wakeups(self, number: int) -> None:
        for seq in [seq for seq, shard in self._rung.items() if shard == number]:
            del self._rung[seq]
        for seq in [seq for seq, unseen in self._unseen.items() if unseen.shard == number]:
            del self._unseen[seq]
