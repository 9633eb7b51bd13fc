"""What to read next from the outbox, and when. Pure: time is an argument, and the caller reads.

Theory
------
Changes are found in two ways. *By number*: a wake-up names a change, and the fetch touches that row alone. *By sweep*:
the fresh changes of a shard are paged through in ``seq`` order. Fetching by number makes a wake-up cheap; sweeping
makes the loss of one harmless. Both must keep order, though rows become visible in another order than their numbers
were drawn. Both rest on one fact: the successor of a change can only be written once that change is visible, so a
reader of everything that *one* snapshot shows never sees a successor without its predecessor.

**Sweep.** Each page reads what its snapshot shows and the one before did not; ``shard_cursor`` says how.

**By number.** Wake-ups arrive in commit order. As long as *every* wake-up since some moment was kept, and a number
that is not visible yet is requested by every later fetch until it is, no fetch can see a successor and miss its
predecessor. A shard for which that holds is *live*. A wake-up that was lost (start, takeover, reconnect, overflow)
belongs to a transaction that had an id when it was lost: a pass whose ``xmin`` is not below the ``next_xid`` of that
moment has seen it, and makes the shard live again. Until then each wake-up makes the shard swept instead of fetched by
number: as fast, and more expensive. A shard stays so while the wake-ups do not come *from the own slot* of this
process: a relay may lose some of them unnoticed.

**Throttled types.** A type whose change was rejected for lack of room must not delay the other types, and its later
changes must not overtake that change. From then on the type is *throttled*: it has a cursor of its own in each shard,
split off from the common one, which pauses while the type has no room. Fetches and other passes skip its rows. When it
has caught up in all shards, it joins the common cursor again. So a backlog is read once for its own type and once for
the others. A pass that proves a shard live leaves out throttled types; so each such proof makes their passes repeat
before they join.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import NamedTuple

from cdc.core.fast_change import fast_make
from cdc.core.model import WakeUp
from cdc.core.shard_cursor import REPASS_MAX_S, RETRY_MIN_S, Position, Scanned, ShardCursor, Snapshot, ends_of
from cdc.core.shard_ownership import Acquired
from cdc.core.sweep_schedule import SweepSchedule
from cdc.core.type_filter import EVERYTHING, TypeFilter

_RETRY_MAX_S = 0.05
"""A commit that waits for a synchronous standby stays invisible meanwhile. It is found within this time of its release,
by 20 cheap queries a second, only while such a commit hangs."""
_RETRY_FOR_S = 60.0
_FETCH_MAX = 500
_UNSEEN_MAX = 2_000
_UNBOUNDED = 1 << 30
_SHOWN_MAX = 1_000


class Fetch(NamedTuple):
    """Read these changes by number."""

    wakeups: tuple[WakeUp, ...]


@dataclass(frozen=True, slots=True)
class Sweep:
    """Read the next ``per_shard`` fresh changes of each shard: above the cursor, and late ones above the floor.

    Only those in ``scope``; ``only`` is the one type of a sweep for a throttled type. ``serial`` numbers the sweeps of
    a planner.
    """

    positions: Mapping[int, Position]
    per_shard: int
    serial: int
    only: str | None = None
    scope: TypeFilter = EVERYTHING


class FetchResult(NamedTuple):
    """How many changes of a fetch were visible at once, visible at a retry, and given up."""

    at_once: int = 0
    late: int = 0
    given_up: int = 0


_WAKEUP, _FETCH, _FETCH_RESULT = fast_make(WakeUp), fast_make(Fetch), fast_make(FetchResult)


class _Unseen:
    """A number that was not visible when it was first fetched."""

    __slots__ = ("next_xid", "retry_at", "shard", "since")

    def __init__(self, shard: int, since: float, next_xid: int) -> None:
        self.shard = shard
        self.since = since
        self.next_xid = next_xid
        self.retry_at = since + RETRY_MIN_S


class ReadPlanner:
    """``queue_capacity``: wake-ups kept. Those beyond are dropped and their shards swept instead.

    ``room_for``: how many changes of a type can be taken in, and from how many on reading a page is worth while.
    ``scope``: the types to read at all.
    """

    def __init__(
        self,
        *,
        sweep_interval_s: float,
        queue_capacity: int = 20_000,
        room_for: Callable[[str], tuple[int, int]] = lambda _: (_UNBOUNDED, 1),
        scope: TypeFilter = EVERYTHING,
    ) -> None:
        self._schedule = SweepSchedule(sweep_interval_s)
        self._queue_capacity = queue_capacity
        self._room_for = room_for
        self._scope = scope
        self._shards: dict[int, ShardCursor] = {}
        self.throttled: dict[str, dict[int, ShardCursor]] = {}
        """The types that have cursors of their own, and these by shard. The type that was read last stands last."""
        self._notified: dict[int, int] = {}
        self._unseen: dict[int, _Unseen] = {}
        self._shown: dict[int, bool] = {}
        """Numbers that passes have shown before their wake-ups, which then say nothing new. The newest last."""
        self._choices = deque((self._fetch, self._sweep, self._sweep_throttled))
        """In the order of their last turns, the latest last."""
        self._swept_at: dict[str | None, float] = {}
        """When each throttled type was swept last, and (None) the others."""
        self._serial = 0
        self._from_own_slot = False
        self._cursors_idle = False
        """No shard has a pass under way or to come, the periodic ones aside, and no type is throttled: the cursors of
        those are never live. Most reads are of one change, and looking at all shards would be most of their cost."""

    @property
    def queue_length(self) -> int:
        return len(self._notified)

    @property
    def idle(self) -> bool:
        """Nothing is known that is to be read, the periodic passes aside."""
        return self._cursors_idle and not self._notified

    @property
    def live_shards(self) -> int:
        return sum(shard.live for shard in list(self._shards.values()))

    @property
    def catching_up(self) -> bool:
        return any(cursor.catching_up for cursor in self._all_cursors())

    @property
    def uncommitted(self) -> int:
        return len(self._unseen)

    # --- in --------------------------------------------------------------------------------------------------------

    def acquired(self, acquired: Acquired) -> None:
        """Sweep these shards from their floors on, at once."""
        for number in acquired.shards:
            floor = acquired.floors.get(number, 0)
            for of_shards in (self._shards, *self.throttled.values()):
                of_shards.setdefault(number, ShardCursor(self._serial, floor))
        self._cursors_idle = False

    def revoked(self, shards: Collection[int]) -> None:
        for number in shards:
            for of_shards in (self._shards, *self.throttled.values()):
                of_shards.pop(number, None)
            self._forget_wakeups(number)
        if not self._shards:
            self.throttled.clear()

    def lost(self) -> None:
        self.revoked(tuple(self._shards))

    def interval(self, sweep_interval_s: float, now: float) -> None:
        """Sweep at this interval from now on."""
        self._schedule.interval(sweep_interval_s, now)

    def sweep_by(self, at: float) -> None:
        """Begin the next sweep at ``at``, or earlier."""
        self._schedule.by(at)

    def streaming(self, *, connected: bool) -> None:
        """Wake-ups come from this process's slot from now on, or no more. Earlier ones may have been missed."""
        self._from_own_slot = connected
        if not connected:
            self._notified.clear()
            self._unseen.clear()
        self.wakeups_lost()

    def wakeups_lost(self) -> None:
        """Wake-ups may have been missed until now."""
        for shard in self._shards.values():
            shard.lose(self._serial)
        self._cursors_idle = False

    def restart(self) -> Collection[int]:
        """Sweep every shard from its first change on. Returns the shards, for ``KeyScheduler.forget_deferred``."""
        for cursor in self._all_cursors():
            cursor.rewind(0)
        self._cursors_idle = False
        self._schedule.request_full_pass()
        return self._shards.keys()

    def notified(self, wakeups: Iterable[WakeUp], *, relayed: bool = False) -> int:
        """Take in wake-ups, in the order of their arrival. Returns how many were dropped for lack of room.

        ``relayed``: another process sent them, and may still be sending earlier ones when this one streams.
        """
        dropped = 0
        for seq, number in wakeups:
            shard = self._shards.get(number)
            if shard is None:
                continue
            if (relayed or not shard.live) and not self._shown.pop(seq, False):
                self._cursors_idle = False
                shard.touch(seq)
                self._touch_throttled(number)
            if relayed or not self._from_own_slot:
                continue
            if len(self._notified) >= self._queue_capacity:
                dropped += self._give_up(number)
                continue
            self._notified[seq] = number
        return dropped

    def skipped(self, entity_type: str, shard: int) -> None:
        """A fetch showed a change of a throttled type."""
        if cursor := self.throttled.get(entity_type, {}).get(shard):
            cursor.touch()

    # --- out -------------------------------------------------------------------------------------------------------

    @property
    def passing_from_zero(self) -> bool:
        """``restart`` was called, and its pass has begun and is not complete."""
        return self._schedule.passing_from_zero

    def full_pass_due(self, now: float) -> bool:
        """A pass from zero is due, as happens once in a while; the caller then calls ``restart``."""
        return now >= self._schedule.next_at and self._schedule.full_pass_due(now)

    def next(self, now: float, room: int, sweep_room: int) -> Fetch | Sweep | None:
        """What to read now, with ``room`` for that many changes; None: nothing.

        A sweep waits until there is room for ``sweep_room``, or for half a second: pages of a few rows would cost more
        than they bring. Fetches, sweeps, and sweeps of throttled types take turns, so that neither a backlog nor a
        flood of wake-ups delays the others.
        """
        if not self._cursors_idle or now >= self._schedule.next_at:
            self._begin_passes(now)
        if self._cursors_idle:
            return self._fetch(now, room, sweep_room)
        for choice in self._choices:
            if request := choice(now, room, sweep_room):
                self._choices.remove(choice)
                self._choices.append(choice)
                return request
        return None

    def wait_s(self, now: float) -> float:
        """Seconds until ``next`` may have something new, wake-ups aside."""
        if self._cursors_idle and not self._unseen:
            left_s = self._schedule.next_at - now
            return left_s if left_s > 0.0 else 0.0
        times = [self._schedule.next_at]
        if self._unseen:
            times += [unseen.retry_at for unseen in self._to_retry().values()]
        for cursor in () if self._cursors_idle else self._all_cursors():
            if cursor.reading:
                times.append(now + REPASS_MAX_S)  # it waits for room
            elif not cursor.live:
                times.append(cursor.repass_at)
        return max(0.0, min(times) - now)

    def fetched(
        self, request: Fetch, seen: Collection[int], snapshot: Snapshot, now: float, cut: Sequence[WakeUp] = ()
    ) -> FetchResult:
        """The answer to a fetch: the numbers that were visible, and the snapshot of the read.

        ``cut``: visible changes that did not fit into the page. They are fetched again before all later wake-ups.
        """
        at_once = late = given_up = 0
        deferred = dict(cut)
        if cut and self._from_own_slot:  # else passes find them
            self._notified = {seq: shard for seq, shard in cut if shard in self._shards} | self._notified
        for seq, shard in request.wakeups:
            if shard not in self._shards:
                continue  # given away during the read
            if seq in deferred:
                self._unseen.pop(seq, None)
                continue
            unseen = self._unseen.get(seq)
            if seq in seen:
                late += unseen is not None
                at_once += unseen is None
                self._unseen.pop(seq, None)
            elif unseen is None:
                given_up += self._retry_later(seq, shard, snapshot, now)
            elif snapshot.xmin >= unseen.next_xid:
                del self._unseen[seq]  # its transaction has ended, and it is not fresh: already settled
            elif now - unseen.since > _RETRY_FOR_S:
                del self._unseen[seq]
                given_up += self._give_up(shard)
            else:
                pause = min(max(now - unseen.since, RETRY_MIN_S), _RETRY_MAX_S)
                unseen.retry_at = now + pause
        return _FETCH_RESULT((at_once, late, given_up))

    def swept(
        self,
        request: Sweep,
        rows: Sequence[tuple[int, int]],
        rejected: Mapping[str, Mapping[int, int]],
        snapshot: Snapshot,
        now: float,
        *,
        scanned: Mapping[int, Scanned] | None = None,
    ) -> int:
        """The answer to a sweep: rows of its types, as (seq, shard). Returns how many of them a wake-up had named.

        ``rejected``: as for ``throttle``. ``scanned``: by shard; left out where all rows scanned are among these.
        """
        notified = 0
        for seq, _ in rows:
            notified += self._notified.pop(seq, None) is not None or self._unseen.pop(seq, None) is not None
        if not self._from_own_slot:
            self._show(rows)
        of_shards = self._shards if request.only is None else self.throttled.get(request.only, {})
        stuck = rejected.get(request.only, ()) if request.only else ()
        ends = ends_of(rows, request.per_shard) if scanned is None else scanned
        deferred = {number for number, end in ends.items() if end.more and not end.seq}
        for number in request.positions if deferred else ():
            if number not in deferred and number in of_shards:
                of_shards[number] = of_shards.pop(number)  # the other shards come first next time
        for number, position in request.positions.items():
            cursor = of_shards.get(number)
            if cursor is None or cursor.position != position or request.serial <= cursor.acquired_at_serial:
                continue  # given away, or rewound, during the read
            if number in deferred:
                continue
            end = ends.get(number, Scanned(0, more=False))
            cursor.page_read(end.seq if end.more else max(position.cursor, end.seq), snapshot)
            if not end.more and number not in stuck:
                self._pass_complete(number, cursor, request, snapshot, now)
        self.throttle(rejected, now)
        self._note_full_pass(now)
        if request.only is not None:
            self._join_if_caught_up(request.only)
        return notified

    def throttle(self, rejected: Mapping[str, Mapping[int, int]], now: float) -> None:
        """Throttle the types of ``rejected``, which has their first rejected change by shard: read on from there."""
        for entity_type, numbers in rejected.items():
            self._cursors_idle = False
            if entity_type not in self.throttled:
                self.throttled[entity_type] = {number: shard.split() for number, shard in self._shards.items()}
            of_shards = self.throttled[entity_type]
            has_room = self._room_for(entity_type)[0] > 0
            for number, seq in numbers.items():
                if cursor := of_shards.get(number):
                    cursor.rewind(min(cursor.seq, seq - 1))
                    if has_room:
                        cursor.pause(now)  # the window had room: something else was full, or it is barred

    def _begin_passes(self, now: float) -> None:
        periodic = now >= self._schedule.next_at
        if periodic:
            self._schedule.begin(now)
        self._cursors_idle = True
        for cursor in self._all_cursors():
            if periodic or (not cursor.live and not cursor.reading and now >= cursor.repass_at):
                cursor.reading = True
            self._cursors_idle = self._cursors_idle and cursor.live and not cursor.reading

    def _fetch(self, now: float, room: int, _sweep_room: int) -> Fetch | None:
        limit = room if room < _FETCH_MAX else _FETCH_MAX
        if limit <= 0:
            return None
        chosen: list[WakeUp] = []
        for seq, number in self._notified.items():
            shard = self._shards[number]
            if shard.live and not shard.reading:
                chosen.append(_WAKEUP((seq, number)))
                if len(chosen) == limit:
                    break
        looked_for: list[WakeUp] = []
        if self._unseen:
            to_retry = self._to_retry()
            if not chosen and not any(unseen.retry_at <= now for unseen in to_retry.values()):
                return None
            looked_for = [WakeUp(seq, unseen.shard) for seq, unseen in to_retry.items()]
        elif not chosen:
            return None
        for seq, _ in chosen:
            del self._notified[seq]
        return _FETCH(((*looked_for, *chosen),))

    def _to_retry(self) -> dict[int, _Unseen]:
        """The numbers that every fetch requests again. In a shard that is not live, a pass finds them."""
        numbers = {unseen.shard for unseen in self._unseen.values()}
        live = {number for number in numbers if self._shards[number].live and not self._shards[number].reading}
        return {seq: unseen for seq, unseen in self._unseen.items() if unseen.shard in live}

    def _sweep(self, now: float, room: int, sweep_room: int) -> Sweep | None:
        return self._page(None, self._shards, now, room, sweep_room)

    def _sweep_throttled(self, now: float, room: int, _sweep_room: int) -> Sweep | None:
        for entity_type, of_shards in self.throttled.items():
            free, worth = self._room_for(entity_type)
            # With enough room, a page is not put off for being small: large rows make small pages.
            if request := self._page(entity_type, of_shards, now, min(room, free), worth if free < worth else 1):
                self.throttled[entity_type] = self.throttled.pop(entity_type)
                return request
        return None

    def _page(
        self, only: str | None, of_shards: dict[int, ShardCursor], now: float, room: int, sweep_room: int
    ) -> Sweep | None:
        reading = [number for number, cursor in of_shards.items() if cursor.reading]
        waited_long = now - self._swept_at.get(only, -inf) >= REPASS_MAX_S
        if not reading or room <= 0 or (room < sweep_room and not waited_long):
            return None
        self._swept_at[only] = now
        per_shard = max(1, room // len(reading))
        chosen = reading[: room // per_shard]
        for number in chosen if len(chosen) < len(reading) else ():
            of_shards[number] = of_shards.pop(number)  # the other shards come first next time
        if only is None:
            self._schedule.page_requested(now)
        self._serial += 1
        positions = {number: of_shards[number].position for number in chosen}
        scope = self._scope.without(self.throttled) if only is None else TypeFilter((only,), include=True)
        return Sweep(positions, per_shard, self._serial, only, scope)

    def _pass_complete(self, number: int, cursor: ShardCursor, request: Sweep, snapshot: Snapshot, now: float) -> None:
        was_live = cursor.live
        from_own_slot = self._from_own_slot and request.only is None
        cursor.pass_complete(request.serial, snapshot, now, from_own_slot=from_own_slot)
        if cursor.live and not was_live:
            self._touch_throttled(number)

    def _join_if_caught_up(self, entity_type: str) -> None:
        of_shards = self.throttled.get(entity_type, {})
        if not of_shards or any(cursor.reading or cursor.behind for cursor in of_shards.values()):
            return
        for number, cursor in of_shards.items():
            self._shards[number].join(cursor)
        del self.throttled[entity_type]
        self._swept_at.pop(entity_type, None)

    def _note_full_pass(self, now: float) -> None:
        if self._schedule.passing_from_zero and not any(shard.reading for shard in self._shards.values()):
            self._schedule.full_pass_complete(now)

    def _show(self, rows: Iterable[tuple[int, int]]) -> None:
        """A pass has shown these: they are not awaited any more, or their wake-ups are still to come."""
        for seq, number in rows:
            cursor = self._shards.get(number)
            if cursor and seq in cursor.awaited:
                cursor.awaited.remove(seq)
            else:
                self._shown[seq] = True
        for seq in list(islice(self._shown, max(0, len(self._shown) - _SHOWN_MAX))):
            del self._shown[seq]

    def _all_cursors(self) -> Sequence[ShardCursor]:  # copies, as any thread may ask for the status
        return [cursor for shards in (self._shards, *self.throttled.values()) for cursor in list(shards.values())]

    def _touch_throttled(self, number: int) -> None:
        for of_shards in self.throttled.values():
            of_shards[number].touch()

    def _retry_later(self, seq: int, shard: int, snapshot: Snapshot, now: float) -> int:
        if len(self._unseen) >= _UNSEEN_MAX:
            return self._give_up(shard)
        self._unseen[seq] = _Unseen(shard, now, snapshot.next_xid)
        return 0

    def _give_up(self, number: int) -> int:
        if shard := self._shards.get(number):
            shard.lose(self._serial)
            self._cursors_idle = False
        return 1

    def _forget_wakeups(self, number: int) -> None:
        for seq in [seq for seq, shard in self._notified.items() if shard == number]:
            del self._notified[seq]
        for seq in [seq for seq, unseen in self._unseen.items() if unseen.shard == number]:
            del self._unseen[seq]
