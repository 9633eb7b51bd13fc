"""Retention: removes processed changes beyond an age, and never delays the work.

A round, every minute: connect, take the lock, remove batch after batch until nothing is old enough, leave. Any number
of consumers try; the lock admits one of them, and the next round may be another's. It is an advisory lock on the very
connection that removes, so both end together, and no process needs to notice that the remover died. (The owner of shard
0 would do as well, but could not be distinguished from one that only believes it is the owner.) Between rounds there is
neither lock nor connection.

Each batch is a transaction of its own, and pauses follow the batches' own time: on a busy server both take longer.

What a subscription keeps lies before what may go, in any number. A round ends after some batches that removed nothing,
and the next one of this process goes on behind them; a round that came to the end is followed by one from the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator

import psycopg
from psycopg import errors

from cdc.core.errors import CdcError
from cdc.engine.failures_log import FailuresLog
from cdc.observability.metrics import OutboxMetrics
from cdc.postgres.connect import SERVER_TCP, Dsn, connect_async, explain
from cdc.postgres.retention import BATCH, PruneMark, Retention
from cdc.postgres.shard_locks import RETENTION, lock_class

log = logging.getLogger("cdc.retention")

_ROUND_EVERY_S = 60.0
"""Also after a round that failed: nothing is urgent here, and a server that comes back has other things to do."""
_BUSY_SHARE = 0.1
"""Share of a round's time in which the server works for it."""
PAUSE_MAX_S = 60.0
_IN_VAIN_MAX = 100
"""Batches of a round that look at what subscriptions keep, and find nothing to remove: some 5 s with their pauses."""
_ANSWER_LIMIT_S = 35.0
"""Longer than a batch may take on the server."""


class Pruning:
    """``await run()`` until it is cancelled; it retries what fails and never raises.

    Removes what was processed more than ``older_than_s`` ago, ``batch`` changes a transaction.
    """

    def __init__(
        self,
        dsn: Dsn,
        schema: str,
        older_than_s: float,
        metrics: OutboxMetrics,
        *,
        batch: int = BATCH,
        every_s: float = _ROUND_EVERY_S,
    ) -> None:
        self._dsn = dsn
        self._key = [lock_class(schema), RETENTION]
        self._retention = Retention(schema)
        self._older_than_s = older_than_s
        self._metrics = metrics
        self._batch = batch
        self._every_s = every_s
        self._since: PruneMark | None = None
        """Where the next round begins, if the last one ended before the end."""
        self._failures = FailuresLog(log, "retention does not remove old changes")

    async def run(self) -> None:
        while True:
            try:
                await self._round()
            except (CdcError, psycopg.Error, OSError, UnicodeError) as error:
                self._failures.failed(error, self._explained(error))
            # Consumers that start together would otherwise connect at the same moments for ever.
            await asyncio.sleep(self._every_s * (0.5 + random.random() / 2))  # noqa: S311 - jitter

    async def _round(self) -> None:
        async with self._lock() as connection:
            if connection is None:
                return
            # Within a round each batch begins where the last ended: an old snapshot makes it walk over the index
            # entries of all removed rows. A round begins at the start: a row that was locked is found the next time.
            since, in_vain, more = self._since, 0, True
            while more and in_vain < _IN_VAIN_MAX:
                began = asyncio.get_running_loop().time()
                count, since, more = await self._retention.prune_batch(
                    connection, self._older_than_s, self._batch, since=since
                )
                self._metrics.pruned.inc(count)
                self._failures.succeeded()
                in_vain = 0 if count else in_vain + 1
                if more:
                    took_s = asyncio.get_running_loop().time() - began
                    await asyncio.sleep(min(took_s * (1 / _BUSY_SHARE - 1), PAUSE_MAX_S))
            self._since = since if more else None
            await self._retention.prune_actions(connection, self._older_than_s)

    @contextlib.asynccontextmanager
    async def _lock(self) -> AsyncIterator[psycopg.AsyncConnection | None]:
        """A connection that holds the lock; None while another one does."""
        async with await connect_async(
            self._dsn, application_name="cdc: retention", session=SERVER_TCP, answer_limit_s=_ANSWER_LIMIT_S
        ) as connection:
            cursor = await connection.execute("SELECT pg_try_advisory_lock(%s, %s)", self._key)
            yield connection if await cursor.fetchone() == (True,) else None

    def _explained(self, error: Exception) -> Exception:
        if isinstance(error, errors.InsufficientPrivilege):
            return CdcError(
                f"the role may not: {error.diag.message_primary}",
                hint=f"cdc db grant --retention (GRANT DELETE ON {self._retention.table} TO ..., DELETE and SELECT on"
                " change_attempts, and SELECT on the tables of subscriptions), or switch it off",
            )
        return explain(error) or error
