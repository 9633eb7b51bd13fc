"""Writes outcomes to the table, and handles rejected writes. ``settle_queue`` says what is written next.

    handler ends ──put──► scheduler.finished ──► queue ──written──► scheduler.settled ──► ``settled``

The SQLSTATE says what a rejected write is about. If it is one row, the batch is halved until that row is alone:
it becomes a dead letter with the server's message. If it is a temporary obstacle, the outcomes are kept and tried
again, and no handler is called again for them; locked rows are skipped meanwhile. Anything else ends the
session.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

import psycopg

from cdc.core.attempts import UNMARKABLE, FailedAttempt
from cdc.core.delay import Delay
from cdc.core.model import Change, Coalesced, Committed, Dead, Outcome, Unmarkable, Waiting
from cdc.core.read_reconciler import Settlement
from cdc.core.scheduler import KeyScheduler
from cdc.core.settle_queue import SettleQueue
from cdc.core.shard_ownership import Acquired
from cdc.core.sqlstate import About, about
from cdc.observability.metrics import OutboxMetrics
from cdc.postgres.outbox import Store
from cdc.postgres.pages import Settled
from cdc.postgres.shard_locks import ShardSession
from cdc.runtime.moving_timer import MovingTimer, TimedEvent

log = logging.getLogger("cdc.consumer")

_BATCH_MAX = 1_000
_PAUSE_S = 0.020
"""From the beginning of a settle to that of the next: what ends meanwhile shares a statement and a flush, which
the stream reads, too. A process that is killed runs again what ended in so long."""
_ROWS_MAX = 10_000
"""Of one settle, where outcomes stand for several changes; one such outcome alone may be for as many."""
_ITERATION_MAX_S = 5.0
_LOCKED_S = 0.5
"""Until a locked row is tried again."""
_REFUSED_S = 60.0
"""The same for a row that cannot even be made a dead letter."""
_ASK_AFTER_S = 0.3
"""A settle that takes as long waits for another session; lock_timeout ends it later than that."""
_WORDS_MAX = 500

_now = time.monotonic
"""The event loop's clock."""

_BLOCKERS = """
SELECT pid, coalesce(activity.application_name, '') FROM unnest(pg_blocking_pids(%s)) AS pid
LEFT JOIN pg_stat_activity AS activity USING (pid)
"""


class _Iterated(Protocol):
    def __call__(self, *, answered: bool = False) -> None: ...


