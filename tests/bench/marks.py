"""What fetching and marking cost the server: processor time of one session, and the WAL that a mark writes.

By the statements of the floor, which have the shape of the consumer's, 500 changes at a time. Full page images are
switched off meanwhile: how many there are depends on the checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from cdc.contrib.demo.temp_server import TempServer
from tests.bench import floor, processor_time
from tests.bench.database import drained, fresh_outbox, preload, rest
from tests.bench.report import Figure
from tests.bench.size import Size
from tests.eventually import eventually

_NOTE_BYTES = 100
"""So that a row of the outbox is stored in some 400 bytes."""


def measure(server: TempServer, size: Size) -> list[Figure]:
    with fresh_outbox(server) as connection, _no_page_images(connection):
        preload(connection, changes=size.changes, keys=size.keys)
        connection.execute(
            "UPDATE entity_changes SET metadata = metadata || jsonb_build_object('note', repeat('x', %s))",
            [_NOTE_BYTES],
        )
        rest(connection)
        wanted = connection.execute("SELECT seq, shard FROM entity_changes ORDER BY seq").fetchall()
        [stored] = _row(connection, "SELECT avg(pg_column_size(c.*))::float8 FROM entity_changes AS c")
        fetching = marking = wal = 0.0
        with connection.cursor(binary=True) as cursor:
            for first in range(0, len(wanted), floor.BATCH):
                began = processor_time.of_session(connection)
                rows = floor.fetch(cursor, wanted[first : first + floor.BATCH])
                fetched, written = processor_time.of_session(connection), _written(connection)
                floor.mark(cursor, rows)
                wal += _written(connection) - written
                fetching, marking = (
                    fetching + fetched - began,
                    marking + processor_time.of_session(connection) - fetched,
                )
        assert drained(connection)
    return [
        Figure("fetch, server's cpu", fetching / size.changes, "us/change"),
        Figure("mark, server's cpu", marking / size.changes, "us/change"),
        Figure("fetch and mark, server's cpu", (fetching + marking) / size.changes, "us/change"),
        Figure("mark, WAL", wal / size.changes, "bytes/change"),
        Figure("row", stored, "bytes"),
    ]


@contextmanager
def _no_page_images(connection: psycopg.Connection) -> Iterator[None]:
    _configure(connection, "off")
    try:
        yield
    finally:
        _configure(connection, "on")


def _configure(connection: psycopg.Connection, images: str) -> None:
    connection.execute(f"ALTER SYSTEM SET full_page_writes = {images}".encode())
    connection.execute("SELECT pg_reload_conf()")
    eventually(lambda: _row(connection, "SHOW full_page_writes") == (images,), what=f"full_page_writes to be {images}")


def _written(connection: psycopg.Connection) -> int:
    [written] = _row(connection, "SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint")
    return int(written)


def _row(connection: psycopg.Connection, query: str) -> tuple[Any, ...]:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row
