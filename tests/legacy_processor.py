"""The legacy processor: DatabaseActionProcessor of the documented design, in Python.

Its statements, its polling, its LISTEN, its marks.

Whoever runs it stops it as one stops a service: what it has begun it finishes. ``without`` is the one change that the
guide asks for: the types that it has given away are left out of its query.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.rows import dict_row

_BATCH = """
        SELECT * FROM entity_changes
        WHERE processed = FALSE
        AND error_count < 3
        AND coalesce(entity_type, table_name) <> ALL (%s)
        ORDER BY changed_at
        LIMIT 20
        FOR UPDATE SKIP LOCKED
"""
_PROCESSED = """
        UPDATE entity_changes
        SET processed = TRUE, processed_at = NOW()
        WHERE id = %s
"""
_FAILED = """
        UPDATE entity_changes
        SET error_count = error_count + 1,
            last_error = %s
        WHERE id = %s
"""
_EVERY_S = 0.5


class _AsText(Loader):
    """'infinity' is no date for Python, as it is one for node-postgres."""

    def load(self, data: Buffer) -> str:
        return bytes(data).decode()


def connect(dsn: str) -> psycopg.Connection[dict[str, Any]]:
    """Each statement commits by itself, as with the documented pool."""
    db = psycopg.connect(dsn, autocommit=True, row_factory=dict_row)
    db.adapters.register_loader("timestamptz", _AsText)
    db.prepare_threshold = None  # as node-postgres: a plan of before the upgrade would no longer fit
    return db


Act = Callable[[psycopg.Connection, dict[str, Any]], None]


class Processor:
    """``act`` does what a change asks for, on the processor's own connection, which commits each statement."""

    def __init__(self, dsn: str, act: Act, without: Sequence[str] = ()) -> None:
        self._dsn = dsn
        self._act = act
        self._without = list(without)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Processor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        with (
            connect(self._dsn) as db,
            psycopg.connect(self._dsn, autocommit=True) as listener,
        ):
            listener.execute("LISTEN entity_change")
            while not self._stopping.is_set():
                self.process_batch(db)
                list(listener.notifies(timeout=_EVERY_S, stop_after=1))

    def process_batch(self, db: psycopg.Connection[dict[str, Any]]) -> None:
        for change in db.execute(_BATCH, [self._without]).fetchall():
            if self._stopping.is_set():
                return
            try:
                self._act(db, change)  # type: ignore[arg-type]
                db.execute(_PROCESSED, [change["id"]])
            except Exception as error:
                db.execute(_FAILED, [str(error), change["id"]])
