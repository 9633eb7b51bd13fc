"""The consumer's loops: wake-ups -> intake -> reads -> lanes -> handlers -> settle.

    intake loop    reads what ``Intake`` and ``Lanes`` ask for on the reader's connection, and hands it to the lanes
    workers        run the handlers of what the lanes let start
    settle loop    writes what finished, in batches, on the session that holds the shard locks
    shard loop     looks after membership and fair share on the same session

All of it runs on one event loop, so that the pure parts need no locks; other threads reach it through
``call_soon_threadsafe`` alone. A lost connection ends the *term*: the lanes are reset, handlers that can be cut off
are, and a new term begins with new connections and a sweep.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import psycopg

from cdc import probe
from cdc.connect import connect_async
from cdc.errors import CdcError, SchemaError
from cdc.hooks import Hooks, where
from cdc.intake import Fetch, Intake, Sweep
from cdc.lanes import Finished, Lanes, Resume
from cdc.metrics import Metrics
from cdc.model import SHARDS, Change, Committed, Outcome, Processed, Waiting, WakeUp
from cdc.outbox.shards import Session
from cdc.outbox.store import INDEXED, Page, Store
from cdc.runner import Runner
from cdc.shares import balance
from cdc.workers import Workers

log = logging.getLogger("cdc.consumer")

_SETTLE_MAX = 1_000
_RESUMES_MAX = 20
_LOOK_AT_SHARDS_S = 1.0
_RECONNECT_MIN_S, _RECONNECT_MAX_S = 0.1, 10.0
_SWEEP_ROOM_MIN = 64
"""One row for each shard: no page is so small that some shards are left out of it."""
_TURN_AT_LEAST_S = 5.0
_LAST_SETTLE_S = 3.0
"""A commit may hang for as long as a synchronous standby is away; a stop may not."""
_INTERRUPTIONS = (CdcError, psycopg.Error, OSError)  # TimeoutError is an OSError


@dataclass(frozen=True, slots=True)
class ConsumerSettings:
    """Durations in seconds. ``window`` and ``concurrency`` count changes."""

    dsn: str | None
    schema: str
    concurrency: int
    window: int
    drain_time_s: float
    sweep_interval_s: float
    poll_interval_s: float


class Consumer:
    """One consumer. ``run`` returns when ``stop`` was called and what ran has been drained."""

    def __init__(
        self, settings: ConsumerSettings, *, runner: Runner, store: Store, hooks: Hooks, metrics: Metrics
    ) -> None:
        self._settings = settings
        self._store = store
        self._hooks = hooks
        self._metrics = metrics
        self._lanes = Lanes(settings.window, fenced=runner.fenced)
        self._intake = Intake(sweep_interval_s=settings.poll_interval_s)
        self._sweep_room = min(settings.window, max(_SWEEP_ROOM_MIN, settings.window // 4))
        self._stopping = asyncio.Event()
        self._read_due = asyncio.Event()
        self._settle_due = asyncio.Event()
        self._workers = Workers(
            self._lanes, runner, settings.concurrency, finished=self._finished, read_anew=self._read_due.set
        )
        self._owned: set[int] = set()
        self._next_due_at = 0.0
        self._restart_due = False
        self._drained = False
        # Written here, read by the health thread: times of the event loop's clock.
        self.turned: dict[str, float] = {}
        self.answered_at: float | None = None
        self.in_service = False
        self.connected = asyncio.Event()
        """Set at the first connection and never unset: from then on trouble is waited out."""

    # --- from outside, on the event loop ---------------------------------------------------------------------------

    def stop(self) -> None:
        """Hand out nothing more, give what runs its drain time, settle, leave."""
        self._stopping.set()

    @property
    def shares(self) -> bool:
        """Some shards are not ours."""
        return len(self._owned) < SHARDS

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def rang(self, wakeups: Sequence[WakeUp]) -> Sequence[WakeUp]:
        """Wake-ups have come in. Returns those that are other consumers' business."""
        ours, others = wakeups, list[WakeUp]()
        if self.shares:
            ours = [wakeup for wakeup in wakeups if wakeup.shard in self._owned]
            others = [wakeup for wakeup in wakeups if wakeup.shard not in self._owned]
        if dropped := self._intake.rung(ours):
            self._metrics.wakeups_dropped.inc(dropped)
        if ours:
            self._read_due.set()
        return others

    def sweep_now(self) -> None:
        """The table changed without a wake-up for each row: look at everything again."""
        self._restart_due = True
        self._next_due_at = 0.0
        self._read_due.set()

    def missed(self) -> None:
        """Wake-ups were lost."""
        self._intake.lost()
        self._read_due.set()

    def streaming(self, *, connected: bool) -> None:
        """This process's stream has begun, and what rang before may be lost; or it has ended."""
        interval_s = self._settings.sweep_interval_s if connected else self._settings.poll_interval_s
        self._intake.interval(interval_s, self._now())
        self._intake.streaming(connected=connected)
        self._read_due.set()

    def show_figures(self) -> None:
        """Bring the gauges up to date."""
        lanes, metrics = self._lanes, self._metrics
        metrics.show_lanes(running=lanes.running, queued=lanes.queued, settling=lanes.settling)
        metrics.wakeup_queue_length.set(self._intake.queue_length)

    # --- terms -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until stopped. Raises the error when the very first connection is refused."""
        hooks = asyncio.create_task(self._hooks.run())
        pause_s = _RECONNECT_MIN_S
        try:
            while not self.stopping:
                began = self._now()
                error = await self._term_failure()
                if error and not self.connected.is_set():
                    raise error
                if error and not self.stopping:
                    log.warning("interrupted: %s; trying again", _sentence(error))
                    pause_s = _RECONNECT_MIN_S if self._now() - began > _RECONNECT_MAX_S else pause_s * 2
                    await _wait(self._stopping, min(pause_s, _RECONNECT_MAX_S))
            await self._hooks.drain(self._settings.drain_time_s)
        finally:
            hooks.cancel()
            await asyncio.wait([hooks])

    async def _term_failure(self) -> Exception | None:
        """Work one term. What ended it if that heals by itself or by an operator; anything else is raised: a bug."""
        try:
            await self._term()
        except ExceptionGroup as group:
            expected, bugs = group.split(_INTERRUPTIONS)
            if bugs or not expected:
                log.critical("stopped by a bug: %s", where(_first(bugs or group)))
                raise
            return _first(expected)
        except _INTERRUPTIONS as error:
            return error
        return None

    async def _term(self) -> None:
        """Work with one set of connections until one of them fails or the consumer is stopped."""
        async with self._connections() as (session, reader):
            try:
                async with asyncio.TaskGroup() as loops:
                    readers = [
                        loops.create_task(self._shard_loop(session)),
                        loops.create_task(self._intake_loop(session, reader)),
                    ]
                    settling = loops.create_task(self._settle_loop(session))
                    loops.create_task(self._drain_at_stop(readers, settling))
            finally:
                await self._end_term()

    @contextlib.asynccontextmanager
    async def _connections(self) -> AsyncIterator[tuple[Session, psycopg.AsyncConnection]]:
        dsn, schema = self._settings.dsn, self._settings.schema
        session = await Session.open(dsn, schema, INDEXED)
        try:
            reader = await connect_async(
                dsn, application_name="cdc: reader", session={**INDEXED, "statement_timeout": "60s"}
            )
            async with reader:
                self.connected.set()
                await self._wait_for_schema(reader)
                self.in_service = True
                yield session, reader
        finally:
            self.in_service = False
            await session.close()

    async def _wait_for_schema(self, reader: psycopg.AsyncConnection) -> None:
        """A sidecar starts before the application's migrations have run: wait, and say for what."""
        told = ""
        while not self.stopping:
            self._turn("consumer")
            self._answered()
            try:
                await self._store.check(reader)
            except SchemaError as error:
                if told != str(error):
                    log.warning("waiting: %s", _sentence(error))
                told = str(error)
                await _wait(self._stopping, _LOOK_AT_SHARDS_S)
            else:
                return

    async def _drain_at_stop(self, readers: Sequence[asyncio.Task[None]], settling: asyncio.Task[None]) -> None:
        await self._stopping.wait()
        await self._workers.drain(self._settings.drain_time_s)
        self._drained = True
        self._settle_due.set()
        for loop in readers:
            loop.cancel()
        await asyncio.wait([settling], timeout=_LAST_SETTLE_S)
        if not settling.done():
            log.warning("what was done last could not be settled within %g s; it may run again", _LAST_SETTLE_S)
            settling.cancel()

    async def _end_term(self) -> None:
        """The locks are gone, or about to be: forget what was queued and cut off what can be."""
        if self._owned and not self.stopping:
            self._metrics.shard_moves.labels("lost").inc(len(self._owned))
        self._lanes.reset()
        self._intake.disown(self._owned)
        self._own(set())
        self._next_due_at = 0.0
        await self._workers.session_lost()

    # --- shards ----------------------------------------------------------------------------------------------------

    async def _shard_loop(self, session: Session) -> None:
        while not self.stopping:
            self._turn("shards")
            await self._balance(session)
            self._answered()
            await _wait(self._stopping, _LOOK_AT_SHARDS_S)

    async def _balance(self, session: Session) -> None:
        before = len(self._owned)
        members, free = await session.look()
        self._metrics.members.set(members)
        move = balance(members, self._owned, free)
        if move.take and (taken := await session.take(move.take)):
            self._lanes.own(taken)
            self._intake.own(taken)
            self._own(self._owned.union(taken))
            self._metrics.shard_moves.labels("acquired").inc(len(taken))
            self._next_due_at = 0.0
            self._read_due.set()
        self._lanes.release(move.give)
        self._intake.disown(move.give)
        if quiet := self._lanes.released():
            await session.give(quiet)
            self._own(self._owned - quiet)
            self._metrics.shard_moves.labels("released").inc(len(quiet))
        if len(self._owned) != before:
            log.info("owns %d of %d shards; consumers: %d", len(self._owned), SHARDS, members)

    def _own(self, shards: set[int]) -> None:
        self._owned = shards
        self._metrics.shards_owned.set(len(shards))

    # --- intake ----------------------------------------------------------------------------------------------------

    async def _intake_loop(self, session: Session, reader: psycopg.AsyncConnection) -> None:
        while not self.stopping:
            self._turn("consumer")
            self._read_due.clear()
            while not self.stopping and await self._read(reader):
                self._turn("consumer")
                self._answered()
                if session.stirred and not self._lanes.settling:
                    await session.look()  # whoever ends the session takes our shards: ask before handing out more
                probe.here("fetch.after_rows")
                self._workers.hand_out()
            await _wait(self._read_due, self._idle_s())

    def _idle_s(self) -> float:
        """How long there is nothing to read, wake-ups and freed room aside (both set ``_read_due``)."""
        if self._lanes.room < self._sweep_room or not self._owned:
            return _TURN_AT_LEAST_S
        now = self._now()
        return min(self._intake.wait_s(now), max(0.0, self._next_due_at - now), _TURN_AT_LEAST_S)

    async def _read(self, reader: psycopg.AsyncConnection) -> bool:
        """Read once, what is most urgent. False: there is nothing to read, or no room for it."""
        now, room = self._now(), self._lanes.room
        if room <= 0:
            return False
        with self._lanes.reading():
            if resumes := self._lanes.resumes(min(_RESUMES_MAX, room)):
                await self._resume(reader, resumes, max(1, room // len(resumes)))
            elif self._owned and now >= self._next_due_at and room >= self._sweep_room:
                await self._due(reader)
            else:
                return await self._read_intake(reader, room)
        return True

    async def _read_intake(self, reader: psycopg.AsyncConnection, room: int) -> bool:
        now = self._now()
        if self._restart_due or self._intake.full_pass_due(now):
            # Here, where no read is under way: its answer would pass the marks that are forgotten now.
            self._restart_due = False
            self._lanes.forget_unread(self._intake.restart())
        match self._intake.next(now, room, self._sweep_room):
            case Fetch() as fetch:
                await self._fetch(reader, fetch)
            case Sweep() as sweep:
                await self._sweep(reader, sweep)
            case None:
                return False
        return True

    async def _fetch(self, reader: psycopg.AsyncConnection, fetch: Fetch) -> None:
        page = await self._timed(self._store.fetch(reader, fetch.wakeups))
        admitted = self._lanes.admit(page.rows)
        found = self._intake.fetched(fetch, {row.change.seq for row in page.rows}, page.snapshot, self._now())
        self._intake.refused(admitted.refused, self._now())
        self._metrics.visibility_retries.labels("found").inc(found.late)
        self._metrics.visibility_retries.labels("left_to_sweep").inc(found.given_up)

    async def _sweep(self, reader: psycopg.AsyncConnection, sweep: Sweep) -> None:
        page = await self._timed(self._store.sweep(reader, sweep.positions, sweep.per_shard))
        admitted = self._lanes.admit(page.rows)
        seen = [WakeUp(row.change.seq, row.change.shard) for row in page.rows]
        rung = self._intake.swept(sweep, seen, admitted.refused, page.snapshot, self._now())
        self._metrics.wakeups.labels("sweep").inc(max(0, admitted.taken - rung))

    async def _resume(self, reader: psycopg.AsyncConnection, resumes: Sequence[Resume], per_key: int) -> None:
        for resume, rows in (await self._store.resume(reader, resumes, per_key)).items():
            self._lanes.resumed(resume, rows, complete=len(rows) < per_key)

    async def _due(self, reader: psycopg.AsyncConnection) -> None:
        # What is in the lanes is due as well until it is settled: a page of a whole window always reaches beyond it.
        rows, next_due_s = await self._store.due(reader, self._owned, self._settings.window)
        admitted = self._lanes.admit(rows, due=True)
        self._metrics.wakeups.labels("retry").inc(admitted.taken)
        pause_s = self._settings.sweep_interval_s if next_due_s is None else next_due_s
        if admitted.refused:
            pause_s = self._settings.poll_interval_s
        self._next_due_at = self._now() + min(pause_s, self._settings.sweep_interval_s)

    async def _timed(self, read: Awaitable[Page]) -> Page:
        started = self._now()
        page = await read
        self._metrics.fetch_duration.observe(self._now() - started)
        self._metrics.fetch_changes.observe(len(page.rows))
        return page

    # --- settle ----------------------------------------------------------------------------------------------------

    async def _settle_loop(self, session: Session) -> None:
        while True:
            self._turn("settle")
            self._settle_due.clear()
            while batch := self._lanes.take_finished(_SETTLE_MAX):
                self._turn("settle")
                await self._settle(session, batch)
            if self._drained:
                return
            await _wait(self._settle_due, _TURN_AT_LEAST_S)

    async def _settle(self, session: Session, batch: Sequence[Finished]) -> None:
        started = self._now()
        settled = await self._store.settle(session.connection, batch)
        self._metrics.settle_duration.observe(self._now() - started)
        self._metrics.settle_changes.observe(len(batch))
        self._metrics.settle_skipped.inc(settled.missed)
        self._answered()
        self._lanes.settled(batch)
        self._tell(batch, settled.at)
        self._workers.hand_out()
        self._read_due.set()

    def _finished(self, change: Change, outcome: Outcome) -> None:
        if isinstance(outcome, Committed):
            self._processed(change, outcome.at)
            self._read_due.set()
        else:
            self._settle_due.set()

    def _tell(self, batch: Iterable[Finished], settled_at: datetime) -> None:
        for change, outcome in batch:
            if change.requeued:
                self._next_due_at = 0.0  # it may have held back another one that is due
            match outcome:
                case Processed():
                    self._processed(change, settled_at)
                case Waiting(delay_s):
                    self._next_due_at = min(self._next_due_at, self._now() + delay_s)

    def _processed(self, change: Change, at: datetime) -> None:
        self._metrics.took(change.entity_type, (at - change.changed_at).total_seconds())
        self._hooks.processed(change)

    # --- small things ----------------------------------------------------------------------------------------------

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _turn(self, loop: str) -> None:
        self.turned[loop] = self._now()

    def _answered(self) -> None:
        self.answered_at = self._now()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Until the event is set or the time is up."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _first(group: ExceptionGroup[Exception]) -> Exception:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error


def _sentence(error: Exception) -> str:
    """What happened, without row content: a server's DETAIL may quote it, its primary message does not."""
    if isinstance(error, CdcError):
        return f"{error} ({error.hint})" if error.hint else str(error)
    if isinstance(error, psycopg.Error) and error.diag.message_primary:
        return f"{error.diag.message_primary} [{error.sqlstate}]"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
