"""Events that are due later: ``publish_change(..., due => ...)`` puts them into a table of their own, and here they are
published when they are due.

Until then they are not changes: they have no number, hold nothing back, and no reader of the outbox sees them.
Published, they are fresh changes like any other, with a number drawn at that moment.
"""

from __future__ import annotations

import psycopg
from psycopg import errors

from cdc.postgres.pages import COUNT_BOUND, DueLater
from cdc.postgres.shard_locks import DUE, lock_class
from cdc.postgres.sql_files import load

_EVENTS_MAX, _BYTES_MAX = 1_000, 8 << 20
"""Published by one statement, as they are stored."""


class DueChanges:
    """The statements for the outbox in ``schema``, on autocommit connections."""

    def __init__(self, schema: str) -> None:
        self._statements = load("due.sql", schema)
        self._publish = {"class": lock_class(schema), "key": DUE, "events": _EVENTS_MAX, "bytes": _BYTES_MAX}

    async def publish(self, connection: psycopg.AsyncConnection) -> float | None:
        """Publish some of what is due, the first due first. Returns the seconds until there is more to do, or None.

        Needs EXECUTE on publish_due().
        """
        cursor = await connection.execute(self._statements["publish"], self._publish)
        row = await cursor.fetchone()
        assert row is not None
        seconds: float | None = row[0]
        return seconds

    def count(self, connection: psycopg.Connection) -> DueLater | None:
        """None where the outbox is of an earlier version, or this role may not see them."""
        try:
            row = connection.execute(self._statements["count"], {"bound": COUNT_BOUND}).fetchone()
        except (errors.UndefinedTable, errors.InsufficientPrivilege):
            return None
        assert row is not None
        return DueLater(*row)

    def types(self, connection: psycopg.Connection, within_s: float) -> set[str]:
        """The types of the events that are due within ``within_s`` seconds; of the first 10,001 events.

        An empty set where the outbox is of an earlier version, or this role may not see them.
        """
        try:
            rows = connection.execute(
                self._statements["types"], {"within_s": within_s, "bound": COUNT_BOUND}
            ).fetchall()
        except (errors.UndefinedTable, errors.InsufficientPrivilege):
            return set()
        return {name for (name,) in rows}
