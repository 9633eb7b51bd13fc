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
from tests.bench.report import Figure, quantile
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
_WRITTEN = "SELECT coalesce(sum(written), 0) FROM cdc_backfills"
_TURNS = 4
"""With and without, again and again: what the machine does meanwhile is in both."""
_ENOUGH = 1_000_000
"""More rows than are read while the latency is measured."""
_LOOK_S = 0.01


def measure(server: TempServer, size: Size) -> list[Figure]:
    """Pages wait for the consumer, which handles what is written at the steady pace, too.

    The table is there both times, and neither the start of the backfill nor that of the writer is measured. A stall of
    the whole machine is a bystander's as well, who does nothing but look at the clock.
    """
    alone, beside = list[float](), list[float]()
    with tempfile.TemporaryDirectory(prefix="cdcbench") as name, fresh_outbox(server) as connection:
        folder = Path(name)
        _existing(connection, _ENOUGH)
        reading = _Reading(connection)
        without, along = _Bystander(size.seconds), _Bystander(size.seconds)
        for _ in range(_TURNS):
            alone += latency.of_outbox(connection, size, folder, lambda _: without)
            connection.execute("DROP TABLE bench_rows")
            beside += latency.of_outbox(connection, size, folder, lambda _: reading.beside(along))
            connection.execute("DROP TABLE bench_rows")
    p50, p50_beside, p99, p99_beside = (quantile(of, share) for share in (0.5, 0.99) for of in (alone, beside))
    return [
        Figure("p50 without", p50, "ms"),
        Figure("p50 beside a backfill", p50_beside, "ms"),
        Figure("p99 without", p99, "ms"),
        Figure("p99 beside a backfill", p99_beside, "ms"),
        Figure("p50 beside to without", p50_beside / p50, ""),
        Figure("p99 beside to without", p99_beside / p99, ""),
        Figure("max without", max(alone), "ms"),
        Figure("max beside a backfill", max(beside), "ms"),
        Figure("a bystander's max without", without.longest_ms, "ms"),
        Figure("a bystander's max beside a backfill", along.longest_ms, "ms"),
        Figure("read meanwhile", reading.written / reading.seconds, "rows/s"),
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

    ``longest_ms``: the longest of the last ``seconds`` before it left, each time it came.
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
        self.longest_ms = max(self.longest_ms, *(late_s * 1e3 for at, late_s in self._waits if at >= since))

    def _look(self) -> None:
        began = time.monotonic()
        while not self._left.wait(_LOOK_S):
            now = time.monotonic()
            self._waits.append((now, now - began - _LOOK_S))
            began = now


class _Reading:
    """A backfill, as users run it, that goes on each time. ``written`` rows in ``seconds``."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection
        self._command = ["bench_others"]
        self.written = 0
        self.seconds = 0.0

    @contextmanager
    def beside(self, bystander: _Bystander) -> Iterator[None]:
        before = self._written()
        with child("backfill", self._connection.info.dsn, *self._command):
            eventually(lambda: self._written() > before, what="READs")
            began, before = time.monotonic(), self._written()
            with bystander:
                yield
            self.written += self._written() - before
            self.seconds += time.monotonic() - began
        self._command = ["resume", "bench_others"]

    def _written(self) -> int:
        [(written,)] = self._connection.execute(_WRITTEN).fetchall()
        return int(written)


if __name__ == "__main__":
    dsn, *command = sys.argv[1:]
    sys.argv = ["cdc", "backfill", *command, "--dsn", dsn]
    main()
