"""Databases to measure in: each fresh, each dropped afterwards."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import LiteralString

import psycopg
from psycopg import sql

from cdc import schema
from cdc.throwaway import Server
from tests.eventually import eventually

_PRELOAD = """
INSERT INTO entity_changes (table_schema, table_name, operation, entity_id, entity_type, new_data, metadata)
SELECT 'public', 'tasks', 'INSERT', (n %% %(keys)s)::text, 'task',
       jsonb_build_object('id', n %% %(keys)s, 'title', 'task number ' || n, 'status', 'open', 'user_id', n %% 97),
       jsonb_build_object('timestamp', now(), 'user_id', n %% 97)
FROM generate_series(1, %(changes)s) AS n
"""

_HISTORY = """
INSERT INTO entity_changes (table_schema, table_name, operation, entity_id, entity_type, new_data, metadata, changed_at,
                            processed, processed_at)
SELECT 'public', 'tasks', 'INSERT', (n %% 100000)::text, (ARRAY['task', 'message', 'reaction'])[1 + n %% 3],
       CASE WHEN %(payload)s THEN jsonb_build_object('id', n, 'title', 'task number ' || n, 'user_id', n %% 97) END,
       CASE WHEN %(payload)s THEN jsonb_build_object('timestamp', at, 'user_id', n %% 97) END,
       at, true, at + interval '20 ms'
FROM (
  SELECT n, now() - make_interval(secs => %(seconds)s::float8 * (%(rows)s - n) / %(rows)s) AS at
  FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS n
) AS moment
"""
_STEP = 250_000
"""Rows a transaction: none is so long that the server keeps its WAL for it."""
_UNPROCESSED = """
INSERT INTO entity_changes (table_name, operation, entity_type, entity_id, next_attempt_at, dead_at, error_count)
SELECT 'tasks', 'INSERT', 'task', coalesce(%(key)s, 'key ' || n), now() + %(wait)s::interval,
       CASE WHEN %(dead)s THEN now() END, CASE WHEN %(wait)s IS NULL AND NOT %(dead)s THEN 0 ELSE 1 END
FROM generate_series(1, %(changes)s) AS n
"""


@contextmanager
def fresh_database(server: Server) -> Iterator[psycopg.Connection]:
    """An autocommit connection to a new, empty database, dropped at the end with the slots made in it."""
    name = f"bench_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            with psycopg.connect(server.dsn(name), autocommit=True) as connection:
                yield connection
        finally:
            eventually(lambda: _no_slot_is_read(admin, name), what=f"the readers of the slots of {name} to be gone")
            admin.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s", [name]
            )
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@contextmanager
def fresh_outbox(server: Server) -> Iterator[psycopg.Connection]:
    """As ``fresh_database``, with an empty outbox in the schema public."""
    with fresh_database(server) as connection:
        schema.install(connection, "public")
        yield connection


def preload(connection: psycopg.Connection, *, changes: int, keys: int) -> None:
    """Fill the outbox with so many fresh changes, spread evenly over the keys. No doorbell rings."""
    connection.execute(_PRELOAD, {"changes": changes, "keys": keys})


def preload_history(connection: psycopg.Connection, *, rows: int, days: float, payload: bool = True) -> None:
    """Fill the outbox with so many processed changes, spread evenly over the last so many days."""
    connection.execute("SET synchronous_commit = off")
    for first in range(1, rows + 1, _STEP):
        last = min(first + _STEP - 1, rows)
        span = {"seconds": days * 86_400, "rows": rows, "first": first, "last": last}
        connection.execute(_HISTORY, {**span, "payload": payload})
    connection.execute("RESET synchronous_commit")


def preload_unprocessed(
    connection: psycopg.Connection, changes: int, *, wait: str | None = None, dead: bool = False, key: str | None = None
) -> None:
    """So many changes that are fresh, wait so long (``"1 hour"``), or are dead; each of its own key, or all of one."""
    connection.execute(_UNPROCESSED, {"changes": changes, "wait": wait, "dead": dead, "key": key})


def rest(connection: psycopg.Connection) -> None:
    """Leave nothing for autovacuum and the checkpointer to do that belongs to the preparation."""
    connection.execute("VACUUM ANALYZE")
    connection.execute("CHECKPOINT")


def drained(connection: psycopg.Connection) -> bool:
    return not _one(connection, "SELECT EXISTS (SELECT FROM entity_changes WHERE NOT processed AND dead_at IS NULL"
                                " AND next_attempt_at IS NULL)")  # fmt: skip


def streaming(connection: psycopg.Connection) -> bool:
    """Whether somebody reads a slot of this database."""
    return _one(connection, "SELECT EXISTS (SELECT FROM pg_replication_slots"
                            " WHERE database = current_database() AND active)")  # fmt: skip


def _one(connection: psycopg.Connection, query: LiteralString) -> bool:
    row = connection.execute(query).fetchone()
    assert row is not None
    return bool(row[0])


def _no_slot_is_read(admin: psycopg.Connection, name: str) -> bool:
    read = admin.execute("SELECT FROM pg_replication_slots WHERE database = %s AND active", [name]).fetchall()
    return not read
