"""What a backfill costs: the latency of what is written meanwhile; rows a second, and those of one statement."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg

from cdc.cli import main
from cdc.contrib.demo.temp_server import TempServer
from cdc.postgres.backfill import Backfills
from cdc.postgres.connect import connect
from cdc.postgres.tracking import track
from tests.bench import latency
from tests.bench.database import fresh_outbox, rest
from tests.bench.processes import child
from tests.bench.report import Figure
from tests.bench.size import Size
from tests.eventually import eventually

_OTHERS = """
CREATE TABLE bench_others AS SELECT n AS id, 'a row that was there before ' || n AS note
FROM generate_series(1, {rows}) AS n;
ALTER TABLE bench_others ADD PRIMARY KEY (id)
"""
_PLAIN = """
INSERT INTO entity_changes (table_name, operation, entity_id, new_data)
SELECT 'bench_others', 'READ', id::text, to_jsonb(o) FROM bench_others AS o
"""
_PACE = "SELECT written / extract(epoch FROM changed_at - started_at) FROM cdc_backfills"
_ENOUGH = 1_000_000
"""More rows than are read while the latency is measured."""


def measure(server: TempServer, size: Size) -> list[Figure]:
    """Pages wait for the consumer, which handles what is written at the steady pace, too."""
    with tempfile.TemporaryDirectory(prefix="cdcbench") as name, fresh_outbox(server) as connection:
        folder = Path(name)
        alone = latency.of_outbox(connection, size, folder)
        connection.execute("DROP TABLE bench_rows")
        _existing(connection, _ENOUGH)
        reading = _reading(connection)
        beside = latency.of_outbox(connection, size, folder, lambda _: reading)
        [(per_s,)] = connection.execute(_PACE).fetchall()
    return [
        Figure("p50 without", alone[0], "ms"),
        Figure("p50 beside a backfill", beside[0], "ms"),
        Figure("p99 without", alone[1], "ms"),
        Figure("p99 beside a backfill", beside[1], "ms"),
        Figure("p50 beside to without", beside[0] / alone[0], ""),
        Figure("p99 beside to without", beside[1] / alone[1], ""),
        Figure("read meanwhile", float(per_s), "rows/s"),
    ]


def measure_alone(server: TempServer, size: Size) -> list[Figure]:
    """Without a consumer, and without a bound of the backlog."""
    with fresh_outbox(server) as connection:
        _existing(connection, size.changes)
        backfills = Backfills("public")
        with closing(connect(connection.info.dsn, application_name="bench", user_path=True)) as mine:
            began = time.monotonic()
            for _ in backfills.work(mine, backfills.start(mine, "bench_others", backlog=10 * size.changes)):
                pass
            backfill = time.monotonic() - began
        began = time.monotonic()
        connection.execute(_PLAIN)
        plain = time.monotonic() - began
    return [
        Figure("backfill", size.changes / backfill, "rows/s"),
        Figure("INSERT ... SELECT", size.changes / plain, "rows/s"),
    ]


def _existing(connection: psycopg.Connection, rows: int) -> None:
    connection.execute(_OTHERS.replace("{rows}", str(rows)).encode())
    track(connection, "public", "bench_others")
    rest(connection)


@contextmanager
def _reading(connection: psycopg.Connection) -> Iterator[None]:
    """As users run it."""
    with child("backfill", connection.info.dsn):
        eventually(lambda: connection.execute("SELECT FROM cdc_backfills WHERE written > 0").fetchall(), what="READs")
        yield


if __name__ == "__main__":
    sys.argv = ["cdc", "backfill", "bench_others", "--dsn", *sys.argv[1:]]
    main()
