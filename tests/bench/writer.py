"""A program that writes one row after the other at a steady pace: ``python -m tests.bench.writer``

    DSN STATEMENT RATE ROWS FILE

STATEMENT is ``insert`` or ``notify``. FILE gets, for each row in turn, the moment at which its commit had returned,
in nanoseconds of the monotonic clock that all processes of a machine share.
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


def main() -> None:
    dsn, statement, rate, rows, path = sys.argv[1:]
    with psycopg.connect(dsn, autocommit=True) as connection:
        Path(path).write_bytes(write(connection, statement, float(rate), int(rows)).tobytes())


if __name__ == "__main__":
    main()
