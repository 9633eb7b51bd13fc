"""Draining while somebody holds an old snapshot, so that nothing which dies can be removed: does the rate hold?

The rate of the last third of the changes to that of the first third. What scans for work reads all the dead again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psycopg

from cdc.contrib.demo.temp_server import TempServer
from cdc.core.model import Operation
from cdc.postgres.tracking import track
from tests.bench.database import (
    ROWS,
    fresh_database,
    fresh_outbox,
    old_snapshot,
    preload_documented,
    rest,
    streaming,
)
from tests.bench.latency import numbers
from tests.bench.processes import Consumer, child, finish
from tests.bench.queues import pgqueuer
from tests.bench.report import Figure
from tests.bench.size import Size

_READY_S = 30.0
_WITHIN_S = 120.0
_TRANSACTION = 100
_ROUNDS = 30
_WRITE = """
INSERT INTO bench_rows (id, note) SELECT n, 'a row to be captured' FROM generate_series(%s::int, %s::int) AS n
"""
_LEFT = """
SELECT EXISTS (
  SELECT FROM generate_series(0, 63) AS s(shard)
  CROSS JOIN LATERAL (
    SELECT FROM entity_changes AS c
    WHERE c.shard = s.shard AND c.seq > currval(pg_get_serial_sequence('entity_changes', 'seq')) - %s
      AND NOT c.processed AND c.next_attempt_at IS NULL AND c.dead_at IS NULL
    LIMIT 1
  ) AS left_
)
"""


def measure(server: TempServer, size: Size) -> list[Figure]:
    """Changes are written in transactions of 100; when a thirtieth of all is written and handled the next one is."""
    with fresh_outbox(server) as connection:
        connection.execute(ROWS)
        track(connection, "public", "bench_rows", operations=[Operation.INSERT])
        rest(connection)
        connection.execute("SET enable_seqscan = off")
        connection.execute("SET enable_bitmapscan = off")
        with Consumer(connection.info.dsn, "nothing") as consumer, old_snapshot(connection):
            consumer.until(lambda: streaming(connection), within_s=_READY_S)
            _pass(connection, consumer, 0, 10 * _TRANSACTION)  # warm-up
            ends = [0.0]
            began = time.monotonic()
            each = size.passing // _ROUNDS
            for number in range(_ROUNDS):
                _pass(connection, consumer, 10 * _TRANSACTION + number * each, each)
                ends.append(time.monotonic() - began)
    return _figures("cdc", each * _ROUNDS, ends[_ROUNDS // 3 :: _ROUNDS // 3])


def measure_documented(server: TempServer, size: Size) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="cdcbench") as name, fresh_database(server) as connection:
        preload_documented(connection, size.passing)
        rest(connection)
        path = Path(name, "handled")
        arguments = (connection.info.dsn, str(size.passing), str(path), str(size.snapshot_s))
        with old_snapshot(connection), child("documented", *arguments) as processor:
            finish(processor, within_s=size.snapshot_s + _READY_S)
        moments = numbers(path)[1::2]
    ends = [(moments[len(moments) * third // 3 - 1] - moments[0]) / 1e9 for third in (1, 2, 3)]
    return _figures("documented", len(moments), ends)


def measure_pgqueuer(server: TempServer, size: Size) -> list[Figure]:
    with fresh_database(server) as connection, old_snapshot(connection):
        told = pgqueuer(connection.info.dsn, size.passing, seconds=size.snapshot_s)
    return _figures("pgqueuer", told.settled, told.thirds)


def _pass(connection: psycopg.Connection, consumer: Consumer, first: int, changes: int) -> None:
    for start in range(first, first + changes, _TRANSACTION):
        connection.execute(_WRITE, [start, start + _TRANSACTION - 1])
    consumer.until(lambda: _handled(connection, changes), within_s=_WITHIN_S, look_every_s=0.02)


def _handled(connection: psycopg.Connection, changes: int) -> bool:
    """The last so many that this session wrote; those before would be a walk over all that is dead."""
    row = connection.execute(_LEFT, [changes]).fetchone()
    return row == (False,)


def _figures(name: str, changes: int, ends: Sequence[float]) -> list[Figure]:
    """``ends``: the seconds after which each third of the changes was done."""
    first, second, last = ends
    return [
        Figure(f"{name}, first third", changes / 3 / first, "changes/s"),
        Figure(f"{name}, last third", changes / 3 / (last - second), "changes/s"),
        Figure(f"{name}, last to first", first / (last - second), ""),
    ]
