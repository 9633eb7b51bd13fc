"""Writes outcomes to the table, and knows what a refusal means. ``marks`` says what is written next.

What the server refuses is told by its SQLSTATE. Where it is about one row, the batch is halved until that row is alone:
it becomes a dead letter with the server's words. Where something stands in the way, the outcomes are kept and tried
again, and no handler is called again for them; what somebody has locked is written around. Anything else ends the
session.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import psycopg

from cdc.core.model import Dead, Outcome, Unmarkable
from cdc.core.read_reconciler import Settlement
from cdc.core.scheduler import KeyScheduler
from cdc.core.sqlstate import About, about
from cdc.observability.metrics import OutboxMetrics
from cdc.postgres.outbox import Store
from cdc.postgres.pages import Settled
from cdc.postgres.shard_locks import Session

log = logging.getLogger("cdc.consumer")

_REST_MIN_S, _REST_MAX_S = 0.1, 2.0
"""Between two tries where nothing can be written."""
_LOCKED_S = 0.5
"""After so long a locked row is looked at again."""
_REFUSED_S = 60.0
"""The same for a row that cannot even be made a dead letter."""
_LOOK_AFTER_S = 0.3
"""A settle that takes as long waits for somebody; the session's lock_timeout ends it later than that."""
_TOLD_EVERY_S = 30.0
_WORDS_MAX = 500

_BLOCKERS = """
SELECT pid, coalesce(activity.application_name, '') FROM unnest(pg_blocking_pids(%s)) AS pid
LEFT JOIN pg_stat_activity AS activity USING (pid)
"""


class Settler:
    """``now`` is the event loop's clock."""

    def __init__(
        self, scheduler: KeyScheduler, store: Store, metrics: OutboxMetrics, *, now: Callable[[], float]
    ) -> None:
        self._scheduler = scheduler
        self._store = store
        self._metrics = metrics
        self._now = now
        self._around_locks = False
        self._rest_s = 0.0
        self._rests_until = 0.0
        self._told_at: float | None = None
        self._blockers = ""
        self._look: asyncio.Task[None] | None = None
        self.held_up_since: float | None = None
        """Since when some outcome cannot be written, by the event loop's clock."""

    def wait_s(self) -> float:
        """Seconds until there may be something to write that cannot be written now."""
        now = self._now()
        marks = self._scheduler.marks
        return max(self._rests_until - now, 0.0 if marks.ready else marks.wait_s(now))

    def take(self, limit: int) -> list[Settlement]:
        now = self._now()
        return [] if now < self._rests_until else self._scheduler.take_finished(limit, now)

    async def write(
        self, session: Session, reader: psycopg.AsyncConnection, batch: list[Settlement]
    ) -> tuple[list[Settlement], Settled] | None:
        """What of the batch is in the table now; None: nothing, for now. Raises what is about the session."""
        started = self._now()
        look = asyncio.get_running_loop().call_later(_LOOK_AFTER_S, self._look_who_blocks, session, reader)
        try:
            async with session.writing:
                settled = await self._store.settle(
                    session.connection,
                    batch,
                    maybe_written=self._scheduler.marks.maybe_written,
                    around_locks=self._around_locks,
                )
        except psycopg.Error as error:
            self._refused(session.connection, batch, error)
            return None
        finally:
            look.cancel()
        self._metrics.settle_duration.observe(self._now() - started)
        self._metrics.settle_changes.observe(len(batch))
        self._rest_s = 0.0
        locked = {finished.change.seq for finished in settled.locked}
        if locked:
            self._metrics.marks_delayed.inc(len(locked))
            self._scheduler.marks.put_back(settled.locked, self._now() + _LOCKED_S)
            self._delayed(settled.locked, "a row is locked")
        written = [finished for finished in batch if finished.change.seq not in locked] if locked else batch
        return written, settled

    def written(self) -> None:
        """What ``write`` returned has left the marks."""
        if self.held_up_since is not None and not self._scheduler.marks.holds:
            if self._told_at is not None:
                log.info("all marks are written again, after %.1f s", self._now() - self.held_up_since)
            self.held_up_since = self._told_at = None
            self._around_locks = False
            self._blockers = ""

    async def end(self) -> None:
        """The session is over."""
        if self._look:
            self._look.cancel()
            await asyncio.wait([self._look])

    def _refused(self, connection: psycopg.AsyncConnection, batch: list[Settlement], error: psycopg.Error) -> None:
        told = about(None if connection.closed else error.sqlstate)
        if told is About.SESSION:
            raise error
        if told is About.ROW:
            self._isolate(batch, error)
            return
        self._scheduler.marks.again(batch)
        if error.sqlstate == "55P03" and not self._around_locks:
            self._around_locks = True  # at once, and then around whatever row it is
            self.held_up_since = self.held_up_since or self._now()
            return
        self._metrics.marks_delayed.inc(len(batch))
        self._rest_s = min(max(2 * self._rest_s, _REST_MIN_S), _REST_MAX_S)
        self._rests_until = self._now() + self._rest_s
        self._delayed(batch, f"{error.diag.message_primary} [{error.sqlstate}]")

    def _isolate(self, batch: list[Settlement], error: psycopg.Error) -> None:
        if len(batch) > 1:
            self._scheduler.marks.split(batch)
            return
        [finished] = batch
        change, outcome = finished
        if isinstance(outcome, Unmarkable):
            self._scheduler.marks.put_back(batch, self._now() + _REFUSED_S)
            self._delayed(batch, f"the table refuses even a dead letter [{error.sqlstate}]")
            return
        self._metrics.rows_refused.labels("mark").inc()
        log.error(
            "the database refuses the mark of change %s of %s: %s [%s]; now a dead letter, its last_error says more",
            change.id, change.entity_type, type(error).__name__, error.sqlstate,
        )  # fmt: skip
        self._scheduler.marks.becomes(Settlement(change, _unmarkable(outcome, error)))

    def _delayed(self, batch: Sequence[Settlement], why: str) -> None:
        now = self._now()
        self.held_up_since = self.held_up_since or now
        if self._told_at is None or now - self._told_at >= _TOLD_EVERY_S:
            self._told_at = now
            first = batch[0].change
            log.warning(
                "the marks of %d changes are delayed, the first is %s of %s: %s%s; they are kept, and no handler is"
                " called again for them",
                len(batch), first.id, first.entity_type, why, self._blockers,
            )  # fmt: skip

    def _look_who_blocks(self, session: Session, reader: psycopg.AsyncConnection) -> None:
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(self._ask_who_blocks(session.connection.info.backend_pid, reader))

    async def _ask_who_blocks(self, pid: int, reader: psycopg.AsyncConnection) -> None:
        try:
            found = await (await reader.execute(_BLOCKERS, [pid])).fetchall()
        except (psycopg.Error, OSError):
            return  # the log says less then
        if found:
            self._blockers = "; in the way: " + ", ".join(f"pid {one} ({name or 'no name'})" for one, name in found[:5])


def _unmarkable(outcome: Outcome, error: psycopg.Error) -> Unmarkable:
    """In ASCII, which every encoding of a server holds."""
    words = f"{error.diag.message_primary} [{error.sqlstate}]".replace("\0", "")
    words = words.encode("ascii", "backslashreplace").decode()[:_WORDS_MAX]
    done = "its handler failed, and" if isinstance(outcome, Dead) or outcome.blocks_key else "its handler returned, but"
    return Unmarkable(f"{done} the database refused the mark: {words}", isinstance(outcome, Dead) and outcome.pauses)
