"""Finds the change that killed a consumer, after another consumer has taken over its shards.

Theory
------
A change that kills its process (``os._exit``, a crash in C code, memory that ran out) never reaches the error path, and
would kill each consumer that takes over. In steady state nothing is written that names it: what was running when a
process died is not known afterwards. But *that* the process died is known, because its row in ``cdc_shards`` is
still there. The consumer that takes over such a shard goes through the changes captured before, one window of them, in
two steps:

    unsuspected   recorded as ``started_by`` this process before its handler starts; many at once, in one statement
    suspect       recorded by a process that died: that start counts as a failed attempt. The next attempt is made
                  alone, after the one before has settled, so that a process that dies again convicts one change only

A poison message thus kills its process once unseen, once as one of many, and then as often as it has attempts. A change
that ran at that time loses one attempt. A change that a stop cuts off loses none, because a stop removes the records.

In the table a process that lost its session looks like one that died. It lives, and removes its records as soon as
it has a session again. The next owner gives it ``GRACE_S`` for that before a suspect runs or gets an outcome, and reads
the row again when the suspect's turn has come. Otherwise a healthy change could lose attempts that were never made.

A process that has records must not die of anything else: a logical message can take all its memory, and the recorded
changes would be blamed. So the slot is not read while ``exposed``: from the start until the free shards have been
taken, and then until nothing is recorded or still suspect, but no longer than ``EXPOSED_MAX_S``. Meanwhile changes
are found by sweeping.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Container, Iterable, Sequence
from datetime import datetime

import psycopg

from cdc.core import failpoints
from cdc.core.model import SHARDS, Change, Suspicion
from cdc.core.shard_ownership import Acquired
from cdc.engine.transactions import AskTheTableError
from cdc.postgres.outbox import Store
from cdc.postgres.shard_locks import ShardSession

log = logging.getLogger("cdc.consumer")

GRACE_S = 5.0
"""A consumer notices within a second that its session has ended, and is back after a pause that grows from 0.1 s."""

EXPOSED_MAX_S = 60.0
"""A handler may take for ever; the stream does not wait for that."""
_FIRST_POLL_S = 10.0
"""The database may be unavailable; then there is no stream either."""
_PAUSE_S = 2.0
"""Exposed for so long without a record: until a first sweep is over, and until an outcome is written."""


class CrashGuard:
    """``window``: changes of a shard that are recorded before they start; the dead consumer held no more of it."""

    def __init__(self, store: Store, window: int) -> None:
        self._store = store
        self._window = window
        self._session: ShardSession | None = None
        self.watched: dict[int, tuple[datetime, int]] = {}
        """By shard: changes made until then are recorded before they start, at most so many. While it is empty, these
        are none but those that crashed. Others only read it."""
        self._doubted_until: dict[int, float] = {}
        """By shard, on the monotonic clock: until then its previous owner may still report that it lives."""
        self._waiting: list[tuple[Change, str | None]] = []
        """With the names of their handlers."""
        self._writing = asyncio.Lock()
        self._marked: dict[int, Change] = {}
        self._looked = False
        self._exposed_until = self._exposed_at_most_until = time.monotonic() + _FIRST_POLL_S

    def use_session(self, session: ShardSession) -> None:
        """This session holds the shards from now on."""
        self._session = session

    def acquired(self, acquired: Acquired) -> None:
        """Record what a dead owner may have been working on before it starts."""
        if acquired.orphaned:
            log.warning(
                "the former owner of %d of these shards did not release them: changes that may have run there are"
                " recorded before they start", len(acquired.orphaned),
            )  # fmt: skip
        self._doubted_until.update(dict.fromkeys(acquired.shards, time.monotonic() + GRACE_S))
        for shard in acquired.shards:
            self.watched.pop(shard, None)
        self.watched.update(dict.fromkeys(acquired.orphaned, (acquired.at, self._window)))
        if acquired.orphaned:
            self._looked = True
            self._exposed_at_most_until = time.monotonic() + EXPOSED_MAX_S
            self._expose_for(_PAUSE_S)

    def revoked(self, shards: Collection[int]) -> None:
        """Starts in these shards are recorded until ``release``: what is in flight has records."""

    def lost(self) -> None:
        self.watched.clear()
        self._doubted_until.clear()

    def free_shards_acquired(self) -> None:
        """The shards that were free have been taken, or there is no outbox yet."""
        if not self._looked:
            self._looked = True
            self._exposed_until = 0.0

    def exposed(self) -> bool:
        """Whether the end of this process might cost a change an attempt. From any thread."""
        now = time.monotonic()
        return now < self._exposed_at_most_until and (now < self._exposed_until or bool(self._marked))

    def _expose_for(self, seconds: float) -> None:
        self._exposed_until = max(self._exposed_until, time.monotonic() + seconds)

    def must_record_start(self, change: Change) -> bool:
        """Whether to call ``record_start`` before the change's handler starts."""
        if change.crashed:
            return True
        watched = self.watched.get(change.shard)
        return watched is not None and change.changed_at <= watched[0]

    def owner_may_be_alive(self, change: Change) -> bool:
        """Whether the process that started this suspect may only have lost its session, and be about to report so."""
        left_s = self._doubted_until.get(change.shard, 0.0) - time.monotonic()
        if left_s > 0:
            self._expose_for(left_s + _PAUSE_S)
        return left_s > 0

    async def suspicion(self, change: Change) -> Suspicion:
        """Whether the change is still a suspect in the table. NONE on a lost session, too: nothing may start there."""
        assert self._session is not None
        try:
            async with self._session.writing:
                return await self._store.suspects(self._session.connection, change)
        except psycopg.Error:
            return Suspicion.NONE

    async def record_start(self, changes: Iterable[Change], handler: str | None) -> None:
        """Record that these start with this handler.

        Raises AskTheTableError: another session has one, or the session is lost.
        """
        recorded = [change for change in changes if self.must_record_start(change)]
        if not recorded:
            return
        self._waiting += [(change, handler) for change in recorded]
        async with self._writing:  # the first to come writes for all that have come meanwhile
            batch, self._waiting = self._waiting, []
            if batch:
                await self._write(batch)
        if any(change.seq not in self._marked for change in recorded):
            raise AskTheTableError("another session has the change")
        for change in recorded:
            self._count_down(change.shard)

    def returned(self, changes: Iterable[Change]) -> None:
        """Their handlers returned; the outcomes are settled as usual."""
        if self._marked:
            self._expose_for(_PAUSE_S)  # the record stands until the outcome is written
            for change in changes:
                self._marked.pop(change.seq, None)

    async def clear(self, shards: Container[int] = range(SHARDS)) -> None:
        """Remove the records of these shards for changes that ended without an outcome, or were cut off.

        This process lives, so no change is to blame. Call it at an orderly stop, and after a session was lost.
        """
        cut_off = [change for change in self._marked.values() if change.shard in shards]
        if cut_off and self._session:
            async with self._session.writing:
                await self._store.unstart(self._session.connection, cut_off)
            self.returned(cut_off)

    async def release(self, shards: Collection[int]) -> None:
        """Leave no record in these idle shards, and forget them. Call it before their locks are released."""
        await self.clear(shards)
        for shard in shards:
            self.watched.pop(shard, None)
            self._doubted_until.pop(shard, None)

    async def _write(self, batch: Sequence[tuple[Change, str | None]]) -> None:
        assert self._session is not None
        changes, handlers = zip(*batch, strict=True)
        self._expose_for(_PAUSE_S)
        failpoints.here("crash_guard.before_start")
        try:
            async with self._session.writing:
                started = await self._store.start(self._session.connection, changes, handlers)
        except psycopg.Error as error:
            raise AskTheTableError("the session was lost before it could be started") from error
        self._marked.update((change.seq, change) for change in changes if change.id in started)
        failpoints.here("crash_guard.after_start")

    def _count_down(self, shard: int) -> None:
        if watched := self.watched.get(shard):
            until, left = watched
            if left <= 1:
                del self.watched[shard]
            else:
                self.watched[shard] = (until, left - 1)
