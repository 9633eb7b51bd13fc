"""The SQL floor: what PostgreSQL and one plain psycopg connection need to fetch full rows by key and to mark them.

And the same with one row inserted for each: in transactions of 50, as handlers share them.

The shape of the consumer's own statements, without what the consumer adds: no stream, no lanes, no handlers, and the
next batch is fetched when the last one is marked. The consumer works on several connections at once, so this is a
yardstick and no upper bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import psycopg

from cdc.contrib.demo.temp_server import TempServer
from tests.bench.database import drained, fresh_outbox, preload, rest
from tests.bench.handlers import EFFECTS, INSERT_EFFECT
from tests.bench.report import Figure
from tests.bench.size import Size

BATCH = 500
_GROUP = 50

_FETCH = """
SELECT c.seq, c.shard, c.id, coalesce(c.entity_type, c.table_name), c.entity_id, c.table_schema, c.table_name,
       c.operation, c.old_data, c.new_data, c.metadata, c.changed_at, c.error_count
FROM unnest(%(seqs)s::bigint[], %(shards)s::smallint[]) AS want(seq, shard)
JOIN entity_changes AS c ON c.shard = want.shard AND c.seq = want.seq
WHERE NOT c.processed AND c.next_attempt_at IS NULL AND c.dead_at IS NULL
ORDER BY c.seq
"""

_MARK = """
UPDATE entity_changes AS c SET processed = true, processed_at = now()
FROM unnest(%(seqs)s::bigint[], %(shards)s::smallint[]) AS done(seq, shard)
WHERE c.shard = done.shard AND c.seq = done.seq
  AND NOT c.processed AND c.next_attempt_at IS NULL AND c.dead_at IS NULL
"""

Batch = Sequence[tuple[int, int]]
"""(seq, shard) of each."""


def measure(server: TempServer, size: Size) -> list[Figure]:
    return [Figure("settled", _rate(server, size.changes, size.keys, _fetch_and_mark), "changes/s")]


def measure_inserting(server: TempServer, size: Size) -> list[Figure]:
    return [Figure("settled", _rate(server, size.inserting, size.keys, _fetch_insert_and_mark), "changes/s")]


def _rate(server: TempServer, changes: int, keys: int, work: Callable[[psycopg.Connection, Batch], None]) -> float:
    with fresh_outbox(server) as connection:
        connection.execute(EFFECTS)
        preload(connection, changes=changes, keys=keys)
        rest(connection)
        wanted = connection.execute("SELECT seq, shard FROM entity_changes ORDER BY seq").fetchall()
        began = time.perf_counter()
        for first in range(0, len(wanted), BATCH):
            work(connection, wanted[first : first + BATCH])
        seconds = time.perf_counter() - began
        assert drained(connection)
    return changes / seconds


def _fetch_and_mark(connection: psycopg.Connection, batch: Batch) -> None:
    with connection.cursor(binary=True) as cursor:
        mark(cursor, fetch(cursor, batch))


def _fetch_insert_and_mark(connection: psycopg.Connection, batch: Batch) -> None:
    with connection.cursor(binary=True) as cursor:
        found = fetch(cursor, batch)
        for first in range(0, len(found), _GROUP):
            group = found[first : first + _GROUP]
            with connection.transaction():
                for row in group:
                    cursor.execute(INSERT_EFFECT, [row[0], row[4]])
                mark(cursor, group)


def fetch(cursor: psycopg.Cursor, batch: Batch) -> list[Any]:
    """Their rows, in order."""
    cursor.execute(_FETCH, {"seqs": [seq for seq, _ in batch], "shards": [shard for _, shard in batch]})
    return cursor.fetchall()


def mark(cursor: psycopg.Cursor, rows: Sequence[Any]) -> None:
    """Those that ``fetch`` has found."""
    cursor.execute(_MARK, {"seqs": [row[0] for row in rows], "shards": [row[1] for row in rows]})
    assert cursor.rowcount == len(rows)
