"""The consumer's resident memory: with nothing to do, through one large transaction, and at a start with a backlog.

The handler keeps nothing. ``above idle`` is the peak less what the same consumer had when it was idle.
"""

from __future__ import annotations

import psycopg

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.model import Operation
from cdc.postgres.tracking import track
from tests.bench.database import ROWS, drained, fresh_outbox, preload, settled, streaming
from tests.bench.processes import Consumer
from tests.bench.report import Figure
from tests.bench.size import Size

_READY_S = 30.0
_WITHIN_S = 900.0
_WRITE = "INSERT INTO bench_rows (id, note) SELECT n, 'a row to be captured' FROM generate_series(1, %s) AS n"
_ANY = "SELECT EXISTS (SELECT FROM entity_changes WHERE processed)"
_READ = "SELECT bool_and(confirmed_flush_lsn >= '{}') FROM pg_replication_slots"
_DONE = "SELECT count(*) >= %(n)s FROM (SELECT FROM entity_changes WHERE processed LIMIT %(n)s) AS done"


def measure_transaction(server: TempServer, size: Size) -> list[Figure]:
    """Until all wake-ups of it are read, and as many changes are handled as in the scenario drain."""
    with fresh_outbox(server) as connection:
        connection.execute(ROWS)
        track(connection, "public", "bench_rows", operations=[Operation.INSERT])
        with Consumer(connection.info.dsn, "nothing") as consumer:
            idle_mb = _idle_mb(consumer, connection)
            connection.execute(_WRITE, [size.transaction])
            read = _READ.format(_end_of_wal(connection))
            consumer.until(lambda: _is(connection, read) and _is(connection, _DONE, size.changes), within_s=_WITHIN_S)
            peak_mb = consumer.peak_rss_mb
        done = settled(connection)
    return [
        Figure("idle", idle_mb, "MB"),
        Figure(f"peak, {size.transaction:,} in one transaction", peak_mb, "MB"),
        Figure("above idle", peak_mb - idle_mb, "MB"),
        Figure("settled", done.rate, "changes/s"),
    ]


def measure_backlog(server: TempServer, size: Size) -> list[Figure]:
    """Until as many are handled as in the scenario drain: what the rest of the backlog takes is more of the same."""
    with fresh_outbox(server) as connection:
        with Consumer(connection.info.dsn, "nothing") as consumer:
            idle_mb = _idle_mb(consumer, connection)
        preload(connection, changes=size.pending, keys=size.many_keys)
        connection.execute("ANALYZE")
        connection.execute("CHECKPOINT")
        with Consumer(connection.info.dsn, "nothing") as consumer:
            consumer.until(lambda: _is(connection, _ANY), within_s=_READY_S)
            first_s = settled(connection).first - consumer.started_at
            consumer.until(lambda: _is(connection, _DONE, size.changes), within_s=_WITHIN_S)
            peak_mb = consumer.peak_rss_mb
    return [
        Figure("idle", idle_mb, "MB"),
        Figure(f"peak, {size.pending:,} pending at the start", peak_mb, "MB"),
        Figure("above idle", peak_mb - idle_mb, "MB"),
        Figure("start to first settled", first_s, "s"),
    ]


def measure_start(server: TempServer, size: Size) -> list[Figure]:
    """With nothing pending but the change that is waited for."""
    with fresh_outbox(server) as connection:
        preload(connection, changes=1, keys=1)
        with Consumer(connection.info.dsn, "nothing") as consumer:
            consumer.until(lambda: drained(connection), within_s=_READY_S)
        return [Figure("start to first settled", settled(connection).first - consumer.started_at, "s")]


def _idle_mb(consumer: Consumer, connection: psycopg.Connection) -> float:
    """After its first sweep and a change of its own, so that all is loaded that it needs."""
    consumer.until(lambda: streaming(connection), within_s=_READY_S)
    preload(connection, changes=1, keys=1)
    connection.execute("NOTIFY entity_change")
    consumer.until(lambda: _is(connection, _ANY), within_s=_READY_S)
    connection.execute("TRUNCATE entity_changes")
    return consumer.rss_mb


def _end_of_wal(connection: psycopg.Connection) -> str:
    row = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
    assert row is not None
    return str(row[0])


def _is(connection: psycopg.Connection, query: str, number: int = 0) -> bool:
    row = connection.execute(query, {"n": number}).fetchone()
    assert row is not None
    return bool(row[0])