class Settler:
    """``put`` takes the outcomes of changes that were started, ``run`` writes them. Times are the event loop's.

    ``committed``: called with what handlers' own transactions have marked. ``settled``: called after each settle, and
    after the scheduler, with what is in the table by then. ``iterated``: called in each iteration of ``run``;
    ``answered``: the server has.
    """

    def __init__(
        self,
        scheduler: KeyScheduler,
        store: Store,
        metrics: OutboxMetrics,
        *,
        committed: Callable[[Sequence[tuple[Change, Committed]]], None],
        settled: Callable[[Sequence[Settlement], Settled], None],
        iterated: _Iterated,
    ) -> None:
        self._scheduler = scheduler
        self._store = store
        self._metrics = metrics
        self._committed = committed
        self._settled = settled
        self._iterated = iterated
        self._queue = SettleQueue()
        self._due = TimedEvent()
        self._again = TimedEvent()
        self._finishing = False
        self._around_locks = False
        self._pauses_until = 0.0
        self._hurried = False
        self._delay = Delay()
        self._blockers = _Blockers()

    @property
    def held_up_since(self) -> float | None:
        """Since when some outcome cannot be written."""
        return self._delay.since

    @property
    def parked(self) -> Collection[int]:
        """The shards of outcomes that wait, since the session was lost, for this consumer to own them again."""
        return self._queue.parked

    def put(self, batch: Sequence[Settlement]) -> None:
        """The handlers of these started changes ended; those of a key stand in ``seq`` order."""
        to_settle = self._scheduler.finished(batch)
        if to_settle:
            self._queue.add(*to_settle)
            self._due.set()
            if self._queue.ready >= self._scheduler.worth:
                self._again.set()
        if len(to_settle) < len(batch) and (
            committed := [(change, outcome) for change, outcome in batch if isinstance(outcome, Committed)]
        ):
            self._committed(committed)

    def acquired(self, acquired: Acquired) -> None:
        """Write what finished before the session was lost, in shards that no other consumer has had meanwhile."""
        self._queue.unpark(acquired.kept)
        self._due.set()
        self.drop(acquired.shards)

    def revoked(self, shards: Collection[int]) -> None:
        """What has finished of them is written as usual."""

    def lost(self) -> None:
        self._scheduler.keep(self._queue.park())

    def drop(self, shards: Iterable[int]) -> None:
        """Another consumer has, or had, these: what finished of them before the session was lost is not written."""
        self._scheduler.dropped(self._queue.drop(shards))

    def hurry(self) -> None:
        """Something waits for what has ended to be in the table: the next settle is not put off."""
        self._hurried = True
        self._again.set()

    def finish(self) -> None:
        """No more outcomes will come: ``run`` returns when all are written."""
        self._finishing = True
        self._due.set()
        self.hurry()

    async def run(self, session: ShardSession, reader: psycopg.AsyncConnection) -> None:
        """Write outcomes on this session until ``finish``. Raises errors that are about the session."""
        try:
            while not self._finishing or self._queue:
                self._iterated()
                self._due.clear()
                self._hurried = False
                now = _now()
                if now >= self._delay.until and (batch := self._queue.take(_BATCH_MAX, now)):
                    if self._scheduler.coalesces and len(batch) > 1 and sum(map(_rows, batch)) > _ROWS_MAX:
                        self._queue.split(batch)
                        continue
                    now = await self._settle(session, reader, batch, now)
                if not self._finishing or self._queue:
                    held_s = max(self._delay.until - now, self._queue.wait_s(now))
                    await self._due.wait_within(min(_ITERATION_MAX_S, held_s))
                    if _now() < self._pauses_until:
                        await self._pause()
        finally:
            self._due.close()
            self._again.close()
            await self._blockers.end()

    async def _pause(self) -> None:
        """Unless there is enough for the next settle, wait: what ends meanwhile shares it."""
        if not self._hurried and self._queue.ready < self._scheduler.worth:
            self._again.clear()
            await self._again.wait_within(self._pauses_until - _now())

    async def _settle(
        self, session: ShardSession, reader: psycopg.AsyncConnection, batch: list[Settlement], began: float
    ) -> float:
        """Returns the time. Raises errors that are about the session."""
        found = await self._write(session, reader, batch)
        now = _now()
        self._pauses_until = began + _PAUSE_S
        self._iterated(answered=True)
        if found:
            self._metrics.settle_duration.observe(now - began)
            self._metrics.settle_changes.observe(len(batch))
            done = self._queue.written(batch)
            self._scheduler.settled(done)
            if self._delay.since is not None and not self._queue.holds:
                self._log_end_of_delay(now)
            self._settled(done, found)
        return now

    async def _write(
        self, session: ShardSession, reader: psycopg.AsyncConnection, batch: list[Settlement]
    ) -> Settled | None:
        """None: nothing could be written yet."""
        self._blockers.settle_began(session, reader)
        try:
            async with session.writing:
                settled = await self._store.settle(
                    session.connection,
                    batch,
                    maybe_written=self._queue.maybe_written,
                    around_locks=self._around_locks,
                )
        except psycopg.Error as error:
            self._refused(session.connection, batch, error)
            return None
        finally:
            self._blockers.settle = None
        if self._delay.since is not None:
            self._delay.advanced()
        if settled.locked:
            self._metrics.settle_delayed.inc(len(settled.locked))
            self._queue.put_back(settled.locked, _now() + _LOCKED_S)
            if self._delay.reports(_now()):
                self._log_delay(settled.locked, "a row is locked")
        return settled

    def _log_end_of_delay(self, now: float) -> None:
        if (delayed_s := self._delay.done(now)) is not None:
            log.info("all marks are written again, after %.1f s", delayed_s)
        self._around_locks = False
        self._blockers.words = ""

    def _refused(self, connection: psycopg.AsyncConnection, batch: list[Settlement], error: psycopg.Error) -> None:
        subject = about(None if connection.closed else error.sqlstate)
        if subject is About.SESSION:
            raise error
        if subject is About.ROW:
            self._isolate(batch, error)
            return
        self._queue.again(batch)
        if error.sqlstate == "55P03" and not self._around_locks:
            self._around_locks = True  # the next try is at once, and skips whatever row is locked
            self._delay.begin(_now())
            return
        self._metrics.settle_delayed.inc(len(batch))
        if self._delay.failed(_now()):
            self._log_delay(batch, f"{error.diag.message_primary} [{error.sqlstate}]")

    def _isolate(self, batch: list[Settlement], error: psycopg.Error) -> None:
        if len(batch) > 1:
            self._queue.split(batch)
            return
        [finished] = batch
        change, outcome = finished
        if isinstance(outcome, Unmarkable):
            self._queue.put_back(batch, _now() + _REFUSED_S)
            if self._delay.reports(_now()):
                self._log_delay(batch, f"the table refuses even a dead letter [{error.sqlstate}]")
            return
        self._metrics.rows_refused.labels("mark").inc()
        log.error(
            "the database refuses the mark of change %s of %s: %s [%s]; now a dead letter, its last_error says more",
            change.id, change.entity_type, type(error).__name__, error.sqlstate,
        )  # fmt: skip
        self._queue.becomes(Settlement(change, _unmarkable(outcome, error)))

    def _log_delay(self, batch: Sequence[Settlement], why: str) -> None:
        first = batch[0].change
        log.warning(
            "the marks of %d changes are delayed, the first is %s of %s: %s%s; they are kept, and no handler is called"
            " again for them",
            len(batch), first.id, first.entity_type, why, self._blockers.words,
        )  # fmt: skip


