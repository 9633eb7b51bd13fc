"""Keeps to a consumer's fair share of the shards: takes free shards, gives surplus ones away.

A temporary obstacle to a poll costs nothing but time: the session holds the locks all the same, so what runs
goes on, and the next poll continues. Any other error ends the session.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

import psycopg

from cdc.core.delay import Delay
from cdc.core.model import SHARDS
from cdc.core.rebalance import NoShardReminder, balance
from cdc.core.shard_ownership import ShardOwnership
from cdc.core.sqlstate import passes
from cdc.engine.crash_guard import CrashGuard
from cdc.engine.limiting import Limiting
from cdc.engine.pausing import Pausing
from cdc.engine.settler import Settler
from cdc.observability.metrics import ConsumerMetrics
from cdc.postgres.shard_locks import POLL_MAX_S, Polled, ShardSession, without

log = logging.getLogger("cdc.consumer")


class Balancing:
    """``acquired`` is called when there are new shards, ``readers`` at each poll: others may read the same changes.

    Times are those of the event loop's clock.
    """

    def __init__(
        self,
        ownership: ShardOwnership,
        settler: Settler,
        crash_guard: CrashGuard,
        metrics: ConsumerMetrics,
        *,
        acquired: Callable[[], None],
        pausing: Pausing,
        limiting: Limiting,
        readers: Callable[[ShardSession], None] = lambda session: None,
    ) -> None:
        self._ownership = ownership
        self._settler = settler
        self._crash_guard = crash_guard
        self._metrics = metrics
        self._acquired = acquired
        self._readers = readers
        self.pausing = pausing
        self.limiting = limiting
        self._warned = False
        self._without = NoShardReminder()
        self._delay = Delay()
        self._shares: str | None = None
        self._poll_by = 0.0
        self.members = 0
        """Live consumers, at the last poll."""

    async def poll_if_changed(self, session: ShardSession, now: float, shares: str | None) -> bool:
        """``poll``, unless ``shares``, which changes with what it would read, is as before the last one."""
        as_before = shares is not None and shares == self._shares and now < self._poll_by
        if as_before and self._has_nothing_pending(session):
            return True
        self._shares, self._poll_by = None, now + POLL_MAX_S
        if not await self.poll(session, now):
            return False
        self._shares = shares
        return True

    def _has_nothing_pending(self, session: ShardSession) -> bool:
        """Nor has the session ended."""
        owned = self._ownership.owned
        pending = session.unregistered or self._settler.parked
        return bool(owned) and owned == self._ownership.active and not pending and not session.has_server_message

    async def poll(self, session: ShardSession, now: float) -> bool:
        """Read the membership, acquire and release. False: an obstacle stopped it, and the next poll does the rest."""
        with self.patience(session, now):
            await self._balance(session, now)
            return True
        return False

    async def ask(self, session: ShardSession, now: float) -> None:
        """Check that the session is still there. Raises if it is not."""
        with self.patience(session, now):
            await self.look(session)

    async def look(self, session: ShardSession) -> Polled:
        """Poll, and pass on what is paused by now. Raises what the poll raises."""
        polled = await session.poll()
        if polled.pauses is not None:
            self.pausing.became(polled.pauses)
        if polled.limits is not None:
            self.limiting.became(polled.limits)
        if not session.may_see_controls and not self._warned:
            log.warning(
                "what is paused (cdc pause) cannot be seen, so nothing is: run cdc db upgrade, or cdc db grant"
                " --consumer ROLE"
            )
        self._warned = not session.may_see_controls
        return polled

    async def _balance(self, session: ShardSession, now: float) -> None:
        owned = self._ownership.owned
        before = len(owned)
        polled = await self.look(session)
        self.members, free = polled.members, polled.free
        self._readers(session)
        move = balance(self.members, owned, free)
        if (move.acquire or session.unregistered) and (acquired := await session.acquire(move.acquire)).shards:
            self._ownership.acquire(acquired)
            self._metrics.shard_moves.labels("acquired").inc(len(acquired.shards))
            self._acquired()
        self._crash_guard.free_shards_acquired()
        if parked := self._settler.parked:
            self._settler.drop(await session.others(parked))
        self._ownership.revoke(move.release)
        if idle := self._ownership.idle():
            await self._crash_guard.release(idle)
            await session.release(idle)
            self._ownership.released(idle)
            self._metrics.shard_moves.labels("released").inc(len(idle))
        if len(owned) != before:
            log.info("owns %d of %d shards; consumers: %d", len(owned), SHARDS, self.members)
        if self._without.due(len(owned), self.members, now):
            log.warning("%s", without(await session.holders()))

    @contextlib.contextmanager
    def patience(self, session: ShardSession, now: float) -> Iterator[None]:
        """An obstacle that passes costs nothing but time; raises what ends the session."""
        try:
            yield
        except psycopg.Error as error:
            if session.connection.closed or not passes(error.sqlstate):
                raise
            if self._delay.failed(now):
                log.warning(
                    "the check of the shards is delayed: %s [%s]; it is tried again, and what runs goes on",
                    error.diag.message_primary, error.sqlstate,
                )  # fmt: skip
        else:
            if (delayed_s := self._delay.done(now)) is not None:
                log.info("the shards are checked again, after %.1f s", delayed_s)
