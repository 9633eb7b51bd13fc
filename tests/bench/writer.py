"""A program that writes one row after the other at a steady pace: ``python -m tests.bench.writer``

    DSN STATEMENT RATE ROWS FILE [TOGETHER FIRST]

STATEMENT is ``insert`` or ``notify``. TOGETHER: so many rows in a transaction, numbered from FIRST on. FILE gets, for
each row in turn, the moment at which its commit had returned, in nanoseconds of the monotonic clock that all processes
of a machine share.
"""

from __future__ import annotations

import sys
import threading
import time
from array import array
from pathlib import Path

import psycopg

CHANNEL = "bench"
_STATEMENTS = {
    "insert": "INSERT INTO bench_rows (id, note) VALUES (%s, 'a row to be captured')",
    "insert together": "INSERT INTO bench_rows (id, note) SELECT n, 'a row to be captured'"
                       " FROM generate_series(%s::int, %s::int) AS n",
    "notify": "WITH written AS (INSERT INTO bench_rows (id, note) VALUES (%s, 'a row to be captured') RETURNING id)"
              " SELECT pg_notify('bench', id::text) FROM written",
}  # fmt: skip


def write(connection: psycopg.Connection, statement: str, rate: float, rows: int) -> array[int]:
    """``rate`` rows a second. A row that is late does not shift those after it, so that a stall is not hidden."""
    returned = array("q")
    pause = threading.Event()
    began = time.monotonic()
    for row in range(rows):
        if (ahead_s := began + row / rate - time.monotonic()) > 0:
            pause.wait(ahead_s)
        connection.execute(_STATEMENTS[statement], [row])
        returned.append(time.monotonic_ns())
    return returned


def write_together(connection: psycopg.Connection, rate: float, rows: range, together: int) -> array[int]:
    """The same, with so many rows in each transaction."""
    returned = array("q")
    pause = threading.Event()
    began = time.monotonic()
    for first in range(rows.start, rows.stop, together):
        last = min(first + together, rows.stop) - 1
        if (ahead_s := began + (first - rows.start) / rate - time.monotonic()) > 0:
            pause.wait(ahead_s)
        connection.execute(_STATEMENTS["insert together"], [first, last])
        returned.extend([time.monotonic_ns()] * (last - first + 1))
    return returned


def main() -> None:
    dsn, statement, rate, rows, path, *more = sys.argv[1:]
    with psycopg.connect(dsn, autocommit=True) as connection:
        if more:
            together, first = map(int, more)
            found = write_together(connection, float(rate), range(first, first + int(rows)), together)
        else:
            found = write(connection, statement, float(rate), int(rows))
        Path(path).write_bytes(found.tobytes())


if __name__ == "__main__":
    main()
