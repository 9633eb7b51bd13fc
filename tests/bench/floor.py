"""The SQL floor: what PostgreSQL and one plain psycopg connection need to fetch full rows by key and to mark them.

The shape of the consumer's own statements, without what the consumer adds: no stream, no lanes, no handlers, and the
next batch is fetched when the last one is marked. The consumer works on several connections at once, so this is a
yardstick and no upper bound.
"""

from __future__ import annotations

import time

import psycopg

from cdc.throwaway import Server
from tests.bench.database import drained, fresh_outbox, preload, rest
from tests.bench.report import Figure
from tests.bench.size import Size

_BATCH = 500

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


def measure(server: Server, size: Size) -> list[Figure]:
    with fresh_outbox(server) as connection:
        preload(connection, changes=size.changes, keys=size.keys)
        rest(connection)
        wanted = connection.execute("SELECT seq, shard FROM entity_changes ORDER BY seq").fetchall()
        began = time.perf_counter()
        for first in range(0, len(wanted), _BATCH):
            _fetch_and_mark(connection, wanted[first : first + _BATCH])
        seconds = time.perf_counter() - began
        assert drained(connection)
    return [Figure("settled", size.changes / seconds, "changes/s")]


def _fetch_and_mark(connection: psycopg.Connection, batch: list[tuple[int, int]]) -> None:
    with connection.cursor(binary=True) as cursor:
        cursor.execute(_FETCH, {"seqs": [seq for seq, _ in batch], "shards": [shard for _, shard in batch]})
        found = cursor.fetchall()
        cursor.execute(_MARK, {"seqs": [row[0] for row in found], "shards": [row[1] for row in found]})
        assert cursor.rowcount == len(batch)
