"""A program that listens and notes when it heard: ``python -m tests.bench.listener DSN ROWS FILE``

Says "listening" when it does, ends when ROWS notifications have come. FILE gets pairs: the number that was notified,
and the nanosecond of the monotonic clock.
"""

from __future__ import annotations

import sys
import time
from array import array
from pathlib import Path

import psycopg
from psycopg import sql

from tests.bench.writer import CHANNEL


def main() -> None:
    dsn, rows, path = sys.argv[1:]
    heard = array("q")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(CHANNEL)))
        print("listening", flush=True)
        for notify in connection.notifies(stop_after=int(rows)):
            heard.extend((int(notify.payload), time.monotonic_ns()))
    # stop_after counts what came in one go as well, so that a few more than ROWS may be there.
    Path(path).write_bytes(heard.tobytes())


if __name__ == "__main__":
    main()
