"""Reads changes from the outbox, one read after the other, and hands them to the scheduler.

Three kinds of reads take turns, so that none can delay another for long: keys to be read on, waiting changes that are
due (``DueReads``), and what ``ReadPlanner`` plans. All of it runs on the event loop, one read at a time.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Sequence
from math import inf
from operator import attrgetter
from typing import Any, NamedTuple
from uuid import UUID

import psycopg

from cdc.core import failpoints
from cdc.core.deferred_keys import KeyRead
from cdc.core.delay import Delay
from cdc.core.due_reads import DueReads
from cdc.core.page_size import PageSize
from cdc.core.read_planner import Fetch, ReadPlanner, Sweep
from cdc.core.scheduler import KeyScheduler
from cdc.core.sqlstate import About, about, passes
from cdc.observability.metrics import Metrics
from cdc.postgres.outbox import FIRST_TYPE, Store
from cdc.postgres.pages import OutboxPage
from cdc.postgres.shard_locks import ShardSession
from cdc.postgres.unreadable import Kind, RefusedReadError

log = logging.getLogger("cdc.consumer")

_KEY_READS_MAX = 20
_SEQ, _SIZE = attrgetter("change.seq"), attrgetter("change.size")
_now = time.monotonic
"""The event loop's clock."""
_UNMARKED_S = 1.0
"""Until the next read, while a rejected change cannot be made a dead letter."""


class _Room(NamedTuple):
    """Of a read at ``now``. ``rows``: how many the next page may have. ``scarce``: less than is worth a page."""

    now: float
    rows: int
    scarce: bool


_Kind = Callable[[psycopg.AsyncConnection, _Room], Coroutine[Any, Any, None] | None]
"""The read to make now; None: there is nothing of this kind to read."""


