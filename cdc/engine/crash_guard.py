"""How the change that killed a consumer is found, after another consumer has taken over its shards.

Theory
------
A change that kills its process (``os._exit``, a crash in C code, memory that ran out) never reaches the error path, and
would kill each consumer that takes over. In steady state nothing is written that names it: what was running when a
process died is not known afterwards. But it is known *that* the process died, because its row in ``cdc_shards`` is
still there. The consumer that takes over such a shard goes through what was there by then, one window of it, in two
steps:

    unsuspected   recorded as ``started_by`` this process before its handler starts; many at once, in one statement
    suspect       recorded by a process that died: that start counts as a failed attempt. The next attempt is made
                  alone, after the one before has settled, so that a process that dies again convicts one change only

A poison message thus kills its process once unseen, once as one of many, and then as often as it has attempts. A change
that ran beside it loses one attempt. A change that a stop cuts off loses none, because a stop removes the records.

In the table a process that lost its session looks like one that died. It lives, and takes its records back as soon as
it has a session again. The next owner gives it ``GRACE_S`` for that before a suspect runs or is judged, and reads the
row again when the suspect's turn has come. Otherwise a healthy change could lose attempts that were never made.

A process that has records must not die of anything else: a logical message can take all its memory, and the recorded
changes would be blamed. So the slot is not read while ``exposed``: from the start until the free shards have been
taken, and then until nothing is recorded or waits to be judged, but no longer than ``EXPOSED_MAX_S``. Meanwhile changes
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
"""A handler may take for ever, and the stream does not wait for that."""
_FIRST_POLL_S = 10.0
"""The database may be away; then there is no stream either."""
_PAUSE_S = 2.0
"""Between two marks: until a first sweep has found what there is, and until an outcome is written."""


class CrashGuard:
    """``window``: so many changes of a shard are recorded before they start; the dead consumer held no more of it."""

    def __init__(self, store: Store, window: int) -> None:
        self._store = store
        self._window = window
        self._session: ShardSession | None = None
        self._watched: dict[int, tuple[datetime, int]] = {}
        """Of a shard: changes made until then are recorded before they start, at most so many."""
        self._doubted_until: dict[int, float] = {}
        """Of a shard, on the monotonic clock: whoever had it before may still say that it lives."""
        self._waiting: list[Change] = []
        self._writing = asyncio.Lock()
        self._marked: dict[int, Change] = {}
        self._looked = False
        self._exposed_until = self._exposed_at_most_until = time.monotonic() + _FIRST_POLL_S

    def use_session(self, session: ShardSession) -> None:
        """From now on this session holds the shards."""
        self._session = session

    def acquired(self, acquired: Acquired) -> None:
        """What an owner that died may have been working on is recorded before it starts."""
        if acquired.orphaned:
            log.warning(
                "the consumer that owned %d of these shards ended without a word: what it may have been working on is"
                " recorded before it starts", len(acquired.orphaned),
            )  # fmt: skip
        self._doubted_until.update(dict.fromkeys(acquired.shards, time.monotonic() + GRACE_S))
        for shard in acquired.shards:
            self._watched.pop(shard, None)
        self._watched.update(dict.fromkeys(acquired.orphaned, (acquired.at, self._window)))
        if acquired.orphaned:
            self._looked = True
            self._exposed_at_most_until = time.monotonic() + EXPOSED_MAX_S
            self._expose_for(_PAUSE_S)

    def revoked(self, shards: Collection[int]) -> None:
        """What still starts of them starts as before."""

    def lost(self) -> None:
        self._watched.clear()
        self._doubted_until.clear()

    def free_shards_acquired(self) -> None:
        """The shards that were free have been taken, or there is no outbox yet."""
        if not self._looked:
            self._looked = True
            self._exposed_until = 0.0

    @property
    def exposed(self) -> bool:
        """Whether the end of this process might cost a change an attempt. From any thread."""
        now = time.monotonic()
        return now < self._exposed_at_most_until and (now < self._exposed_until or bool(self._marked))

    def _expose_for(self, seconds: float) -> None:
        self._exposed_until = max(self._exposed_until, time.monotonic() + seconds)

    @property
    def active(self) -> bool:
        """Whether there may be a change that ``record_start`` records, besides those that crashed."""
        return bool(self._watched)

    def must_record_start(self, change: Change) -> bool:
        """Whether ``record_start`` is to be called before the change's handler starts."""
        if change.crashed:
            return True
        watched = self._watched.get(change.shard)
        return watched is not None and change.changed_at <= watched[0]

    def owner_may_be_alive(self, change: Change) -> bool:
        """Whether the process that started this suspect may only have lost its session, and be about to say so."""
        left_s = self._doubted_until.get(change.shard, 0.0) - time.monotonic()
        if left_s > 0:
            self._expose_for(left_s + _PAUSE_S)
        return left_s > 0

    async def suspicion(self, change: Change) -> Suspicion:
        """Ask the table whether the change is one still. NONE on a lost session, too: nothing is to start there."""
        assert self._session is not None
        try:
            async with self._session.writing:
                return await self._store.suspects(self._session.connection, change)
        except psycopg.Error:
            return Suspicion.NONE

    async def record_start(self, changes: Iterable[Change]) -> None:
        """Write down that these start now. Raises AskTheTableError: one is somebody else's, or the session is lost."""
        recorded = [change for change in changes if self.must_record_start(change)]
        if not recorded:
            return
        self._waiting += recorded
        async with self._writing:  # whoever comes first writes for all who have come meanwhile
            batch, self._waiting = self._waiting, []
            if batch:
                await self._write(batch)
        if any(change.seq not in self._marked for change in recorded):
            raise AskTheTableError("another session has the change")
        for change in recorded:
            self._count_down(change.shard)

    def returned(self, changes: Iterable[Change]) -> None:
        """Their handlers returned; what came of them is settled as ever."""
        if self._marked:
            self._expose_for(_PAUSE_S)  # the mark stands until the outcome is written
            for change in changes:
                self._marked.pop(change.seq, None)

    async def clear(self, shards: Container[int] = range(SHARDS)) -> None:
        """Of these shards, what ended without an outcome, or was cut off, is nobody's fault: this process lives.

        To be said before a shard is given away, at a stop in peace, and after a session was lost.
        """
        cut_off = [change for change in self._marked.values() if change.shard in shards]
        if cut_off and self._session:
            async with self._session.writing:
                await self._store.unstart(self._session.connection, cut_off)
            self.returned(cut_off)

    async def _write(self, batch: Sequence[Change]) -> None:
        assert self._session is not None
        self._expose_for(_PAUSE_S)
        failpoints.here("crash_guard.before_start")
        try:
            async with self._session.writing:
                started = await self._store.start(self._session.connection, batch)
        except psycopg.Error as error:
            raise AskTheTableError("the session was lost before it could be started") from error
        self._marked.update((change.seq, change) for change in batch if change.id in started)
        failpoints.here("crash_guard.after_start")

    def _count_down(self, shard: int) -> None:
        if watched := self._watched.get(shard):
            until, left = watched
            if left <= 1:
                del self._watched[shard]
            else:
                self._watched[shard] = (until, left - 1)
