"""What a backfill costs: the latency of what is written meanwhile; rows a second, and those of one statement."""

from __future__ import annotations

import sys
import tempfile
import threading
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
_LOOK_S = 0.01


def measure(server: TempServer, size: Size) -> list[Figure]:
    """Pages wait for the consumer, which handles what is written at the steady pace, too.

    The table is there both times, and neither the start of the backfill nor that of the writer is measured. A stall of
    the whole machine is a bystander's as well, who does nothing but look at the clock.
    """
    with tempfile.TemporaryDirectory(prefix="cdcbench") as name, fresh_outbox(server) as connection:
        folder = Path(name)
        _existing(connection, _ENOUGH)
        bystander = _Bystander(size.seconds)
        alone = latency.of_outbox(connection, size, folder, lambda _: bystander)
        alone_max = bystander.longest_ms
        connection.execute("DROP TABLE bench_rows")
        beside = latency.of_outbox(connection, size, folder, lambda _: _reading(connection, bystander))
        [(per_s,)] = connection.execute(_PACE).fetchall()
    return [
        Figure("p50 without", alone[0], "ms"),
        Figure("p50 beside a backfill", beside[0], "ms"),
        Figure("p99 without", alone[1], "ms"),
        Figure("p99 beside a backfill", beside[1], "ms"),
        Figure("p50 beside to without", beside[0] / alone[0], ""),
        Figure("p99 beside to without", beside[1] / alone[1], ""),
        Figure("max without", alone[2], "ms"),
        Figure("max beside a backfill", beside[2], "ms"),
        Figure("a bystander's max without", alone_max, "ms"),
        Figure("a bystander's max beside a backfill", bystander.longest_ms, "ms"),
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


class _Bystander:
    """Looks at the clock, and notes by how much each of its waits was longer than it was to be.

    ``longest_ms``: the longest of the last ``seconds`` before it left. It may come again.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.longest_ms = 0.0

    def __enter__(self) -> None:
        self._left = threading.Event()
        self._waits: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()
        since = time.monotonic() - self._seconds
        self.longest_ms = max(late_s for at, late_s in self._waits if at >= since) * 1e3

    def _look(self) -> None:
        began = time.monotonic()
        while not self._left.wait(_LOOK_S):
            now = time.monotonic()
            self._waits.append((now, now - began - _LOOK_S))
            began = now


@contextmanager
def _reading(connection: psycopg.Connection, bystander: _Bystander) -> Iterator[None]:
    """As users run it."""
    with child("backfill", connection.info.dsn):
        eventually(lambda: connection.execute("SELECT FROM cdc_backfills WHERE written > 0").fetchall(), what="READs")
        with bystander:
            yield


if __name__ == "__main__":
    sys.argv = ["cdc", "backfill", "bench_others", "--dsn", *sys.argv[1:]]
    main()