class _Blockers:
    """Which sessions a settle waits for; another session is asked. ``words`` say it to the log."""

    def __init__(self) -> None:
        self.words = ""
        self.settle: tuple[ShardSession, psycopg.AsyncConnection] | None = None
        """The sessions of the one that is under way."""
        self._timer = MovingTimer(self._ask_in_a_task)
        self._query: asyncio.Task[None] | None = None

    def settle_began(self, session: ShardSession, reader: psycopg.AsyncConnection) -> None:
        self.settle = session, reader
        self._timer.set(asyncio.get_running_loop(), _ASK_AFTER_S)

    def _ask_in_a_task(self) -> None:
        if self.settle and (self._query is None or self._query.done()):
            session, reader = self.settle
            self._query = asyncio.create_task(self._ask(session.connection.info.backend_pid, reader))

    async def _ask(self, pid: int, reader: psycopg.AsyncConnection) -> None:
        try:
            found = await (await reader.execute(_BLOCKERS, [pid])).fetchall()
        except (psycopg.Error, OSError):
            return  # the log then does without the names
        if found:
            self.words = "; blocked by: " + ", ".join(f"pid {one} ({name or 'no name'})" for one, name in found[:5])

    async def end(self) -> None:
        self._timer.close()
        if self._query:
            self._query.cancel()
            await asyncio.wait([self._query])


def _rows(finished: Settlement) -> int:
    outcome = finished.outcome
    return outcome.change.coalesced if isinstance(outcome, Coalesced) else 1


def _unmarkable(outcome: Outcome, error: psycopg.Error) -> Unmarkable:
    """In ASCII, which every encoding of a server holds."""
    words = f"{error.diag.message_primary} [{error.sqlstate}]".replace("\0", "")
    words = words.encode("ascii", "backslashreplace").decode()[:_WORDS_MAX]
    if isinstance(outcome, Coalesced):
        outcome = outcome.outcome
    failed = outcome.attempt if isinstance(outcome, Waiting | Dead) else None
    done = "its handler failed, and" if isinstance(outcome, Dead) or outcome.blocks_key else "its handler returned, but"
    return Unmarkable(
        f"{done} the database refused the mark: {words}",
        isinstance(outcome, Dead) and outcome.pauses,
        f"{done} the database refused the mark [{error.sqlstate}]",
        FailedAttempt(failed.handler if failed else None, UNMARKABLE, type(error).__name__, words, time.monotonic()),
    )
