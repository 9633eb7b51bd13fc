"""Databases to measure in: each fresh, each dropped afterwards."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import LiteralString, NamedTuple

import psycopg
from psycopg import sql

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.model import SHARDS
from cdc.postgres import migrations
from tests.eventually import eventually

DOCUMENTED = Path(__file__).with_name("documented.sql")
"""The documented table, indexes and trigger as they stand, NOTIFY included."""

ROWS = """
CREATE TABLE bench_rows (id bigint PRIMARY KEY, note text NOT NULL, user_id bigint, chat_id text, room_id text)
"""
"""A table to be captured; with the columns that the documented trigger names."""

_PRELOAD_DOCUMENTED = """
INSERT INTO entity_changes (table_name, operation, entity_id, entity_type, new_data, changed_at)
SELECT 'tasks', 'INSERT', n::text, 'task', jsonb_build_object('id', n, 'title', 'task number ' || n),
       now() + n * interval '1 us'
FROM generate_series(1, %s) AS n
"""
_PRELOAD = """
INSERT INTO entity_changes (table_schema, table_name, operation, entity_id, entity_type, new_data, metadata)
SELECT 'public', 'tasks', 'INSERT', (n %% %(keys)s)::text, 'task',
       jsonb_build_object('id', n %% %(keys)s, 'title', 'task number ' || n, 'status', 'open', 'user_id', n %% 97),
       jsonb_build_object('timestamp', now(), 'user_id', n %% 97)
FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS n
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
_SIDE_BY_SIDE = 2
"""Transactions, so that three million rows take a minute and not two."""
_UNPROCESSED = """
INSERT INTO entity_changes (table_name, operation, entity_type, entity_id, next_attempt_at, dead_at, error_count)
SELECT 'tasks', 'INSERT', 'task', coalesce(%(key)s, 'key ' || n), now() + %(wait)s::interval,
       CASE WHEN %(dead)s THEN now() END, CASE WHEN %(wait)s IS NULL AND NOT %(dead)s THEN 0 ELSE 1 END
FROM generate_series(1, %(changes)s) AS n
"""
_SETTLED = """
SELECT count(*), count(*) FILTER (WHERE processed_at = first),
       extract(epoch FROM min(first))::float8, extract(epoch FROM max(processed_at))::float8
FROM (
  SELECT processed_at, min(processed_at) OVER () AS first
  FROM entity_changes WHERE processed AND processed_at >= to_timestamp(%s)
) AS settled
"""


class Settled(NamedTuple):
    """How many, how many of them in the first settle, and the unix seconds of the first and of the last."""

    changes: int
    at_first: int
    first: float
    last: float

    @property
    def rate(self) -> float:
        """Changes a second after the first settle."""
        return (self.changes - self.at_first) / (self.last - self.first)


@contextmanager
def fresh_database(server: TempServer) -> Iterator[psycopg.Connection]:
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
def fresh_outbox(server: TempServer) -> Iterator[psycopg.Connection]:
    """As ``fresh_database``, with an empty outbox in the schema public."""
    with fresh_database(server) as connection:
        migrations.install(connection, "public")
        yield connection


@contextmanager
def old_snapshot(connection: psycopg.Connection) -> Iterator[None]:
    """Somebody else in this database holds a snapshot of now, so that what dies from now on cannot be removed."""
    with psycopg.connect(connection.info.dsn) as other:
        other.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        other.execute("SELECT count(*) FROM pg_class")
        yield


def preload(connection: psycopg.Connection, *, changes: int, keys: int) -> None:
    """Fill the outbox with so many fresh changes, spread evenly over the keys. No wake-up is sent."""

    def step(first: int) -> None:
        with psycopg.connect(connection.info.dsn, options="-c synchronous_commit=off") as other:
            last = min(first + _STEP - 1, changes)
            other.execute(_PRELOAD, {"first": first, "last": last, "keys": keys})

    with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        list(pool.map(step, range(1, changes + 1, _STEP)))


def preload_documented(connection: psycopg.Connection, changes: int) -> None:
    """An outbox as documented, in an empty database, with so many changes that are not processed."""
    connection.execute(ROWS)
    connection.execute(DOCUMENTED.read_bytes())
    connection.execute(_PRELOAD_DOCUMENTED, [changes])


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
    """In the order of the index, or each look would go through all that is done: it is asked ten times a second."""
    return _one(connection, "SELECT (SELECT seq FROM entity_changes WHERE NOT processed AND dead_at IS NULL"
                            " AND next_attempt_at IS NULL ORDER BY shard, seq LIMIT 1) IS NULL")  # fmt: skip


def settled(connection: psycopg.Connection, *, since_s: float = 0.0) -> Settled:
    """``since_s``: unix seconds; what was settled before does not count."""
    row = connection.execute(_SETTLED, [since_s]).fetchone()
    assert row is not None
    return Settled(*row)


def shared_by(connection: psycopg.Connection, consumers: int) -> bool:
    """Whether so many own all shards, none more than its fair share."""
    owned = [number for (number,) in connection.execute("SELECT count(*) FROM cdc_shards GROUP BY owner")]
    return len(owned) == consumers and sum(owned) == SHARDS and max(owned) <= ceil(SHARDS / consumers)


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
