"""Reads changes from the outbox, one read after the other, and hands them to the scheduler.

Three kinds of reads take turns, so that none can delay another for long: keys to be read on, waiting changes that are
due, and what ``ReadPlanner`` plans. All of it runs on the event loop; no two reads are under way at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from math import inf
from uuid import UUID

import psycopg

from cdc.core import failpoints
from cdc.core.delay import Delay
from cdc.core.page_size import PageSize
from cdc.core.read_planner import Fetch, ReadPlanner, Sweep
from cdc.core.scheduler import KeyScheduler, Row
from cdc.core.sqlstate import About, about, passes
from cdc.observability.metrics import Metrics
from cdc.postgres.outbox import FIRST_TYPE, Store
from cdc.postgres.pages import OutboxPage
from cdc.postgres.shard_locks import ShardSession
from cdc.postgres.unreadable import Kind, RefusedReadError

log = logging.getLogger("cdc.consumer")

_KEY_READS_MAX = 20
_UNMARKED_S = 1.0
"""Until the next read, while a rejected change cannot be made a dead letter."""
_REST, _REST_MAX_S = 4, 1.0
"""The pause between two reads of due changes, in times as long as the first one took; up to a limit, since that
may include a time in which this process was stopped, or the table locked."""

_Kind = Callable[[psycopg.AsyncConnection, int], Awaitable[bool]]


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
        self._sweep_interval_s = sweep_interval_s
        self._poll_interval_s = poll_interval_s
        self._paging = PageSize()
        self._kinds = deque[_Kind]((self._read_on, self._read_due, self._read_planned))
        """In the order of their last turns, the latest last."""
        self._unmarked: set[UUID] = set()
        """The changes that were rejected last and are no dead letters yet."""
        self._rests_until = 0.0
        self._delay = Delay()
        self._restart_due = False
        self._next_due_at = self._due_rests_until = self._due_looked_at = 0.0
        self._due_from = FIRST_TYPE
        """Where the next read of due changes goes on, if the last one has not reached all waiting types."""
        self._due_after = inf
        """When the next change of the types read so far will be due."""
        self._left_out: tuple[str, ...] = ()
        """Types that had no room at the last read of due changes."""

    def restart(self) -> None:
        """Read the whole outbox again."""
        self._restart_due = True
        self.due_within(0.0)

    def due_within(self, seconds: float) -> None:
        """Read waiting changes after this many seconds at the latest."""
        self._next_due_at = min(self._next_due_at, _now() + seconds)

    @property
    def delayed_since(self) -> float | None:
        """Since when nothing can be read, by the event loop's clock."""
        return self._delay.since

    def wait_s(self) -> float:
        """Seconds for which there is nothing to read, unless a wake-up comes or room is freed."""
        if not self._may_read:
            return inf
        now = _now()
        if now < self._rests_until:
            return self._rests_until - now
        return min(self._planner.wait_s(now), max(0.0, self._due_at(now) - now))

    async def once(self, reader: psycopg.AsyncConnection, session: ShardSession) -> bool:
        """Read once. False: there is nothing to read, or no room for it.

        A change that the server refuses to hand over becomes a dead letter, on the session that holds its shard.
        """
        if not self._may_read or _now() < self._rests_until:
            return False
        try:
            try:
                with self._scheduler.reading():
                    read = await self._once(reader)
            except RefusedReadError as refused:
                await self._set_aside(reader, session, refused)
            else:
                if read and (delayed_s := self._delay.done(_now())) is not None:
                    log.info("changes are read again, after %.1f s", delayed_s)
                return read
        except psycopg.Error as error:
            self._delayed(reader, error)
        # The read brought nothing, and what asked for it is forgotten: wake-ups, and keys to be read on.
        self._planner.wakeups_lost()
        self.restart()
        return True

    async def _once(self, reader: psycopg.AsyncConnection) -> bool:
        for kind in tuple(self._kinds):
            try:
                read = await kind(reader, self._rows)
            except psycopg.Error:
                self._move_last(kind)
                raise
            if read:
                self._move_last(kind)
                return True
        return False

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

    def _move_last(self, kind: _Kind) -> None:
        self._kinds.remove(kind)
        self._kinds.append(kind)

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
        for seq, id_, words, _ in found:
            if id_ in marked:
                self._metrics.outbox.rows_refused.labels("read").inc()
                log.error("the database refuses to hand over change %d (%s): %s; now a dead letter", seq, id_, words)
            elif id_ not in self._unmarked:
                log.warning("change %d (%s) can be neither read nor marked now: %s; trying again", seq, id_, words)
        self._unmarked = {each.id for each in found} - marked
        if self._unmarked:
            self._rests_until = _now() + _UNMARKED_S

    @property
    def _may_read(self) -> bool:
        return self._scheduler.room > 0 and bool(self._scheduler.ownership.active)

    @property
    def _rows(self) -> int:
        """How many the next page may have: as many rows like the last ones as fit into the window."""
        places = 1 + self._paging.row_bytes // self._scheduler.place_bytes
        return max(1, min(self._scheduler.room // places, self._paging.rows))

    @property
    def _enough(self) -> int:
        """Room that is worth a page. Types with a backlog are throttled; of the rest any page brings few changes."""
        return 1 if self._planner.throttled else self._scheduler.worth

    async def _read_on(self, reader: psycopg.AsyncConnection, room: int) -> bool:
        key_reads = self._scheduler.key_reads(min(_KEY_READS_MAX, room))
        if not key_reads:
            return False
        per_key = max(1, min(room // len(key_reads), self._scheduler.key_capacity))
        found = await self._store.read_keys(reader, key_reads, per_key)
        self._weigh([row for rows, _ in found.values() for row in rows])
        for request, (rows, cut) in found.items():
            self._scheduler.admit_key_read(request, rows, complete=len(rows) < per_key and not cut)
        return True

    def _due_at(self, now: float) -> float:
        """When to read due changes."""
        at = self._next_due_at if self._due_from == FIRST_TYPE else now
        if any(free >= worth for free, worth in map(self._scheduler.room_for, self._left_out)):
            at = now
        at = max(at, self._due_rests_until)
        if self._scheduler.room < self._enough:
            at = max(at, self._due_looked_at + self._poll_interval_s)
        return at

    async def _read_due(self, reader: psycopg.AsyncConnection, _room: int) -> bool:
        began = _now()
        if began < self._due_at(began):
            return False
        # A type with little room would have the same rows read again and again; it gets that once an interval.
        long_ago = began - self._due_looked_at >= self._poll_interval_s
        rooms = {name: self._scheduler.room_for(name) for name in self._scheduler.types}
        without = tuple(name for name, room in rooms.items() if room.free < (1 if long_ago else room.worth))
        self._due_looked_at = began
        if self._due_from == FIRST_TYPE:
            self._next_due_at = inf  # what settles meanwhile may bring it forward, until all types were read
        # What is in the window is due as well until it is settled: a page has to reach beyond it.
        here = self._scheduler.queued + self._scheduler.running + self._scheduler.settling
        limit = min(self._scheduler.capacity, here + self._paging.rows)
        active, in_window = self._scheduler.ownership.active, self._scheduler.requeued()
        found = await self._store.due(reader, active, limit, without, start=self._due_from, in_window=in_window)
        self._weigh(found.rows)
        admitted = self._scheduler.admit(found.rows, due=True)
        self._metrics.wakeups.received.labels("retry").inc(admitted.taken)
        self._left_out = tuple({*without, *admitted.rejected})
        if found.more:
            self.due_within(0.0)
        now = _now()
        if found.next_due_s is not None:
            self._due_after = min(self._due_after, now + found.next_due_s)
        self._due_from = FIRST_TYPE if found.go_on is None else found.go_on
        if found.go_on is None:
            interval_s = self._poll_interval_s if self._left_out else self._sweep_interval_s
            self.due_within(min(self._due_after - now, interval_s))
            self._due_after = inf
        self._due_rests_until = now + min(_REST * (now - began), _REST_MAX_S)
        return True

    async def _read_planned(self, reader: psycopg.AsyncConnection, room: int) -> bool:
        now = _now()
        # Not during such a pass: restarted at each wake-up, it would never get beyond the first rows.
        if (self._restart_due and not self._planner.passing_from_zero) or self._planner.full_pass_due(now):
            # No read is under way here: its answer would overtake the watermarks that are forgotten here.
            self._restart_due = False
            self._scheduler.forget_deferred(self._planner.restart())
        # Large rows make small pages, which are worth reading if there is room for many.
        match self._planner.next(now, room, 1 if self._scheduler.room >= self._enough else room + 1):
            case Fetch() as fetch:
                await self._fetch(reader, fetch)
            case Sweep() as sweep:
                await self._sweep(reader, sweep)
            case None:
                return False
        return True

    async def _fetch(self, reader: psycopg.AsyncConnection, fetch: Fetch) -> None:
        page = await self._timed(self._store.fetch(reader, fetch.wakeups))
        throttled = self._planner.throttled
        if throttled:
            for row in page.rows:
                self._planner.skipped(row.change.entity_type, row.change.shard)
        admitted = self._scheduler.admit(page.rows, throttled=throttled)
        seen = page.others.union(row.change.seq for row in page.rows)
        found = self._planner.fetched(fetch, seen, page.snapshot, _now(), page.cut)
        self._planner.throttle(admitted.rejected, _now())
        if found.late or found.given_up:
            self._metrics.outbox.visibility_retries.labels("found").inc(found.late)
            self._metrics.outbox.visibility_retries.labels("left_to_sweep").inc(found.given_up)

    async def _sweep(self, reader: psycopg.AsyncConnection, sweep: Sweep) -> None:
        page = await self._timed(self._store.sweep(reader, sweep))
        admitted = self._scheduler.admit(page.rows)
        seen = [(row.change.seq, row.change.shard) for row in page.rows]
        notified = self._planner.swept(sweep, seen, admitted.rejected, page.snapshot, _now(), scanned=page.scanned)
        self._metrics.wakeups.received.labels("sweep").inc(max(0, admitted.taken - notified))

    def _weigh(self, rows: Sequence[Row]) -> None:
        self._paging.read(len(rows), sum(row.change.size for row in rows))

    async def _timed(self, read: Awaitable[OutboxPage]) -> OutboxPage:
        started = _now()
        failpoints.here("fetch.before_rows")
        page = await read
        self._weigh(page.rows)
        self._metrics.outbox.fetch_duration.observe(_now() - started)
        self._metrics.outbox.fetch_changes.observe(len(page.rows))
        return page


def _now() -> float:
    return asyncio.get_running_loop().time()
