"""Removing processed changes, in small batches: no long transaction, and no row that is still to be handled.

The history is an audit trail, so nothing is removed unless asked for; and what is not processed, a dead letter above
all, is never removed.
"""

from __future__ import annotations

from collections.abc import Iterator

import psycopg

from cdc.outbox.statements import load

BATCH = 1_000
"""Rows a batch: a few milliseconds of locks, and a transaction that no vacuum waits for."""
COUNT_BOUND = 1_000_001

# Of one batch. Left to itself the planner may sort the whole history for the first thousand.
_LIMITS = (
    "SELECT set_config('statement_timeout', '30s', true), set_config('lock_timeout', '5s', true),"
    " set_config('enable_seqscan', 'off', true), set_config('enable_sort', 'off', true), set_config('jit', 'off', true)"
)


class Retention:
    """The statements for the outbox in ``schema``, on an autocommit connection."""

    def __init__(self, schema: str) -> None:
        self._statements = load("retention.sql", schema)

    def prune(self, connection: psycopg.Connection, older_than_s: float, limit: int = BATCH) -> Iterator[int]:
        """Remove what was processed longer ago; yields how many after each batch, which is committed by then."""
        since, count = None, limit
        while count == limit:
            parameters = {"older_than_s": older_than_s, "limit": limit, "since": since}
            with connection.transaction():
                connection.execute(_LIMITS)
                row = connection.execute(self._statements["prune"], parameters).fetchone()
            assert row is not None
            count, since = row
            if count:
                yield count

    async def prune_batch(self, connection: psycopg.AsyncConnection, older_than_s: float, limit: int = BATCH) -> int:
        """Remove one batch; returns how many. Less than ``limit``: there is no more now."""
        parameters = {"older_than_s": older_than_s, "limit": limit, "since": None}
        async with connection.transaction():
            await connection.execute(_LIMITS)
            cursor = await connection.execute(self._statements["prune"], parameters)
            row = await cursor.fetchone()
        assert row is not None
        return int(row[0])

    def prunable(self, connection: psycopg.Connection, older_than_s: float) -> int:
        """How many there are; 1,000,001 means more."""
        parameters = {"older_than_s": older_than_s, "bound": COUNT_BOUND}
        with connection.transaction():
            connection.execute(_LIMITS)
            row = connection.execute(self._statements["prunable"], parameters).fetchone()
        assert row is not None
        return int(row[0])
