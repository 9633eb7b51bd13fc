"""The oldest transaction that writes: what waits for all of them waits for this one."""

from __future__ import annotations

import psycopg
from psycopg import sql
from psycopg.rows import dict_row

from cdc.core.units import format_duration

# By the lock that each transaction holds on its own number: every role may see those locks, but not the ages.
_OLDEST_WRITER = """
    SELECT l.pid, a.datname AS database, a.application_name, p.gid,
           extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, p.prepared))::float8 AS age_s
      FROM pg_catalog.pg_locks l
      LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
      LEFT JOIN pg_catalog.pg_prepared_xacts p ON p.transaction = l.transactionid
     WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted
       AND l.pid IS DISTINCT FROM pg_backend_pid()
     ORDER BY age(l.transactionid) DESC
     LIMIT 1
"""


def oldest_writer(connection: psycopg.Connection) -> tuple[str, str] | None:
    """The oldest open write transaction of any database, as a sentence; and the statement that ends it."""
    with connection.cursor(row_factory=dict_row) as cursor:
        found = cursor.execute(_OLDEST_WRITER).fetchone()
    if found is None:
        return None
    age = f", {format_duration(found['age_s'])} old" if found["age_s"] is not None else ""
    if found["gid"] is not None:
        statement = sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(found["gid"])).as_string(connection)
        return f"the prepared transaction {found['gid']}{age}", f"{statement};"
    named = f", {found['application_name']}" if found["application_name"] else ""
    who = f"process {found['pid']}{age}, database {found['database']}{named}"
    return who, f"SELECT pg_terminate_backend({found['pid']});"


def end_oldest(connection: psycopg.Connection) -> str:
    """What to do where the oldest one is waited for in vain, for a hint."""
    oldest = oldest_writer(connection)
    if oldest is None:
        return (
            "end the oldest write transaction of the server, of any database: see pg_stat_activity, pg_prepared_xacts"
        )
    return f"the oldest is {oldest[0]}; wait for it, or end it: {oldest[1]}"
