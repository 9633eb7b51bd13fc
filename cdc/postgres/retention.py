"""Removing processed changes in small batches: no long transaction, and no unprocessed row.

The history is an audit trail, so nothing is removed unless asked for. An unprocessed change, a dead letter above all,
is never removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from cdc.postgres.sql_files import load

BATCH = 1_000
"""Rows a batch: a few milliseconds of locks, and a transaction too short to delay vacuum."""
COUNT_BOUND = 1_000_001
_UNTIMED_MAX = 100_000
"""Changes marked by hand without a time that one batch looks at: some 50 ms."""

# For one batch. Without them the planner may sort the whole history to find the first thousand.
LIMITS = (
    "SELECT set_config('statement_timeout', '30s', true), set_config('lock_timeout', '5s', true),"
    " set_config('enable_seqscan', 'off', true), set_config('enable_sort', 'off', true), set_config('jit', 'off', true)"
)


class Batch(NamedTuple):
    """``removed`` rows are gone, the last of which was processed at ``until``; None if none was."""

    removed: int
    until: datetime | None


class Retention:
    """The statements for the outbox in ``schema``, on an autocommit connection."""

    def __init__(self, schema: str) -> None:
        self._statements = load("retention.sql", schema)
        self.table = sql.Identifier(schema, "entity_changes").as_string(None)
        """The table's name, as written in SQL."""

    def prune(self, connection: psycopg.Connection, older_than_s: float, limit: int = BATCH) -> Iterator[int]:
        """Remove changes processed more than ``older_than_s`` ago; yields each batch's count after its commit."""
        batch = Batch(limit, None)
        while batch.removed == limit:
            with connection.transaction():
                connection.execute(LIMITS)
                row = connection.execute(self._statements["prune"], _asked(older_than_s, limit, batch.until)).fetchone()
            assert row is not None
            batch = Batch(*row)
            if batch.removed:
                yield batch.removed

    async def prune_batch(
        self,
        connection: psycopg.AsyncConnection,
        older_than_s: float,
        limit: int = BATCH,
        *,
        since: datetime | None = None,
    ) -> Batch:
        """Remove one batch. Fewer than ``limit``: no more are left. ``since``: where the previous batch ended."""
        async with connection.transaction():
            await connection.execute(LIMITS)
            cursor = await connection.execute(self._statements["prune"], _asked(older_than_s, limit, since))
            row = await cursor.fetchone()
        assert row is not None
        return Batch(*row)

    def prunable(self, connection: psycopg.Connection, older_than_s: float) -> int:
        """The number of changes that ``prune`` would remove; 1,000,001 means more."""
        parameters = {"older_than_s": older_than_s, "bound": COUNT_BOUND, "scan": _UNTIMED_MAX}
        with connection.transaction():
            connection.execute(LIMITS)
            row = connection.execute(self._statements["prunable"], parameters).fetchone()
        assert row is not None
        return int(row[0])


def _asked(older_than_s: float, limit: int, since: datetime | None) -> dict[str, Any]:
    """The parameters of ``prune``."""
    return {"older_than_s": older_than_s, "limit": limit, "since": since, "scan": _UNTIMED_MAX}
