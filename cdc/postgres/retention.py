"""Removing processed changes in small batches: no long transaction, and no unprocessed row.

The history is an audit trail, so nothing is removed unless asked for. An unprocessed change, a dead letter above all,
is never removed; nor is one that a subscription is not done with.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from cdc.postgres.actions import ActionLog, Actor
from cdc.postgres.sql_files import load

BATCH = 1_000
"""Rows a batch: a few milliseconds of locks, and a transaction too short to delay vacuum."""
COUNT_BOUND = 1_000_000
_UNTIMED_MAX = 100_000
"""Changes marked by hand without a time that one batch looks at: some 50 ms."""

# For one batch. Without them the planner may sort the whole history to find the first thousand.
LIMITS = (
    "SELECT set_config('statement_timeout', '30s', true), set_config('lock_timeout', '5s', true),"
    " set_config('enable_seqscan', 'off', true), set_config('enable_sort', 'off', true), set_config('jit', 'off', true)"
)


class PruneMark(NamedTuple):
    """Where a batch ended: when its last row was processed, and where that row is or was; None: any of that moment."""

    at: datetime
    row: str | None = None


class Batch(NamedTuple):
    """``removed`` rows are gone. ``until``: where it ended, None if it found nothing. ``more``: there may be more."""

    removed: int
    until: PruneMark | None
    more: bool


class Retention:
    """The statements for the outbox in ``schema``, on an autocommit connection. What ``actor`` removes is recorded."""

    def __init__(self, schema: str, actor: Actor | None = None) -> None:
        self._statements = load("retention.sql", schema)
        self._log = ActionLog(schema, actor)
        self.table = sql.Identifier(schema, "entity_changes").as_string(None)
        """The table's name, as written in SQL."""

    def prune(self, connection: psycopg.Connection, older_than_s: float, limit: int = BATCH) -> Iterator[int]:
        """Remove changes processed more than ``older_than_s`` ago; yields each batch's count after its commit.

        Then what is that old of the log of actions, and as old as that is kept at least.
        """
        batch = Batch(0, None, True)
        while batch.more:
            with connection.transaction():
                connection.execute(LIMITS)
                statement = self._statements["prune_shared" if self.shared(connection) else "prune"]
                row = connection.execute(statement, _asked(older_than_s, limit, batch.until)).fetchone()
                batch = _batch(row, batch.until)
                self._log.record(connection, "prune", {"older_than_s": older_than_s}, batch.removed)
            if batch.removed:
                yield batch.removed
        for _ in self._log.prune(connection, older_than_s):
            pass

    async def prune_batch(
        self,
        connection: psycopg.AsyncConnection,
        older_than_s: float,
        limit: int = BATCH,
        *,
        since: PruneMark | None = None,
    ) -> Batch:
        """One batch: up to ``limit`` rows are removed, or are looked at. ``since``: where the previous batch ended."""
        async with connection.transaction():
            await connection.execute(LIMITS)
            [(shared,)] = await (await connection.execute(self._statements["shared"], {})).fetchall()
            statement = self._statements["prune_shared" if shared else "prune"]
            row = await (await connection.execute(statement, _asked(older_than_s, limit, since))).fetchone()
        return _batch(row, since)

    async def prune_actions(self, connection: psycopg.AsyncConnection, older_than_s: float) -> None:
        """Some of the log of actions, of what is older than that is kept at least."""
        await self._log.prune_batch(connection, older_than_s)

    def prunable(self, connection: psycopg.Connection, older_than_s: float) -> tuple[int, bool]:
        """The number of changes that ``prune`` would remove, and whether there may be more: a million are looked at."""
        parameters = {"older_than_s": older_than_s, "bound": COUNT_BOUND, "scan": _UNTIMED_MAX}
        with connection.transaction():
            connection.execute(LIMITS)
            statement = self._statements["prunable_shared" if self.shared(connection) else "prunable"]
            row = connection.execute(statement, parameters).fetchone()
        assert row is not None
        count, more = row
        return count, more

    def shared(self, connection: psycopg.Connection) -> bool:
        """Whether there are subscriptions, which keep what they are not done with."""
        [(shared,)] = connection.execute(self._statements["shared"], {}).fetchall()
        return bool(shared)


def _asked(older_than_s: float, limit: int, since: PruneMark | None) -> dict[str, Any]:
    """The parameters of ``prune``."""
    at, place = since or (None, None)
    return {"older_than_s": older_than_s, "limit": limit, "since": at, "place": place, "scan": _UNTIMED_MAX}


def _batch(row: tuple[int, datetime | None, str | None, bool] | None, since: PruneMark | None) -> Batch:
    assert row is not None
    removed, at, place, more = row
    return Batch(removed, since if at is None else PruneMark(at, place), more)
