"""Reads changes from the outbox, as ``next_read`` decides, and hands them to the scheduler.

All of it runs on the event loop, one read at a time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from math import inf
from operator import attrgetter
from uuid import UUID

import psycopg

from cdc.core import failpoints
from cdc.core.admission import Admitted
from cdc.core.delay import Delay
from cdc.core.due_reads import DueReads
from cdc.core.next_read import DueRead, KeyReads, NextRead
from cdc.core.page_size import PageSize
from cdc.core.read_planner import Fetch, ReadPlanner, Sweep
from cdc.core.scheduler import KeyScheduler
from cdc.core.shard_cursor import REPASS_MAX_S
from cdc.core.sqlstate import About, about, passes
from cdc.observability.metrics import Metrics
from cdc.postgres.barriers import Barriers
from cdc.postgres.outbox import FIRST_TYPE, Store
from cdc.postgres.pages import OutboxPage
from cdc.postgres.shard_locks import ShardSession
from cdc.postgres.unreadable import Kind, RefusedReadError

log = logging.getLogger("cdc.consumer")

_SEQ, _SIZE = attrgetter("change.seq"), attrgetter("change.size")
_now = time.monotonic
"""The event loop's clock."""
_UNMARKED_S = 1.0
"""Until the next read, while a rejected change cannot be made a dead letter."""


class _Looks:
    """When barriers are looked at. ``at``: next. Soon where one has kept a change from starting; later and later, where
    not: they may be of types that nobody handles."""

    def __init__(self, interval_s: float) -> None:
        self.at = 0.0
        self._looked_at = -inf
        self._interval_s = interval_s
        self._pause_s = REPASS_MAX_S

    def looked(self, now: float, *, left: bool) -> None:
        """``left``: there are some."""
        self._looked_at = now
        self.at = now + (self._pause_s if left else self._interval_s)
        self._pause_s = min(2 * self._pause_s, self._interval_s)

    def barred(self) -> None:
        """A change was kept from starting. One look is for all types, and each of them is read again so often."""
        self.at = min(self.at, self._looked_at + REPASS_MAX_S)
        self._pause_s = REPASS_MAX_S


class Reader:
    """``pauses`` tells whether a dead letter blocks its key. Times in seconds."""

    def __init__(
        self,
        scheduler: KeyScheduler,
        planner: ReadPlanner,
        store: Store,
        barriers: Barriers,
        metrics: Metrics,
        *,
        pauses: Callable[[Kind | None], bool] = lambda kind: False,
        sweep_interval_s: float,
        poll_interval_s: float,
    ) -> None:
        self._scheduler = scheduler
        self._planner = planner
        self._store = store
        self._barriers = barriers
        self._looks = _Looks(sweep_interval_s)
        self._metrics = metrics
        self._pauses = pauses
        self._due = DueReads(
            scheduler.room_for, sweep_interval_s=sweep_interval_s, poll_interval_s=poll_interval_s,
            holds=scheduler.held.holds,
        )  # fmt: skip
        self._paging = PageSize()
        self.next = NextRead(scheduler, planner, self._due, self._paging)
        self._unmarked: set[UUID] = set()
        """The changes that were rejected last and are no dead letters yet."""
        self._rests_until = 0.0
        self._delay = Delay()

    def restart(self) -> None:
        """Read the whole outbox again."""
        self._store.doubt()
        self.next.restart(_now())

    def due_within(self, seconds: float) -> None:
        """Read waiting changes after this many seconds at the latest."""
        self._store.doubt()
        self._due.within(seconds, _now())

    @property
    def delayed_since(self) -> float | None:
        """Since when nothing can be read, by the event loop's clock."""
        return self._delay.since

    def wait_s(self, *, read: bool = False) -> float:
        """Seconds for which there is nothing to read, unless a wake-up comes or room is freed (``next.wants_room``).

        ``read``: there was something at the last time, so there may be more.
        """
        now = _now()
        wait_s = self.next.wait_s(now, read=read)
        return wait_s if wait_s == inf or now >= self._rests_until else self._rests_until - now

    async def once(self, reader: psycopg.AsyncConnection, session: ShardSession) -> bool:
        """Read once. False: there is nothing to read, or no room for it.

        A change that the server refuses to hand over becomes a dead letter, on the session that holds its shard.
        """
        now = _now()
        if now < self._rests_until:
            return False
        try:
            if now >= self._looks.at:
                self._looks.looked(now, left=await self._barriers.advance(reader))
            try:
                with self._scheduler.reading:
                    read = self.next.next(now)
                    if read is None:
                        return False
                    match read:
                        case Fetch():
                            await self._fetch(reader, read, now)
                        case Sweep():
                            await self._sweep(reader, read, now)
                        case KeyReads():
                            await self._read_keys(reader, read, now)
                        case DueRead():
                            await self._read_due(reader, read)
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

    async def _read_keys(self, reader: psycopg.AsyncConnection, read: KeyReads, began: float) -> None:
        found = await self._store.read_keys(reader, read.keys, read.per_key)
        self._paging.read([row.change.size for of_key, _ in found.values() for row in of_key])
        for request, (of_key, cut) in found.items():
            complete = len(of_key) < read.per_key and not cut
            if (admitted := self._scheduler.admit_key_read(request, of_key, complete=complete)).rejected:
                self._rejected(admitted, began)

    async def _read_due(self, reader: psycopg.AsyncConnection, read: DueRead) -> None:
        active, in_window = self._scheduler.ownership.active, self._scheduler.requeued()
        start = FIRST_TYPE if read.start is None else read.start
        found = await self._store.due(reader, active, read.limit, read.without, start=start, in_window=in_window)
        self._paging.read(list(map(_SIZE, found.rows)))
        admitted = self._scheduler.admit(found.rows, due=True)
        if admitted.barred:
            self._looks.barred()
        self._metrics.wakeups.received.labels("retry").inc(admitted.taken)
        self._due.done(
            _now(), rejected=admitted.rejected, next_due_s=found.next_due_s, go_on=found.go_on, more=found.more
        )

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
            self._rejected(admitted, now)
        if found.late or found.given_up:
            self._metrics.outbox.visibility_retries.labels("found").inc(found.late)
            self._metrics.outbox.visibility_retries.labels("left_to_sweep").inc(found.given_up)

    async def _sweep(self, reader: psycopg.AsyncConnection, sweep: Sweep, began: float) -> None:
        failpoints.here("fetch.before_rows")
        page = await self._store.sweep(reader, sweep)
        now = self._measure(page, began)
        admitted = self._scheduler.admit(page.rows)
        if admitted.barred:
            self._looks.barred()
        seen = [(row.change.seq, row.change.shard) for row in page.rows]
        notified = self._planner.swept(sweep, seen, admitted.rejected, page.snapshot, now, scanned=page.scanned)
        self._metrics.wakeups.received.labels("sweep").inc(max(0, admitted.taken - notified))

    def _rejected(self, admitted: Admitted, now: float) -> None:
        self._planner.throttle(admitted.rejected, now)
        if admitted.barred:
            self._looks.barred()

    def _measure(self, page: OutboxPage, began: float) -> float:
        """A page has come. Returns the time."""
        self._paging.read(list(map(_SIZE, page.rows)))
        now = _now()
        self._metrics.outbox.fetch_duration.observe(now - began)
        self._metrics.outbox.fetch_changes.observe(len(page.rows))
        return now
