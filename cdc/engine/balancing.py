"""Keeps to a consumer's fair share of the shards: what is free is taken, what is too much is given away.

What stands in the way of a look costs nothing but time: the locks are held by the session all the same, so what runs
goes on, and the next look goes on where this one was. Anything else ends the session.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import psycopg

from cdc.core.delay import Delay
from cdc.core.model import SHARDS
from cdc.core.read_planner import ReadPlanner
from cdc.core.rebalance import NoShardReminder, balance
from cdc.core.scheduler import KeyScheduler
from cdc.core.sqlstate import passes
from cdc.engine.crash_guard import CrashGuard
from cdc.engine.settler import Settler
from cdc.observability.metrics import ConsumerMetrics
from cdc.postgres.shard_locks import ShardSession, without

log = logging.getLogger("cdc.consumer")


class Balancing:
    """``acquired`` is called when there are new ones. Times are those of the event loop's clock."""

    def __init__(
        self,
        scheduler: KeyScheduler,
        planner: ReadPlanner,
        settler: Settler,
        crash_guard: CrashGuard,
        metrics: ConsumerMetrics,
        *,
        acquired: Callable[[], None],
    ) -> None:
        self._scheduler = scheduler
        self._planner = planner
        self._settler = settler
        self._crash_guard = crash_guard
        self._metrics = metrics
        self._taken = acquired
        self._without = NoShardReminder()
        self._delay = Delay()
        self._leaving: set[int] = set()
        """Nothing of these is in flight, and they are to be given away."""
        self.owned: set[int] = set()
        self.members = 0
        """Live consumers, as the last look has shown them."""

    async def poll(self, session: ShardSession, now: float) -> bool:
        """Ask the server, take and give. False: something was in the way, and the next look does the rest."""
        with self._patience(session, now):
            await self._balance(session, now)
            return True
        return False

    async def ask(self, session: ShardSession, now: float) -> None:
        """Make sure that the session is still there. Raises when it is not."""
        with self._patience(session, now):
            await session.poll()

    def lose(self) -> set[int]:
        """The session is lost, and its locks. Returns what they were for."""
        lost = self.owned
        self._leaving.clear()
        self._own(set())
        return lost

    async def _balance(self, session: ShardSession, now: float) -> None:
        before = len(self.owned)
        members, free = await session.poll()
        self.members = members
        move = balance(members, self.owned, free)
        if (move.acquire or session.unregistered) and (acquired := await session.acquire(move.acquire)).shards:
            self._crash_guard.took(acquired)
            self._settler.unpark(acquired.kept)
            self._settler.drop(acquired.shards)
            self._scheduler.own(acquired.shards)
            self._planner.own(acquired.shards)
            self._own(self.owned.union(acquired.shards))
            self._metrics.shard_moves.labels("acquired").inc(len(acquired.shards))
            self._taken()
        self._crash_guard.looked()
        if parked := self._settler.parked:
            self._settler.drop(await session.others(parked))
        self._scheduler.release(move.release)
        self._planner.disown(move.release)
        self._leaving |= self._scheduler.released()
        if self._leaving:
            await self._crash_guard.forget(self._leaving)
            await session.release(self._leaving)
            self._own(self.owned - self._leaving)
            self._metrics.shard_moves.labels("released").inc(len(self._leaving))
            self._leaving.clear()
        if len(self.owned) != before:
            log.info("owns %d of %d shards; consumers: %d", len(self.owned), SHARDS, members)
        if self._without.due(len(self.owned), members, now):
            log.warning("%s", without(await session.holders()))

    @contextlib.contextmanager
    def _patience(self, session: ShardSession, now: float) -> Iterator[None]:
        try:
            yield
        except psycopg.Error as error:
            if session.connection.closed or not passes(error.sqlstate):
                raise
            if self._delay.failed(now):
                log.warning(
                    "the look at the shards is delayed: %s [%s]; it is tried again, and what runs goes on",
                    error.diag.message_primary, error.sqlstate,
                )  # fmt: skip
        else:
            if (delayed_s := self._delay.done(now)) is not None:
                log.info("the shards are looked at again, after %.1f s", delayed_s)

    def _own(self, shards: set[int]) -> None:
        self.owned = shards