class Reader:
    """``pauses`` tells whether a dead letter blocks its key. Times in seconds."""

    def __init__(
        self,
        scheduler: KeyScheduler,
        planner: ReadPlanner,
        store: Store,
        metrics: Metrics,
        *,
        pauses: Callable[[Kind | None], bool] = lambda kind: False,
        sweep_interval_s: float,
        poll_interval_s: float,
    ) -> None:
        self._scheduler = scheduler
        self._planner = planner
        self._store = store
        self._metrics = metrics
        self._pauses = pauses
        self._due = DueReads(scheduler.room_for, sweep_interval_s=sweep_interval_s, poll_interval_s=poll_interval_s)
        self._paging = PageSize()
        self._kinds = deque[_Kind]((self._read_on, self._read_due, self._read_planned))
        """In the order of their last turns, the latest last."""
        self._unmarked: set[UUID] = set()
        """The changes that were rejected last and are no dead letters yet."""
        self._rests_until = 0.0
        self._delay = Delay()
        self._restart_due = False
        self.wants_room = True
        """There may be something to read as soon as room is freed."""

    def restart(self) -> None:
        """Read the whole outbox again."""
        self._restart_due = True
        self.due_within(0.0)

    def due_within(self, seconds: float) -> None:
        """Read waiting changes after this many seconds at the latest."""
        self._due.within(seconds, _now())

    @property
    def delayed_since(self) -> float | None:
        """Since when nothing can be read, by the event loop's clock."""
        return self._delay.since

    def wait_s(self, *, read: bool = False) -> float:
        """Seconds for which there is nothing to read, unless a wake-up comes or room is freed (``wants_room``).

        ``read``: there was something at the last time, so there may be more.
        """
        now, room = _now(), self._scheduler.window.free
        scarce = room < self._scheduler.worth and not self._planner.throttled
        idle = not self._restart_due and self._planner.idle
        self.wants_room = scarce or not idle or bool(self._due.left_out)
        if room <= 0 or not self._scheduler.ownership.active:
            return inf
        if now < self._rests_until:
            return self._rests_until - now
        if read and (not idle or self._scheduler.wants_key_reads):
            return 0.0
        return min(self._planner.wait_s(now), max(0.0, self._due.next_at(now, scarce=scarce) - now))

    async def once(self, reader: psycopg.AsyncConnection, session: ShardSession) -> bool:
        """Read once. False: there is nothing to read, or no room for it.

        A change that the server refuses to hand over becomes a dead letter, on the session that holds its shard.
        """
        now, room = _now(), self._scheduler.window.free
        if room <= 0 or now < self._rests_until or not self._scheduler.ownership.active:
            return False
        try:
            try:
                with self._scheduler.reading:
                    read = self._next(reader, now, room)
                    if read is None:
                        return False
                    await read
            except RefusedReadError as refused:
                await self._set_aside(reader, session, refused)
            else:
                if self._delay.since is not None:
                    log.info("changes are read again, after %.1f s", self._delay.done(_now()))
                return True
        except psycopg.Error as error:
            self._delayed(reader, error)
        # The read brought nothing, and what asked for it is forgotten: wake-ups, and keys to be read on.
        self._planner.wakeups_lost()
        self.restart()
        return True

    def _next(self, reader: psycopg.AsyncConnection, now: float, places: int) -> Coroutine[Any, Any, None] | None:
        """The next read; None: there is nothing to read."""
        # As many rows like the last ones as fit into the window.
        rows = min(places // (1 + self._paging.row_bytes // self._scheduler.place_bytes), self._paging.rows)
        # Types with a backlog are throttled; of the rest any page brings few changes.
        scarce = places < self._scheduler.worth and not self._planner.throttled
        room = _Room(now, max(1, rows), scarce)
        for kind in self._kinds:
            if read := kind(reader, room):
                self._kinds.remove(kind)
                self._kinds.append(kind)
                return read
        return None

    def _delayed(self, reader: psycopg.AsyncConnection, error: psycopg.Error) -> None:
        """Raises errors that are about the session."""
        if reader.closed or not passes(error.sqlstate):
            raise error
        if self._delay.failed(_now()):
            log.warning(
                "reading changes is delayed: %s [%s]; it is tried again, and what runs goes on",
                error.diag.message_primary, error.sqlstate,
            )  # fmt: skip
        self._rests_until = self._delay.until

    async def _set_aside(self, reader: psycopg.AsyncConnection, session: ShardSession, read: RefusedReadError) -> None:
        """Raises the server's error if it rejects no change by itself, unless all took too long together."""
        found = await self._store.refused.find(reader, read)
        if not found and not read.took_too_long:
            raise read.error
        if not found:
            log.warning("a read took longer than the session allows: reading one change at a time")
            self._paging.refused()
            return
        marked = set[UUID]()
        try:
            async with session.writing:
                marked = await self._store.refused.mark(session.connection, found, self._pauses)
        except psycopg.Error as error:
            if session.connection.closed or about(error.sqlstate) is About.SESSION:
                raise
        for seq, id_, summary, words, _ in found:
            if id_ in marked:
                self._metrics.outbox.rows_refused.labels("read").inc()
                log.error("change %d (%s) is now a dead letter: %s: %s", seq, id_, summary, words)
            elif id_ not in self._unmarked:
                log.warning("change %d (%s) can be neither read nor marked now: %s; trying again", seq, id_, words)
        self._unmarked = {each.id for each in found} - marked
        if self._unmarked:
            self._rests_until = _now() + _UNMARKED_S

    def _read_on(self, reader: psycopg.AsyncConnection, room: _Room) -> Coroutine[Any, Any, None] | None:
        key_reads = self._scheduler.key_reads(min(_KEY_READS_MAX, room.rows))
        return self._read_keys(reader, key_reads, room.rows) if key_reads else None

    async def _read_keys(self, reader: psycopg.AsyncConnection, key_reads: Sequence[KeyRead], rows: int) -> None:
        per_key = max(1, min(rows // len(key_reads), self._scheduler.key_capacity))
        found = await self._store.read_keys(reader, key_reads, per_key)
        self._paging.read([row.change.size for of_key, _ in found.values() for row in of_key])
        for request, (of_key, cut) in found.items():
            self._scheduler.admit_key_read(request, of_key, complete=len(of_key) < per_key and not cut)

    def _read_due(self, reader: psycopg.AsyncConnection, room: _Room) -> Coroutine[Any, Any, None] | None:
        if room.now < self._due.next_at(room.now, scarce=room.scarce):
            return None
        return self._read_waiting(reader, self._due.begin(room.now, self._scheduler.types))

    async def _read_waiting(self, reader: psycopg.AsyncConnection, without: Collection[str]) -> None:
        # What is in the window is due as well until it is settled: a page has to reach beyond it.
        here = self._scheduler.queued + self._scheduler.running + self._scheduler.settling
        limit = min(self._scheduler.capacity, here + self._paging.rows)
        active, in_window = self._scheduler.ownership.active, self._scheduler.requeued()
        start = FIRST_TYPE if self._due.start is None else self._due.start
        found = await self._store.due(reader, active, limit, without, start=start, in_window=in_window)
        self._paging.read(list(map(_SIZE, found.rows)))
        admitted = self._scheduler.admit(found.rows, due=True)
        self._metrics.wakeups.received.labels("retry").inc(admitted.taken)
        self._due.done(
            _now(), rejected=admitted.rejected, next_due_s=found.next_due_s, go_on=found.go_on, more=found.more
        )

    def _read_planned(self, reader: psycopg.AsyncConnection, room: _Room) -> Coroutine[Any, Any, None] | None:
        # Not during such a pass: restarted at each wake-up, it would never get beyond the first rows.
        if (self._restart_due and not self._planner.passing_from_zero) or self._planner.full_pass_due(room.now):
            # No read is under way here: its answer would overtake the watermarks that are forgotten here.
            self._restart_due = False
            self._scheduler.forget_deferred(self._planner.restart())
        # Large rows make small pages, which are worth reading if there is room for many.
        match self._planner.next(room.now, room.rows, room.rows + 1 if room.scarce else 1):
            case Fetch() as fetch:
                return self._fetch(reader, fetch, room.now)
            case Sweep() as sweep:
                return self._sweep(reader, sweep, room.now)
        return None

    async def _fetch(self, reader: psycopg.AsyncConnection, fetch: Fetch, began: float) -> None:
        failpoints.here("fetch.before_rows")
        page = await self._store.fetch(reader, fetch.wakeups)
        now = self._measure(page, began)
        throttled = self._planner.throttled
        if throttled:
            for row in page.rows:
                self._planner.skipped(row.change.entity_type, row.change.shard)
        admitted = self._scheduler.admit(page.rows, throttled=throttled)
        seen = page.others.union(map(_SEQ, page.rows))
        found = self._planner.fetched(fetch, seen, page.snapshot, now, page.cut)
        if admitted.rejected:
            self._planner.throttle(admitted.rejected, now)
        if found.late or found.given_up:
            self._metrics.outbox.visibility_retries.labels("found").inc(found.late)
            self._metrics.outbox.visibility_retries.labels("left_to_sweep").inc(found.given_up)

    async def _sweep(self, reader: psycopg.AsyncConnection, sweep: Sweep, began: float) -> None:
        failpoints.here("fetch.before_rows")
        page = await self._store.sweep(reader, sweep)
        now = self._measure(page, began)
        admitted = self._scheduler.admit(page.rows)
        seen = [(row.change.seq, row.change.shard) for row in page.rows]
        notified = self._planner.swept(sweep, seen, admitted.rejected, page.snapshot, now, scanned=page.scanned)
        self._metrics.wakeups.received.labels("sweep").inc(max(0, admitted.taken - notified))

    def _measure(self, page: OutboxPage, began: float) -> float:
        """A page has come. Returns the time."""
        self._paging.read(list(map(_SIZE, page.rows)))
        now = _now()
        self._metrics.outbox.fetch_duration.observe(now - began)
        self._metrics.outbox.fetch_changes.observe(len(page.rows))
        return now
