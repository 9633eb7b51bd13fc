"""Which read of the outbox is made next, of all kinds. Pure: time is an argument, and the caller reads.

Theory
------
Four kinds of reads: *keys* to be read on, whose changes had no room; waiting changes that are *due* (``due_reads``);
and *fetches* and *sweeps* (``read_planner``). Keys, due changes and what is planned take turns, so that none can delay
another for long. One read is made at a time: its answer is given to the scheduler and to whoever planned it before the
next one is decided.

A page is as large as the window has room for rows like the last ones. While that is less than is worth a page, only
what cannot wait is read; types with a backlog are throttled, and of the rest any page brings few changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from math import inf
from typing import NamedTuple

from cdc.core.deferred_keys import KeyRead
from cdc.core.due_reads import DueReads
from cdc.core.fast_change import fast_make
from cdc.core.page_size import PageSize
from cdc.core.read_planner import Fetch, ReadPlanner, Sweep
from cdc.core.scheduler import KeyScheduler

_KEY_READS_MAX = 20


class KeyReads(NamedTuple):
    """Read the next ``per_key`` changes of each key."""

    keys: Sequence[KeyRead]
    per_key: int


class DueRead(NamedTuple):
    """Read up to ``limit`` due changes, of all types but those ``without`` room, from the type ``start`` on.

    ``start`` is None for the first type. Those that are in the window count for the limit.
    """

    limit: int
    without: Collection[str]
    start: int | None


Read = Fetch | Sweep | KeyReads | DueRead


class _Room(NamedTuple):
    """At ``now``. ``rows``: how many the next page may have. ``scarce``: less than is worth a page."""

    now: float
    rows: int
    scarce: bool


_ROOM = fast_make(_Room)


class NextRead:
    """The caller gives what was read to ``due`` and ``page``; ``page`` says how many rows are read at once."""

    def __init__(self, scheduler: KeyScheduler, planner: ReadPlanner, due: DueReads, page: PageSize) -> None:
        self._scheduler = scheduler
        self._worth = scheduler.worth
        self._planner = planner
        self._due = due
        self._page = page
        self._choices = deque[Callable[[_Room], Read | None]]((self._keys, self._waiting, self._planned))
        """In the order of their last turns, the latest last."""
        self._restart_due = False
        self.wants_room = True
        """There may be something to read as soon as room is freed."""

    def restart(self, now: float) -> None:
        """Read the whole outbox again."""
        self._restart_due = True
        self._due.within(0.0, now)

    def next(self, now: float) -> Read | None:
        """None: there is nothing to read, or no room for it."""
        scheduler = self._scheduler
        places, deferred = scheduler.window.free, scheduler.deferred
        if places <= 0 or not scheduler.ownership.active or scheduler.held.pauses.everything:
            return None
        if deferred.held and deferred.held_until <= now:
            deferred.read_held(now)
        rows = places // (1 + self._page.row_bytes // scheduler.place_bytes)
        if rows > self._page.rows:
            rows = self._page.rows
        scarce = places < self._worth and not self._planner.throttled
        room = _ROOM((now, rows if rows > 0 else 1, scarce))
        if not deferred.reads and now < self._due.next_at(now, scarce=scarce):
            return self._planned(room)  # nothing takes turns with it
        for choice in self._choices:
            if read := choice(room):
                self._choices.remove(choice)
                self._choices.append(choice)
                return read
        return None

    def wait_s(self, now: float, *, read: bool) -> float:
        """Seconds for which there is nothing to read, unless a wake-up comes or room is freed (``wants_room``).

        ``read``: there was something at the last time, so there may be more.
        """
        scheduler = self._scheduler
        places, deferred = scheduler.window.free, scheduler.deferred
        scarce = places < self._worth and not self._planner.throttled
        idle = not self._restart_due and self._planner.idle
        self.wants_room = scarce or not idle or bool(self._due.left_out)
        if places <= 0 or not scheduler.ownership.active or scheduler.held.pauses.everything:
            return inf
        if read and (not idle or deferred.reads):
            return 0.0
        at = self._due.next_at(now, scarce=scarce)
        if deferred.held:
            at = min(at, deferred.held_until)
        wait_s, until_due_s = self._planner.wait_s(now), at - now
        if until_due_s < wait_s:
            wait_s = until_due_s
        return wait_s if wait_s > 0.0 else 0.0

    def _keys(self, room: _Room) -> KeyReads | None:
        keys = self._scheduler.key_reads(min(_KEY_READS_MAX, room.rows))
        return KeyReads(keys, max(1, min(room.rows // len(keys), self._scheduler.key_capacity))) if keys else None

    def _waiting(self, room: _Room) -> DueRead | None:
        if room.now < self._due.next_at(room.now, scarce=room.scarce):
            return None
        without = self._due.begin(room.now, self._scheduler.types)
        # What is in the window is due as well until it is settled: a page has to reach beyond it.
        here = self._scheduler.queued + self._scheduler.running + self._scheduler.settling
        limit = min(self._scheduler.capacity, here + self._page.rows) + len(self._scheduler.held.due)
        return DueRead(limit, without, self._due.start)

    def _planned(self, room: _Room) -> Fetch | Sweep | None:
        # Not during such a pass: restarted at each wake-up, it would never get beyond the first rows.
        if (self._restart_due and not self._planner.passing_from_zero) or self._planner.full_pass_due(room.now):
            # No read is under way here: its answer would overtake the watermarks that are forgotten here.
            self._restart_due = False
            self._scheduler.forget_deferred(self._planner.restart())
        # Large rows make small pages, which are worth reading if there is room for many.
        return self._planner.next(room.now, room.rows, room.rows + 1 if room.scarce else 1)
