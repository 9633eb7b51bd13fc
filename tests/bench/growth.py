"""How cost grows: with the backlog, the size of a row, the number of keys and of consumers, the history in the table.

Each point is measured once, with the no-op handler unless said otherwise.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import psycopg

from cdc.contrib.demo.temp_server import TempServer
from tests.bench import latency
from tests.bench.database import drained, fresh_outbox, preload, preload_history, rest, settled
from tests.bench.drain import rate_shared
from tests.bench.processes import Consumer
from tests.bench.report import Figure, quantile
from tests.bench.size import Size

_WITHIN_S = 900.0
_BACKLOGS = (10_000, 30_000, 100_000, 300_000, 1_000_000)
_PAYLOADS = (100, 1_000, 10_000, 100_000, 1_000_000)
_PAYLOADS_BYTES = 50_000_000
"""Of all rows of a point together, where they are at least 300."""
_KEYS = (1, 10, 100, 1_000, 10_000, 50_000)
_CONSUMERS = (1, 2, 3, 4)
_HISTORIES = (10_000, 100_000, 1_000_000)
# The text is hexadecimal digits of hashes, half as long compressed; one for all rows, or making it would take longer.
_PRELOAD_SIZED = """
INSERT INTO entity_changes (table_schema, table_name, operation, entity_id, entity_type, new_data, metadata)
SELECT 'public', 'tasks', 'INSERT', (n %% %(keys)s)::text, 'task', payload.row, '{}'
FROM (
  SELECT jsonb_build_object('text', left(string_agg(md5(n::text), ''), %(bytes)s)) AS row
  FROM generate_series(0, %(bytes)s / 32) AS n
) AS payload, generate_series(1, %(changes)s) AS n
"""
_ENOUGH_FOR_A_RATE = 5_000
"""Fewer fit into the window and are marked in one go, and between the first mark and the last there is no time."""


def by_backlog(server: TempServer, size: Size) -> list[Figure]:
    figures = []
    for backlog in (backlog for backlog in _BACKLOGS if backlog <= size.grown):
        with fresh_outbox(server) as connection:
            preload(connection, changes=backlog, keys=size.keys)
            rate, peak_mb = _drained(connection)
        figures += [_at("settled", rate, "changes/s", backlog), _at("peak memory", peak_mb, "MB", backlog)]
    return figures


def by_payload(server: TempServer, size: Size) -> list[Figure]:
    figures = []
    for payload in _PAYLOADS:
        changes = min(size.changes // 4, max(300, _PAYLOADS_BYTES // payload))
        with fresh_outbox(server) as connection:
            connection.execute(_PRELOAD_SIZED, {"keys": size.keys, "bytes": payload, "changes": changes})
            rate, peak_mb = _drained(connection)
        figures.append(_at("peak memory", peak_mb, "MB", payload))
        if changes >= _ENOUGH_FOR_A_RATE:
            figures += [
                _at("settled", rate, "changes/s", payload),
                _at("payload", rate * payload / 1e6, "MB/s", payload),
            ]
    return figures


def by_keys(server: TempServer, size: Size) -> list[Figure]:
    figures = []
    for keys in _KEYS:
        with fresh_outbox(server) as connection:
            preload(connection, changes=size.changes // 2, keys=keys)
            rate, _ = _drained(connection)
        figures.append(_at("settled", rate, "changes/s", keys))
    return figures


def by_consumers(server: TempServer, size: Size) -> list[Figure]:
    """With a handler that awaits 20 ms, 50 at a time each: 2,500 changes a second and consumer at most."""
    figures = []
    for consumers in _CONSUMERS:
        rate = rate_shared(server, consumers, consumers * size.awaiting // 6, size.many_keys)
        figures.append(_at("settled", rate, "changes/s", consumers))
    return figures


def by_history(server: TempServer, size: Size) -> list[Figure]:
    figures = []
    for history in (history for history in _HISTORIES if history <= size.grown):
        with fresh_outbox(server) as connection, tempfile.TemporaryDirectory(prefix="cdcbench") as folder:
            preload_history(connection, rows=history, days=30.0)
            latencies = latency.of_outbox(connection, size, Path(folder))
            preload(connection, changes=size.changes // 2, keys=size.keys)
            rate, _ = _drained(connection)
        figures += [
            _at("settled", rate, "changes/s", history),
            _at("commit to handler, p50", quantile(latencies, 0.5), "ms", history),
            _at("commit to handler, p99", quantile(latencies, 0.99), "ms", history),
        ]
    return figures


def _drained(connection: psycopg.Connection) -> tuple[float, float]:
    """Changes a second from the first call on, and the consumer's peak memory."""
    rest(connection)
    with Consumer(connection.info.dsn, "began") as consumer:
        consumer.until(lambda: drained(connection), within_s=_WITHIN_S)
        peak_mb = consumer.peak_rss_mb
    done = settled(connection, since_s=consumer.started_at)
    return done.changes / (done.last - consumer.calls[0] / 1e9), peak_mb


def _at(name: str, value: float, unit: str, at: float) -> Figure:
    return Figure(f"{name}, {at:,.0f}", value, unit, at)
