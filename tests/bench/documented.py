"""The documented processor as it is written: ``python -m tests.bench.documented DSN ROWS FILE [SECONDS]``

It listens, and looks every half second: up to 20 unprocessed changes in the order of ``changed_at``, locked outside a
transaction (which locks nothing), each marked by an UPDATE of its own. In one respect it is kinder to itself than
documented: as long as it finds changes it looks again at once.

Says "listening" when it does; ends when ROWS changes are handled, after SECONDS if given, and at SIGTERM. FILE gets of
each change in turn its ``entity_id`` and the nanosecond of the monotonic clock at which its handler would start.
"""

from __future__ import annotations

import atexit
import signal
import sys
import time
from array import array
from pathlib import Path

import psycopg
from psycopg.rows import dict_row

_POLL_INTERVAL_S = 0.5
_CLAIM = """
SELECT * FROM entity_changes WHERE processed = FALSE AND error_count < 3
ORDER BY changed_at LIMIT 20 FOR UPDATE SKIP LOCKED
"""
_MARK = "UPDATE entity_changes SET processed = TRUE, processed_at = NOW() WHERE id = %s"


def main() -> None:
    dsn, rows, path, *seconds = sys.argv[1:]
    handled = array("q")
    until = time.monotonic() + float(seconds[0] if seconds else "inf")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    atexit.register(lambda: Path(path).write_bytes(handled.tobytes()))
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        connection.execute("LISTEN entity_change")
        print("listening", flush=True)
        while len(handled) < 2 * int(rows) and time.monotonic() < until:
            if not _batch(connection, handled, until):
                for _ in connection.notifies(timeout=_POLL_INTERVAL_S, stop_after=1):
                    pass


def _batch(connection: psycopg.Connection[dict[str, object]], handled: array[int], until: float) -> bool:
    changes = connection.execute(_CLAIM).fetchall()
    for change in changes:
        handled.extend((int(str(change["entity_id"])), time.monotonic_ns()))
        connection.execute(_MARK, [change["id"]])
        if time.monotonic() > until:
            break
    return bool(changes)


if __name__ == "__main__":
    main()
