"""The session that owns shards.

Theory
------
A shard is owned by whoever holds the advisory lock ``(class, shard)``; a consumer is alive while it shares the lock
``(class, SHARDS)``. ``class`` is a hash of the schema's name, so that two outboxes in one database have shards of their
own. Both locks end with the session and with nothing else: no lease, no clock, no heartbeat that a pause could outlive.
Outcomes are settled on this very session: whoever has lost it has lost the locks, and can settle nothing.

A dead process's locks are free as soon as its kernel closes the socket. For a vanished host the server decides, by the
TCP settings asked for here (``connect.SERVER_TCP``); our own side gives up earlier (``connect.CLIENT_TCP``).
"""

from __future__ import annotations

import select
import zlib
from collections.abc import Iterable, Mapping

import psycopg

from cdc import probe
from cdc.connect import SERVER_TCP, connect_async
from cdc.model import SHARDS

_SESSION = {
    **SERVER_TCP,
    "idle_session_timeout": "0",  # a quiet night must not cost the locks
    "lock_timeout": "10s",
    "statement_timeout": "30s",
}

_LOOK = """
SELECT count(*) FILTER (WHERE objid = %(shards)s)::int AS members,
       (count(DISTINCT objid) FILTER (WHERE objid < %(shards)s))::int AS taken
FROM pg_locks
WHERE locktype = 'advisory' AND granted AND classid = %(class)s::oid AND objsubid = 2
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""

# LIMIT in the inner query keeps the planner from trying the lock of every shard.
_TAKE = """
SELECT shard FROM (
  SELECT shard FROM generate_series(0, %(shards)s - 1) AS shard
  WHERE NOT EXISTS (
    SELECT FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND classid = %(class)s::oid AND objid = shard AND objsubid = 2
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  )
  ORDER BY random() LIMIT %(limit)s
) AS free
WHERE pg_try_advisory_lock(%(key)s, shard)
"""


class Session:
    """One server session: member, owner of shards, and the connection on which their changes are settled."""

    def __init__(self, connection: psycopg.AsyncConnection, schema: str) -> None:
        self.connection = connection
        hashed = zlib.crc32(f"cdc:{schema}".encode())
        self._key = hashed - (1 << 32) if hashed >= 1 << 31 else hashed
        self._parameters = {"shards": SHARDS, "class": hashed, "key": self._key}

    @classmethod
    async def open(cls, dsn: str | None, schema: str, settings: Mapping[str, str]) -> Session:
        """Connect with these server settings besides our own, and become a member."""
        connection = await connect_async(dsn, application_name="cdc: shards", session={**settings, **_SESSION})
        session = cls(connection, schema)
        try:
            await connection.execute("SELECT pg_advisory_lock_shared(%s, %s)", [session._key, SHARDS])
        except BaseException:
            await connection.close()
            raise
        return session

    async def look(self) -> tuple[int, int]:
        """(members, free shards), as the server sees them now."""
        cursor = await self.connection.execute(_LOOK, self._parameters)
        [(members, taken)] = await cursor.fetchall()
        return members, SHARDS - taken

    async def take(self, limit: int) -> list[int]:
        """Lock up to ``limit`` shards that nobody holds."""
        cursor = await self.connection.execute(_TAKE, {**self._parameters, "limit": limit})
        taken = [shard for (shard,) in await cursor.fetchall()]
        probe.here("shards.after_take")
        return taken

    async def give(self, shards: Iterable[int]) -> None:
        """Unlock shards on which nothing is in flight."""
        probe.here("shards.before_release")
        await self.connection.execute(
            "SELECT pg_advisory_unlock(%s, shard) FROM unnest(%s::int[]) AS shard", [self._key, list(shards)]
        )

    @property
    def stirred(self) -> bool:
        """Something has come from the server. Where no statement runs, that is bad news: ask before going on."""
        if self.connection.closed:
            return True
        readable, _, _ = select.select([self.connection.fileno()], [], [], 0)
        return bool(readable)

    async def close(self) -> None:
        await self.connection.close()
